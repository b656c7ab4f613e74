"""``tune`` on the kernels themselves, with a clock that stands still: every candidate is right."""

import sys

import pytest
import torch

pytest.importorskip("triton.tools.tensor_descriptor")

from ila_kernels import eager, measuring, store, tune, tuning, use_verdicts
from ila_kernels.kernels import lowrank_gemm
from ila_kernels.kernels.launch import Launch
from ila_kernels.verdict import CANDIDATES, Machine

pytestmark = pytest.mark.gpu

EMULATED = "ttsem" in sys.modules
MACHINE = Machine("a GPU", "1", "1", "1", "1", "1")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    for module in (measuring, tuning):
        monkeypatch.setattr(module, "machine_of", lambda device: MACHINE)
    monkeypatch.setattr(store, "folder_of", lambda machine: tmp_path)
    if EMULATED:  # a target whose persistent form has a tile
        for module in (measuring, lowrank_gemm):
            monkeypatch.setattr(module, "target_of", lambda x: "sm_90")
        monkeypatch.setattr(lowrank_gemm, "multiprocessors", lambda index: 2)
        # Eager's mask comes from a generator of the device, which is not emulated.
        ones = torch.ones
        monkeypatch.setattr(eager, "keep_mask", lambda _, m, k, *__: ones(m, k, dtype=torch.bool))
    yield
    use_verdicts([])


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="tensor descriptors are for sm_90 and newer",
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("n", [136, (136, 72)])
def test_every_candidate_runs_by_its_own_path(n, dropout_p, monkeypatch):
    forms: dict[str, set[bool]] = {}
    current, run = [""], Launch.run

    def spy(launch):
        if "PERSISTENT" in launch.arguments:
            forms.setdefault(current[0], set()).add(launch.arguments["PERSISTENT"])
        run(launch)

    def timer(step):
        (current[0],) = step.args
        monkeypatch.setattr(Launch, "run", spy)
        if current[0] not in forms:  # once is enough; the other rounds stand still
            forms[current[0]] = set()
            step()
        monkeypatch.setattr(Launch, "run", run)
        return 1.0

    monkeypatch.setattr(measuring, "WARM_UPS", 1)
    options = {"rank": 4, "rows": [80], "dtype": torch.float16, "dropout_p": dropout_p}
    tuned = tune([(72, n)], **options, device="cuda", timer=timer)
    assert tuned.skipped == {}
    (verdict,) = tuned.verdicts
    assert verdict.left_out == {}
    assert set(verdict.ms) == set(CANDIDATES)
    assert forms["eager"] == set()
    assert forms["hybrid"] == ({False} if dropout_p else set())  # the mask, without its GEMM
    assert forms["triton"] == {False}
    assert forms["persistent"] == {True}


def test_unaligned_rows_leave_the_persistent_form_out(monkeypatch):
    monkeypatch.setattr(measuring, "WARM_UPS", 1)
    options = {"rank": 4, "rows": [80], "dtype": torch.float16, "device": "cuda"}
    (verdict,) = tune([(70, 136)], **options, timer=lambda step: 1.0).verdicts
    assert "no multiple of 16" in verdict.left_out["persistent"]
    assert set(verdict.ms) == {"eager", "hybrid", "triton"}
