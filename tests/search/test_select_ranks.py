"""One run with a selection on two processes, DDP and FSDP2: the masks and losses of one process."""

import json
import runpy
from pathlib import Path

import pytest

import ila
from tests.search.test_fsdp import FSDP, FSDP_ON_CPUS

TESTS = Path(__file__).parent
JOB = TESTS / "select_ranks_job.py"


@pytest.fixture
def run_two(run_ranks, tiny_model_folder, tmp_path):
    """Return what both processes found, once the two agree on every bit."""

    def run(training_args, before=""):
        arguments = (TESTS, tiny_model_folder, tmp_path / "two", 2, json.dumps(training_args))
        run_ranks(before + JOB.read_text("utf-8"), *arguments, timeout=480.0)
        two, other = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
        assert two == other
        return two

    return run


def check_selected(two, tiny_model_folder, out, training_args):
    """Assert what holds however the processes share the work; return the tools of the job."""
    tools, job = runpy.run_path(str(TESTS / "ranks_job.py")), runpy.run_path(str(JOB))
    for name, (closed, method) in job["KINDS"].items():
        found = two[name]
        assert len(found["open"]) == 4
        if method == "gate_gradient":  # path draws rows by their number on one process
            options = {"closed": closed, "method": method}
            arguments = (tools, tiny_model_folder, out / name, 4, training_args)
            expected = job["one_run"](*arguments, **options)
            assert found["open"] == expected["open"]
            tools["check_training"](found, expected)
        again = [n for n in two if n.startswith("resumed-") and n.endswith(name)]
        assert len(again) == len(job["BREAKS"])
        for resumed in again:
            differ = {k for k, v in two[resumed].items() if v != found[k]}
            assert not differ, resumed
        check_moments(found, closed)
    return tools, job


def check_moments(found, closed):
    """Assert that the moments of open layers went on, and that no others are there."""
    moments, opened = found["moments"], tuple(f"{name}." for name in found["open"])
    assert len(moments["left"]) == 28 and moments["states"] == 2 * len(found["open"])
    kept = {n: norm for n, norm in moments["left"].items() if n.startswith(opened)}
    assert moments["found"] == kept and len(kept) == 8 and min(kept.values()) > 0
    assert len(found["saved"]) == (28 if closed == "keep" else 8)


@pytest.mark.parametrize("clipping", [0.01, 0.0], ids=["clipped", "not clipped"])
def test_two_processes_of_ddp_select_as_one(run_two, tiny_model_folder, tmp_path, clipping):
    options = {"max_grad_norm": clipping}
    two = run_two(options)
    assert two["refused"] is None  # `SelectLayers` runs there
    _, job = check_selected(two, tiny_model_folder, tmp_path, options)
    for name in job["KINDS"]:
        # All layers before the switch, the open ones alone after it.
        adapters, open_only = 928, two[name]["trainable_parameters"]
        assert open_only < 0.4 * adapters
        assert two[name]["synchronised"] == [adapters] * 3 + [open_only] * 3


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_two_processes_of_fsdp_select_as_one(run_two, tiny_model_folder, tmp_path, kind):
    config = FSDP["fsdp_config"] | {"state_dict_type": kind}
    two = run_two(FSDP | {"fsdp_config": config}, FSDP_ON_CPUS)
    tools, job = check_selected(two, tiny_model_folder, tmp_path, {})
    for name, (closed, _) in job["KINDS"].items():
        found, model = two[name], tools["make_model"](tiny_model_folder)
        assert found["synchronised"] == []  # it was not DDP
        everything, beside = job["blocks_of"](model)
        mask = ila.LayerMask(found["scores"]).top(0.3)
        ila.apply_mask(model, mask, closed=closed)
        after, _ = job["blocks_of"](model)
        assert min(after) > beside and (after == everything) == (closed == "keep")
        assert len(found["shards"]) == job["STEPS"]
        for step, traffic in enumerate(found["shards"], 1):
            is_before, blocks = (
                step <= job["SWITCH"],
                {n for n in traffic["gathered"] if n > beside},
            )
            assert blocks == set(everything if is_before else after)
            # Gradients of all adapters before the switch, of the open ones alone after it.
            assert sum(traffic["reduced"]) == (928 if is_before else found["trainable_parameters"])
    assert "SelectLayers closes layers in one process, and under DDP" in two["refused"]
    assert "cache_prefix must be off in a run with a selection under FSDP" in two["refused cache"]
    check_reopened(two["reopened"], everything, after)


def check_reopened(found, everything, dropped):
    """Assert that layers which are closed and opened again are gathered when they are there."""
    for name in ("kept", "opened", "restored"):
        assert found[name]["gathered"] == found["all"]["gathered"]
        assert found[name]["loss"] == pytest.approx(found["all"]["loss"], rel=1e-6)
    assert set(everything) <= set(found["all"]["gathered"])
    for name in ("dropped", "dropped again"):
        assert set(dropped) <= set(found[name]["gathered"])
        assert set(everything).isdisjoint(found[name]["gathered"])
        assert abs(found[name]["loss"] - found["all"]["loss"]) > 1e-3
