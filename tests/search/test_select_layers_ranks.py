"""``SelectLayers`` on two processes of DDP: the bits of a Trainer that is started again."""

import json
from pathlib import Path

TESTS = Path(__file__).parent
JOB = TESTS / "callback_ranks_job.py"
ADAPTERS, BLOCK = 928, 464  # parameters of all adapters, and of those in one of two blocks


def test_two_processes_select_in_place(run_ranks, tiny_model_folder, tmp_path):
    run_ranks(JOB.read_text("utf-8"), TESTS, tiny_model_folder, tmp_path / "two", timeout=480.0)
    two, other = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert two == other  # masks, losses and weights: the same bits on both
    for clipping in (0.01, 0.0):
        without = two[f"{clipping} all"]
        assert without["synchronised"] == [ADAPTERS] * 6
        if clipping:
            assert min(without["norms"]) > clipping  # it clips every step
        for closed in ("keep", "drop"):
            check(two, f"{clipping} {closed}", without)
    # Two batches a step: one synchronisation, before and after the switch.
    accumulated = two["accumulated"]
    assert accumulated["synchronised"][:3] == [ADAPTERS] * 3
    assert set(accumulated["synchronised"][3:]) == {accumulated["trained"]}


def check(two, name, without):
    chosen, again = two[f"{name} callback"], two[f"{name} again"]
    assert all(".layers.1." in each for each in chosen["open"]) and len(chosen["open"]) == 7
    assert chosen["open"] == again["open"]
    # All layers before the switch, the open ones alone after it.
    assert chosen["synchronised"] == [ADAPTERS] * 3 + [BLOCK] * 3 == again["synchronised"]
    # Before it, a run without it; after it, a Trainer that loads the checkpoint of the switch.
    assert chosen["losses"][:3] == without["losses"][:3]
    assert chosen["losses"] == again["losses"] and chosen["losses"] != without["losses"]
    assert chosen["bits"] == again["bits"] == two[f"{name} resumed"]["bits"]
    assert two[f"{name} resumed"]["losses"] == chosen["losses"]
    assert two[f"{name} resumed"]["synchronised"] == [BLOCK] * 2
    assert chosen["states"] == two[f"{name} resumed"]["states"] == 14
    scored = two[f"{name} scored"]
    assert len(scored["open"]) == 4 and len(set(scored["scores"].values())) == 14
    assert scored["states"] == 8
    assert scored["synchronised"] == [ADAPTERS] * 3 + [scored["trained"]] * 3
