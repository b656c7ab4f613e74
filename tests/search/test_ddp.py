"""Two processes with half the batch each are one process with all of it: losses, scores, masks."""

import json
import runpy
from pathlib import Path

JOB = Path(__file__).with_name("ranks_job.py")
METHODS = ["path", "ila", "gate_gradient"]


def test_two_processes_search_and_train_as_one(run_ranks, tiny_model_folder, tmp_path):
    options = (2, json.dumps(METHODS), "{}")
    said = run_ranks(JOB.read_text("utf-8"), tiny_model_folder, tmp_path / "two", *options)
    assert not any("find_unused_parameters" in text for text in said)
    two, other = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert two == other  # the same bits on both
    assert "holds a run already" in two["refused"]

    # Each step reduces what is trained, once, and nothing else: no layer that is closed.
    adapters, layers = 928, 14
    for method, stage2 in (("path", 5), ("ila", 5), ("gate_gradient", 0)):
        assert two[method]["synchronised"] == [adapters] * 4 + [layers] * stage2
    for kind in ("train", "again"):
        open_only = two[kind]["trainable_parameters"]
        assert 0 < open_only < 0.4 * adapters
        assert two[kind]["synchronised"] == [open_only] * 6

    job = runpy.run_path(str(JOB))
    job["check_resumed"](two)
    job["check_as_one"](two, tiny_model_folder, tmp_path / "one")
