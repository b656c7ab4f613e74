"""Two processes with half the batch each are one process with all of it: losses, scores, masks.

In fp32 within 1e-5: the same sums, added in another order.
"""

import json
import runpy
from pathlib import Path

import pytest

import ila

JOB = Path(__file__).with_name("ranks_job.py")
METHODS = ["path", "ila", "gate_gradient"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def job():
    return runpy.run_path(str(JOB))


def close(found, expected):
    """Compare numbers of one kind; what cancels to nearly nothing is held to the largest."""
    largest = max(map(abs, expected))
    return found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE * largest)


def check_search(found, expected):
    assert close(found["losses"], expected["losses"])
    assert close(found["norms"], expected["norms"])
    for kind in ("scores", "signal"):
        assert list(found[kind]) == list(expected[kind])
        assert close(list(found[kind].values()), list(expected[kind].values()))
    masks = [ila.LayerMask(result["scores"]).top(0.3) for result in (found, expected)]
    assert masks[0].open == masks[1].open


def check_training(found, expected):
    steps, losses = zip(*found["losses"], strict=True)
    steps_expected, losses_expected = zip(*expected["losses"], strict=True)
    assert steps == steps_expected
    assert close(losses, losses_expected)
    for name in ("held_out_loss", "held_out_loss_before"):
        assert close([found[name]], [expected[name]])
    for name in ("steps", "tokens_per_step", "trainable_parameters"):
        assert found[name] == expected[name]


def test_two_processes_search_and_train_as_one(job, run_ranks, tiny_model_folder, tmp_path):
    options = (2, json.dumps(METHODS), "{}")
    said = run_ranks(JOB.read_text("utf-8"), tiny_model_folder, tmp_path / "two", *options)
    assert not any("find_unused_parameters" in text for text in said)
    two, other = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert two == other  # the same bits on both

    assert "holds another run" in two["refused"]

    # Each step reduces what is trained and nothing else, once.
    adapters, layers = 928, 14
    for method, stage2 in (("path", 5), ("ila", 5), ("gate_gradient", 0)):
        assert two[method]["synchronised"] == [adapters] * 4 + [layers] * stage2
    for kind in ("train", "again"):
        open_only = two[kind]["trainable_parameters"]
        assert 0 < open_only < 0.4 * adapters
        assert two[kind]["synchronised"] == [open_only] * 6

    folder, one = tiny_model_folder, tmp_path / "one"
    for method in METHODS:
        _, expected = job["search"](folder, one / method, 4, method, {})
        check_search(two[method], expected)
    model = job["selected"](folder, two["path"]["scores"])
    expected = job["train_selected"](model, one / "train", 4, {})
    check_training(two["train"], expected)
    adapter = "train/adapter_model.safetensors"
    assert (tmp_path / "two" / adapter).stat().st_size == (one / adapter).stat().st_size
