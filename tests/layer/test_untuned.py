"""What `attach` and `explain` do with the measurements of a GPU, on a machine that has none."""

import logging

import pytest
import torch
from torch import distributed

import ila
from ila.models import explain as explaining
from ila.models import untuned
from ila_kernels import config, use_verdicts, verdicts_in_use
from ila_kernels.device import call_on
from ila_kernels.verdict import Cell, Machine, Verdict

GPU = torch.device("cuda", 0)
MACHINE = Machine("a GPU", "12080", "12.8", "2.13.0", "3.9.0", "0.1")
CELL = Cell(2048, 32, (32,), 4, "float64", "float64", False)
LINE = (
    "Library GEMMs compute 12 layers: no measurement on a GPU yet; `ila tune --model MODEL` takes "
    "one and keeps it"
)


def verdict(hybrid: float, dtype: str = "float64") -> Verdict:
    cell = Cell(2048, 32, (32,), 4, dtype, dtype, False)
    return Verdict(MACHINE, cell, {"eager": (1.0,) * 7, "hybrid": (hybrid,) * 7}, "2026-01-31")


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Let `attach` take the tensors for tensors on a GPU that has no verdicts."""
    monkeypatch.setattr(untuned, "_device_of", lambda layers: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(untuned, "_said", set())
    use_verdicts([])
    yield
    use_verdicts([])


@pytest.fixture
def kept(monkeypatch):
    """Verdicts that an earlier process kept; how often they were read."""
    found, reads = [], []

    def read(*, device):
        reads.append(device)
        return use_verdicts(found)

    monkeypatch.setattr(untuned, "use_verdicts", read)
    return found, reads


def test_attach_on_an_untuned_gpu_says_one_line_with_the_command(tiny, kept, caplog):
    for _ in range(2):
        tiny.attached(tiny.config())
    assert [record.message for record in caplog.records] == [LINE]
    assert caplog.records[0].levelno == logging.WARNING


def test_the_command_names_the_model(tiny, kept, caplog):
    base = tiny.base()
    base.config._name_or_path = "a/model"
    tiny.attached(tiny.config(), base)
    assert "`ila tune --model a/model`" in caplog.text


def test_attach_reads_what_was_kept_and_is_silent(tiny, kept, caplog):
    found, reads = kept
    found.append(verdict(0.5))
    tiny.attached(tiny.config())
    assert verdicts_in_use().all == tuple(found) and reads == [GPU]
    tiny.attached(tiny.config())
    assert reads == [GPU] and not caplog.records


def test_attach_leaves_what_is_in_use(tiny, kept):
    use_verdicts([verdict(0.5)])
    tiny.attached(tiny.config())
    assert kept[1] == [] and verdicts_in_use().all == (verdict(0.5),)


@pytest.mark.parametrize("partners", ["is_initialized", "is_torchelastic_launched"])
def test_processes_that_train_together_read_when_training_begins(
    tiny, kept, caplog, monkeypatch, partners
):
    monkeypatch.setattr(distributed, partners, lambda: True)
    tiny.attached(tiny.config())
    assert kept[1] == [] and not caplog.records


def test_a_model_on_a_cpu_asks_for_nothing(tiny, kept, caplog, monkeypatch):
    monkeypatch.setattr(untuned, "_device_of", lambda layers: torch.device("cpu"))
    tiny.attached(tiny.config())
    assert kept[1] == [] and not caplog.records


def test_explain_quotes_the_measurement(tiny, monkeypatch):
    """A layer of the shape that was measured says so; one of another shape says the opposite."""
    monkeypatch.setattr(config, "has_triton", lambda: True)
    monkeypatch.setattr(
        explaining,
        "call_of",
        lambda weights, lora_as, m, dtype, p: call_on("a GPU", weights, lora_as, m, dtype, p),
    )
    resolve = config.resolve_impl
    monkeypatch.setattr(
        explaining, "resolve_impl", lambda impl, _, call: resolve(impl, "cuda", call)
    )
    model = tiny.attached(tiny.config(), tiny.base(dtype=torch.float32))
    use_verdicts([verdict(0.5, "float32")])
    rows = {row.module.rpartition(".")[2]: row for row in ila.explain(model, tokens=2048)}
    assert rows["q_proj"].path == "hybrid"
    assert rows["q_proj"].why.endswith(
        "auto: measured on 2026-01-31, 32 → 32 at 2048 rows: 0.50 of eager's time, faster in 7 of "
        "7 rounds"
    )
    assert rows["down_proj"].path == "eager"
    assert "not measured on a GPU yet, as ila_kernels.tune() does" in rows["down_proj"].why
