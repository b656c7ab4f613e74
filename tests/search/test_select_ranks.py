"""One run with a selection on two processes (DDP): the masks and losses of one process."""

import json
import runpy
from pathlib import Path

TESTS = Path(__file__).parent
JOB = TESTS / "select_ranks_job.py"
KINDS = {"keep-gate_gradient": ("keep", "gate_gradient"), "drop-path": ("drop", "path")}


def test_two_processes_select_as_one(run_ranks, tiny_model_folder, tmp_path):
    run_ranks(JOB.read_text("utf-8"), TESTS, tiny_model_folder, tmp_path / "two", 2, "{}")
    two, other = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert two == other  # the same bits on both
    assert "SelectLayers closes layers of one process" in two["refused"]

    tools = runpy.run_path(str(TESTS / "ranks_job.py"))
    job = runpy.run_path(str(JOB))
    for name, (closed, method) in KINDS.items():
        found = two[name]
        assert len(found["open"]) == 4
        if method == "gate_gradient":  # path draws rows by their number on one process
            out = tmp_path / name
            options = {"closed": closed, "method": method}
            expected = job["one_run"](tools, tiny_model_folder, out, 4, {}, **options)
            assert found["open"] == expected["open"]
            tools["check_training"](found, expected)
        for again in (n for n in two if n.startswith("resumed-") and n.endswith(name)):
            assert two[again] == {k: v for k, v in found.items() if k != "synchronised"}
        # All layers before the switch, the open ones alone after it.
        adapters, open_only = 928, found["trainable_parameters"]
        assert open_only < 0.4 * adapters
        assert found["synchronised"] == [adapters] * 3 + [open_only] * 3
