"""The steps of `make gpu-day` that launch kernels, on a GPU or emulated."""

import json
import sys

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import steps
from ila_kernels import measuring, store, tuning, use_verdicts
from ila_kernels.kernels import selfcheck
from ila_kernels.verdict import Machine

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
MACHINE = Machine("a GPU", "1", "1", "1", "1", "1")


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    for module in (measuring, tuning):
        monkeypatch.setattr(module, "machine_of", lambda device: MACHINE)
    monkeypatch.setattr(store, "folder_of", lambda machine: tmp_path / "cache")
    monkeypatch.setattr(measuring, "WARM_UPS", 1)
    if "ttsem" in sys.modules:  # there is no driver to ask for a name
        monkeypatch.setattr(steps, "environment", lambda device: {"device": "cuda"})
    yield
    use_verdicts([])


@pytest.fixture
def broken(monkeypatch):
    """A self-check that finds the persistent form wrong."""
    check = selfcheck.check

    def failing(device):
        if selfcheck.preference().gemm == "persistent":
            raise RuntimeError("the Triton kernels compute wrong results")
        check(device)

    monkeypatch.setattr(selfcheck, "check", failing)


def test_the_self_check_writes_each_form(tmp_path):
    assert steps.self_check(tmp_path, GPU) == 0
    forms = json.loads((tmp_path / "selfcheck-gpu.json").read_text())["forms"]
    assert {name: form["right"] for name, form in forms.items()} == {
        "pointer": True,
        "persistent": True,
    }


def test_a_form_that_is_wrong_fails_the_step_and_is_named(tmp_path, broken):
    assert steps.self_check(tmp_path, GPU) == 1
    forms = json.loads((tmp_path / "selfcheck-gpu.json").read_text())["forms"]
    assert forms["pointer"]["right"]
    why = "RuntimeError: the Triton kernels compute wrong results"
    assert forms["persistent"]["why"] == why


def test_every_implementation_is_measured_and_becomes_a_row(tmp_path):
    kinds = [((72, (136,)), 80), ((72, (136, 72)), 80)]
    options = {"timer": lambda step: 1.0, "dtype": torch.float16}
    assert steps.choose(tmp_path, GPU, kinds, **options) == 0
    found = json.loads((tmp_path / "choice-gpu.json").read_text())
    assert [verdict["cell"]["ns"] for verdict in found["verdicts"]] == [[136], [136, 72]]
    for verdict in found["verdicts"]:
        assert {"eager", "hybrid", "triton"} <= set(verdict["ms"])
