"""What every test stands on: no network, a known seed, and the optional shared files."""

import os

# Before transformers, tokenizers or matplotlib are imported: each reads its own at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# Threads that wait by spinning slow each other down thirtyfold when two processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parents[1]


# `pytest --hypothesis-profile thorough` draws ten times as many cases, other ones each time.
# No deadline: a busy machine is no failure. The seed of every test is drawn anew for each case.
settings.register_profile(
    "lean",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile(
    "thorough", settings.get_profile("lean"), max_examples=600, derandomize=False, print_blob=True
)
settings.load_profile("lean")


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among the workers of pytest-xdist; each would otherwise take them all."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator, so that a test alone draws what it draws among the others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return the folder `shared` beside the repository: data and small models, not part of it."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("no folder `shared` beside the repository")
    return path


@pytest.fixture(scope="session")
def stories260k(shared_dir: Path) -> Path:
    """Return the folder of a 260,000-parameter Llama with its tokenizer."""
    path = shared_dir / "models" / "stories260K"
    if not (path / "model.safetensors").is_file():
        pytest.skip("no shared/models/stories260K")
    return path


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[str]]:
    """Run a Python script on two CPU processes that train as one; fail with what both of them said.

    The script gets the remaining arguments as ``sys.argv[1:]`` and ends with
    ``ila.runs.processes.leave_process_group()``, as every distributed script should.
    """

    def launch(script: str, *arguments: object, timeout: float = 240.0) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            "ACCELERATE_USE_CPU": "true",  # what `accelerate launch --cpu` sets
        }
        command = [sys.executable, "-c", script, *map(str, arguments)]
        with ExitStack() as stack:
            ranks = []
            for rank in range(2):
                said = stack.enter_context((tmp_path / f"rank-{rank}.log").open("w+"))
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen(
                    command, env=shared | own, stdout=said, stderr=subprocess.STDOUT
                )
                stack.callback(process.wait)
                stack.callback(process.kill)
                ranks.append((process, said))
            deadline = time.monotonic() + timeout
            while any(process.poll() is None for process, _ in ranks):
                failed = any(process.poll() not in (None, 0) for process, _ in ranks)
                if failed or time.monotonic() > deadline:
                    time.sleep(1.0)  # the other one may still say why
                    break
                time.sleep(0.05)
            codes = [process.poll() for process, _ in ranks]
            texts = []
            for _, said in ranks:
                said.seek(0)
                texts.append(said.read())
            assert codes == [0, 0], f"exit codes {codes} (None: still running)\n" + "\n".join(texts)
        return texts

    return launch


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record, in their order, the flushes and renames of this process as (what, path)."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        events.append(("flush", f"{status.st_dev}:{status.st_ino}"))

    def recording_replace(source: os.PathLike, target: os.PathLike, **options: object) -> None:
        replace(source, target, **options)
        events.append(("rename", os.fspath(target)))

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    return events


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random Llama of two blocks and a tokenizer of words and digits; return the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789:.,?+=-_"
    vocabulary = {word: index for index, word in enumerate([*special, "User", "Assistant"])}
    for letter in letters:
        vocabulary[letter] = len(vocabulary)
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return folder
