"""``push_to_hub`` of ``ila train``: upload a finished adapter, by Trainer's names.

The repository is made before the training, so that a missing login shows at once. The upload holds
the adapter, its card, the tokenizer and the mask, and no file that describes the run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token

from ila.boundary import InputError, in_one_line
from ila.commands.export import beside
from ila.runs.atomic import write_json_atomic
from ila.runs.processes import on_main_process
from ila.training.arguments import HUB_FIELDS
from ila.training.card import CARD
from ila.training.train import ADAPTER_FILES

MASK = "mask.json"


@dataclass(frozen=True)
class Hub:
    """Place of an upload.

    Attributes:
        repository: ``hub_model_id``, or the name of the run's folder.
        private: ``hub_private_repo``.
        revision: ``hub_revision``.
    """

    repository: str
    private: bool | None = None
    revision: str | None = None

    def make(self) -> Hub:
        """Make the repository if it is not there; return the place with its full name.

        Raises:
            InputError: If the hub cannot be reached, or refuses.
        """

        def ask() -> str:
            with _asking(self.repository, "nothing was trained"):
                made = HfApi().create_repo(self.repository, private=self.private, exist_ok=True)
                return made.repo_id

        return Hub(on_main_process(ask), self.private, self.revision)

    def upload(self, run: Path, mask_file: Path | None) -> str:
        """Upload the adapter of a finished run; return a line for the screen.

        Args:
            run: Folder of the run.
            mask_file: Mask of the training, if it was given one; else the run's own, if it has one.

        Raises:
            InputError: If the hub cannot be reached, or refuses.
        """
        on_main_process(lambda: self._upload(run, mask_file))
        return f"Uploaded to {self.repository}"

    def _upload(self, run: Path, mask_file: Path | None) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file in (*ADAPTER_FILES, *beside(run)):
                shutil.copyfile(run / file, folder / file)
            mask = run / MASK if mask_file is None else mask_file
            if mask.exists():
                found = json.loads(mask.read_text(encoding="utf-8"))
                write_json_atomic(folder / MASK, _without_folders(found))
            text = (folder / CARD).read_text(encoding="utf-8")
            (folder / CARD).write_text(_without_local_base(text), encoding="utf-8")
            remedy = f"the adapter is whole in {run}; the same command with --resume uploads again"
            with _asking(self.repository, remedy):
                HfApi().upload_folder(
                    repo_id=self.repository,
                    folder_path=str(folder),
                    commit_message="End of training",
                    revision=self.revision,
                )


def take_hub(fields: Mapping[str, object], out: Path) -> tuple[dict[str, object], Hub | None]:
    """Take the fields of the hub out of fields of ``TrainingArguments``.

    Returns:
        The other fields, and the place of the upload, None without ``push_to_hub``.

    Raises:
        InputError: If there are fields of the hub and no ``push_to_hub``.
    """
    others = {name: value for name, value in fields.items() if name not in HUB_FIELDS}
    mine = {name: value for name, value in fields.items() if name in HUB_FIELDS}
    wanted = mine.pop("push_to_hub", False)
    if not wanted and mine:
        raise InputError(f"{next(iter(mine))} does nothing without push_to_hub")
    if not wanted:
        return others, None
    name = mine.get("hub_model_id") or out.absolute().name
    return others, Hub(str(name), mine.get("hub_private_repo"), mine.get("hub_revision"))


@contextmanager
def _asking(repository: str, state: str) -> Iterator[None]:
    """Turn any error of the hub into one line, without the user's token."""
    try:
        yield
    except Exception as error:
        text, token = in_one_line(error), get_token()
        text = text.replace(token, "…") if token else text
        raise InputError(f"push_to_hub to {repository!r} failed: {text}; {state}") from None


def _without_folders(value: object) -> object:
    """Return a JSON value in which paths of this machine are the names of their files."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _without_local_base(card: str) -> str:
    """Return a card without its base model if that is a path: the hub refuses such metadata."""
    lines = card.splitlines(keepends=True)
    base = next((line for line in lines if line.startswith("base_model: ")), "")
    if not Path(base.partition(": ")[2].strip().strip('"')).is_absolute():
        return card
    kept = (
        line for line in lines if line != base and not line.startswith('- "base_model:adapter:')
    )
    return "".join(kept)
