"""Damaged files of every kind: exit 0 or 2, at most three lines on stderr, nothing lost.

`pytest --hypothesis-profile thorough` damages more than 2,000. The last test counts them.
"""

import hashlib
import resource
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import Phase, assume, given, settings

from tests.cli.damages import byte_damages, json_damages
from tests.cli.whole_files import LEARN, TRAIN, make_all

# 2 for each file in an ordinary run; 32, other ones each time, in a thorough one.
# Each is a whole command, so that to look for a smaller damage would take minutes.
THOROUGH = settings.default.max_examples > 100
EXAMPLES = settings(
    max_examples=32 if THOROUGH else 2,
    phases=(Phase.explicit, Phase.generate),
)


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
    """Return a folder with one undamaged file of each kind."""
    root = tmp_path_factory.mktemp("whole")
    make_all(root, tiny_model_folder)
    return root


# What reads a file: {here} is the folder with the damaged file, {there} the one without damage, in
# which the run was begun that is resumed.
SHORT = ("train", "--rank", "2", "--steps", "1", "--batch-size", "2", "--held-out", "0")
ROWS = (*SHORT, "--model", "{there}/model", "--out", "{here}/out", "--data")
FROM = ("--model", "{there}/model", "--data", "{there}/rows.jsonl")
MODEL = (*SHORT, "--model", "{here}/model", "--data", "{there}/rows.jsonl", "--out", "{here}/out")
RESUMED = (*TRAIN, *FROM, "--rank", "2", "--resume", "--out")
LEARNED = (*LEARN, *FROM, "--resume", "--out")
CACHED = ("--cache-prefix", "--cache-folder", "{here}/cache", "--mask", "{there}/upper.json")
MASKED = (*SHORT, *FROM, "--mask", "{here}/learned/mask.json", "--out", "{here}/out")
CONFIGURED = ("train", "--steps", "1", "--batch-size", "2", "--rank", "2", *FROM,
              "--out", "{here}/out", "--config")  # fmt: skip
TIME = ("select", "{there}/learned", "--budget", "time=0.9", "--speed", "{here}/speed.json")
CHECKPOINTS = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "costs.json")

READERS: dict[str, tuple[str, ...]] = {
    **{f"model/{name}.json": MODEL for name in ("config", "generation_config")},
    **{f"model/{name}.json": MODEL for name in ("tokenizer", "tokenizer_config")},
    **{"model/model.safetensors": MODEL, "model/chat_template.jinja": MODEL},
    "pickled/pytorch_model.bin": ("explain", "--model", "{here}/pickled"),
    "pickled/config.json": ("explain", "--model", "{here}/pickled"),
    "packed/model.gguf": (*SHORT, *FROM, "--model", "{here}/packed", "--out", "{here}/out"),
    **{f"rows.{kind}": (*ROWS, f"{{here}}/rows.{kind}") for kind in ("json", "jsonl", "csv")},
    "rows.parquet": (*ROWS, "{here}/rows.parquet"),
    **{f"options.{kind}": (*CONFIGURED, f"{{here}}/options.{kind}") for kind in ("yaml", "json")},
    "learned/mask.json": MASKED,
    "learned/mask.json ": ("select", "{here}/learned", "--top", "0.3"),
    "learned/mask.json  ": ("select", "{here}/learned", "--budget", "memory=1GiB"),
    "learned/mask.json   ": ("compare", "{here}/learned", "{there}/learned"),
    "learned/mask.json    ": (*LEARNED, "{here}/learned"),
    "speed.json": TIME,
    **{f"cache/states/{name}": (*SHORT, *FROM, *CACHED, "--out", "{here}/out")
       for name in ("index.json", "states.bin")},
    "trained/metrics.json": ("report", "{here}/trained", "--out", "{here}/report"),
    "trained/metrics.json ": (*RESUMED, "{here}/trained"),
    **{f"trained/{name}": ("export", "{here}/trained", "--merge", "--out", "{here}/out")
       for name in ("run.json", "adapter_config.json", "adapter_model.safetensors")},
    "trained/adapter_config.json ": ("export", "{here}/trained", "--out", "{here}/out"),
    "trained/adapter_model.safetensors ": (*RESUMED, "{here}/trained"),
    "full/changed.safetensors": ("export", "{here}/full", "--merge", "--out", "{here}/out"),
    **{f"trained-half/{name}": (*RESUMED, "{here}/trained-half")
       for name in ("run.json", "train.json", "before.json", "log.jsonl")},
    **{f"trained-half/checkpoints/checkpoint-2/{name}": (*RESUMED, "{here}/trained-half")
       for name in (*CHECKPOINTS, "complete.json", "adapter_model.safetensors")},
    **{f"learned-half/{name}": (*LEARNED, "{here}/learned-half")
       for name in ("run.json", "search.json", "stage1.json", "cost.json", "log.jsonl",
                    "adapter/adapter_model.safetensors", "adapter/adapter_config.json")},
}  # fmt: skip


# (reader, digest) of every damaged file that a command has read, and the tests that began: both of
# this process, for pytest-xdist may share the tests of a file among several.
READ: set[tuple[str, bytes]] = set()
BEGAN: set[tuple[str, str]] = set()


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def check(ila, whole: Path, reader: str, damage) -> None:
    file = reader.strip()
    content = (whole / file).read_bytes()
    damaged = damage(content)
    assume(damaged != content)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(shutil.copytree(whole, Path(folder) / "here"))
        (here / file).write_bytes(damaged)
        before, begin = files_of(here), time.process_time()
        answer = ila(*(text.format(here=here, there=whole) for text in READERS[reader]))
        READ.add((reader, hashlib.sha256(damaged).digest()))
        assert time.process_time() - begin < 30  # of this process: a busy machine is no failure
        # A bar that is drawn over itself is one line.
        lines = [line.rpartition("\r")[2] for line in answer.err.split("\n") if line.strip()]
        assert answer.code in (0, 2) and "Traceback" not in answer.err, answer.err[-4000:]
        assert len(lines) <= 3, answer.err
        if answer.code == 2:
            assert sum(line.startswith("error: ") for line in lines) == 1, answer.err
            assert files_of(here) == before
        elif "--resume" not in READERS[reader] and not file.startswith("cache/"):
            # A run that goes on and a cache that is computed again may replace it.
            assert (here / file).read_bytes() == before[file]


@pytest.mark.parametrize("reader", READERS)
def test_damaged_bytes(reader, ila, whole):
    BEGAN.add((reader, "bytes"))

    @EXAMPLES
    @given(byte_damages())
    def damaged(damage):
        check(ila, whole, reader, damage)

    damaged()


DOCUMENTS = [name for name in READERS if ".json" in name]


@pytest.mark.parametrize("reader", DOCUMENTS)
def test_damaged_values(reader, ila, whole):
    BEGAN.add((reader, "values"))

    @EXAMPLES
    @given(json_damages())
    def damaged(damage):
        check(ila, whole, reader, damage)

    damaged()


def test_every_reader_had_its_share_of_different_damages(capsys):
    if not BEGAN:
        pytest.skip("another process damaged the files")
    with capsys.disabled():
        print(f"\n{len(READ)} different damaged files in {len(BEGAN)} tests")
    assert {reader for reader, _ in READ} == {reader for reader, _ in BEGAN}
    # Hypothesis may draw one damage twice, of a short file above all.
    if THOROUGH and len(BEGAN) == len(READERS) + len(DOCUMENTS):
        assert len(READ) > 2000
