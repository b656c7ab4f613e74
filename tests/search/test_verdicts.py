"""A run keeps the verdicts by which ``impl="auto"`` chooses, and a resumed run takes its own."""

from dataclasses import replace

import pytest
import torch
from transformers import Trainer

from ila.models import untuned
from ila.price.choice import Choice
from ila.runs.metrics import load_run
from ila.search.one_run import train_and_select
from ila.search.selection import Selection
from ila.training import verdicts
from ila.training.config import TrainConfig
from ila.training.train import train
from ila.training.verdicts import FILE, settle_verdicts
from ila_kernels import use_verdicts, verdicts_in_use
from ila_kernels.verdict import Cell, Machine, Verdict

MACHINE = Machine("a GPU", "12080", "12.8", "2.13.0", "3.9.0", "0.1")
CELL = Cell(2048, 16, (16,), 2, "float32", "float32", True)
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def verdict(hybrid: float, **machine) -> Verdict:
    ms = {"eager": (1.0,) * 7, "hybrid": (hybrid,) * 7}
    return Verdict(replace(MACHINE, **machine), CELL, ms, "2026-01-31")


FIRST, LATER = verdict(0.5), verdict(2.0)
CONFIG = TrainConfig(steps=4, batch_size=2, learning_rate=1e-2, save_every=2)


@pytest.fixture(autouse=True)
def nothing_in_use():
    yield
    use_verdicts([])


def seen_by_steps(monkeypatch) -> list[tuple[Verdict, ...]]:
    """What is in use in every training step from here on."""
    seen, step = [], Trainer.training_step

    def spy(*args, **kwargs):
        seen.append(verdicts_in_use().all)
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", spy)
    return seen


@pytest.mark.parametrize("call", [1, 2, 4])  # before the first checkpoint, and after it
def test_a_resumed_run_chooses_by_what_it_began_with(
    make_llama, rows, tmp_path, break_off, killed, monkeypatch, caplog, call
):
    options = {"output_dir": tmp_path / "run", "progress": False}
    use_verdicts([FIRST])
    break_off(Trainer, "training_step", call)
    with pytest.raises(killed):
        train(make_llama(), rows, CONFIG, **options)
    use_verdicts([LATER])  # measured meanwhile
    seen = seen_by_steps(monkeypatch)
    metrics = train(make_llama(), rows, CONFIG, resume=True, **options)
    assert seen and all(use == (FIRST,) for use in seen)
    assert metrics["verdicts"] == [FIRST.to_json()]
    assert load_run(tmp_path / "run") == metrics
    said = [r.message for r in caplog.records if r.name == verdicts.__name__]
    assert said == [
        "The run goes on with the 1 measurements of kernels that it began with; the 1 that this "
        "machine has now are left alone"
    ]


def test_both_halves_of_one_run_choose_alike(
    make_llama, rows, tmp_path, break_off, killed, monkeypatch
):
    arguments = (rows, replace(CONFIG, steps=6), Selection(Choice(top=0.5), at=0.5))
    options = {"output_dir": tmp_path / "run", "progress": False}
    use_verdicts([FIRST])
    break_off(Trainer, "training_step", 5)  # in the second half
    with pytest.raises(killed):
        train_and_select(make_llama(), *arguments, **options)
    use_verdicts([])
    seen = seen_by_steps(monkeypatch)
    train_and_select(make_llama(), *arguments, resume=True, **options)
    assert seen and all(use == (FIRST,) for use in seen)


def test_a_run_on_a_cpu_that_measured_nothing_writes_no_file(make_llama, rows, tmp_path, caplog):
    metrics = train(make_llama(), rows, CONFIG, output_dir=tmp_path / "run", progress=False)
    assert metrics["verdicts"] == []
    assert not (tmp_path / "run" / FILE).exists() and not caplog.records


def test_an_untuned_gpu_is_said_once_and_stays_untuned_for_the_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(untuned, "_said", set())
    settle_verdicts(GPU, tmp_path)
    assert [r.message for r in caplog.records] == [
        "Library GEMMs compute the layers: no measurement on a GPU yet; `ila tune --model MODEL` "
        "takes one and keeps it"
    ]
    use_verdicts([FIRST])
    settle_verdicts(GPU, tmp_path)
    assert verdicts_in_use().all == ()
    assert "goes on with the 0 measurements" in caplog.records[1].message


def test_the_cache_is_read_where_nothing_is_in_use(tmp_path, monkeypatch, caplog):
    read = []

    def cached(given=None):
        read.append(given)
        return use_verdicts([FIRST] if given is None else given)

    monkeypatch.setattr(verdicts, "use_verdicts", cached)
    settle_verdicts(GPU, tmp_path)
    assert read == [None] and verdicts_in_use().all == (FIRST,)
    # The same choice from other milliseconds is nothing to say.
    use_verdicts([verdict(0.6)])
    settle_verdicts(GPU, tmp_path)
    assert verdicts_in_use().all == (FIRST,) and not caplog.records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('{"verdicts": 5}', "verdicts must be a list"),
        ('{"verdicts": [{}]}', "format must be"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, content, message):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        settle_verdicts(CPU, tmp_path)
    assert str(tmp_path / FILE) in str(raised.value)
