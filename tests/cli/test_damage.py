"""Damaged files of every kind: exit 0 or 2, at most three lines on stderr, nothing lost.

`pytest --hypothesis-profile thorough` damages ten times as many.
"""

import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from tests.cli.conftest import write_rows
from tests.cli.damages import byte_damages, json_damages

EXAMPLES = settings(max_examples=max(1, settings.default.max_examples // 20))
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }} "
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


class Killed(BaseException):
    """A kill: nothing that catches `Exception` sees it."""


@pytest.fixture(autouse=True)
def no_memory_for_absurd_sizes():
    """Let an allocation of many gigabytes fail here, as it would on a small machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def whole(tiny_model_folder, tmp_path_factory) -> Path:
    """Return a folder with one undamaged file of each kind, made by the commands themselves."""
    root = tmp_path_factory.mktemp("whole")
    model = shutil.copytree(tiny_model_folder, root / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(model, root / "pickled")
    torch.save(load_file(model / "model.safetensors"), root / "pickled" / "pytorch_model.bin")
    (root / "pickled" / "model.safetensors").unlink()
    write_rows(root / "rows.jsonl", 8)
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    (root / "rows.json").write_text(json.dumps(rows))
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (root / "rows.csv").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.Table.from_pylist(rows), root / "rows.parquet")
    return root


FILES = {
    **{f"model/{name}": "train" for name in ("tokenizer.json", "tokenizer_config.json")},
    **{f"model/{name}": "train" for name in ("config.json", "generation_config.json")},
    **{"model/model.safetensors": "train", "model/chat_template.jinja": "train"},
    **{"pickled/pytorch_model.bin": "explain pickled", "pickled/config.json": "explain pickled"},
    **{f"rows.{kind}": f"train {kind}" for kind in ("json", "jsonl", "csv", "parquet")},
}


def command(name: str, root: Path) -> list[str]:
    verb, _, kind = name.partition(" ")
    model = root / (kind if kind in ("pickled",) else "model")
    if verb == "explain":
        return ["explain", "--model", model, "--rank", "2"]
    kind = kind if kind in ("json", "csv", "parquet") else "jsonl"
    start = ["train", "--model", model, "--data", root / f"rows.{kind}", "--rank", "2"]
    return [*start, "--steps", "1", "--batch-size", "2", "--held-out", "0", "--out", root / "out"]


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def check(ila, whole: Path, file: str, name: str, damage) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(whole, Path(folder) / "root"))
        (root / file).write_bytes(damage((whole / file).read_bytes()))
        before, begin = files_of(root), time.monotonic()
        answer = ila(*command(name, root))
        assert time.monotonic() - begin < 30
        lines = [line for line in answer.err.splitlines() if line.strip()]
        assert answer.code in (0, 2) and "Traceback" not in answer.err, answer.err[-4000:]
        assert len(lines) <= 3, answer.err
        if answer.code == 2:
            assert sum(line.startswith("error: ") for line in lines) == 1, answer.err
            assert files_of(root) == before
        else:
            assert (root / file).read_bytes() == before[file]


@pytest.mark.parametrize("file", FILES)
def test_damaged_bytes(file, ila, whole):
    @EXAMPLES
    @given(byte_damages())
    def damaged(damage):
        check(ila, whole, file, FILES[file], damage)

    damaged()


@pytest.mark.parametrize("file", [name for name in FILES if ".json" in name])
def test_damaged_values(file, ila, whole):
    @EXAMPLES
    @given(json_damages())
    def damaged(damage):
        check(ila, whole, file, FILES[file], damage)

    damaged()
