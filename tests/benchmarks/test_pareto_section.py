"""The study's section on budgets, from a small result."""

from benchmarks.sections import pareto


def result() -> dict:
    steps = {
        "all layers": {"seen": True},
        "random 0": {"seen": False},
    }
    where = {"rows": 4, "length": 192, "dtype": "bfloat16", "device": "cpu", "threads": 2}
    row = {"importance": 1.0, "open": []}
    return {
        "options": {"model": "m", "data": "d.jsonl", "steps": 60, "seeds": 2, "rounds": 7},
        "speed": {"measured": {**where, "steps": steps}},
        "prediction": {"correlation": 0.99, "worst_error": 0.04},
        "curves": {"frontier": [[0.4, 0.1], [1.0, 1.0]], "plain": [[0.6, 0.1], [1.0, 1.0]]},
        "contestants": {
            "all layers": {**row, "layers": 9, "time": 1.0, "importance_share": 1.0},
            "top 0.3": {**row, "layers": 3, "time": 0.8, "importance_share": 0.5},
            "as top 0.3": {**row, "layers": 7, "time": 0.8, "importance_share": 0.75},
        },
        "busy": {"busy": False, "spread": 1.02},
        "step_ms": {"all layers": 200.0, "top 0.3": 161.0, "as top 0.3": 159.0},
        "trained": {
            "all-layers-seed-0": {"held_out_loss": 0.9},
            "as-top-0.3-seed-0": {"held_out_loss": 0.91},
            "as-top-0.3-seed-1": {"held_out_loss": 0.93},
            "top-0.3-seed-0": {"held_out_loss": 0.95},
            "all-layers-in-the-time-of-as-top-0.3-seed-0": {"held_out_loss": 0.94},
        },
    }


def test_nothing_measured_is_nothing_said():
    assert pareto.markdown({}) == [] and pareto.figures({}) == {}


def test_each_contestant_has_its_own_losses():
    table = pareto.markdown({"budget": result()})[-2].splitlines()
    assert table[2:] == [
        "| all layers | 9 | 100% | 1.000 | 1.000 | 60 | 0.9000 |",
        "| plain top 30% | 3 | 50% | 0.800 | 0.805 | 60 | 0.9500 |",
        "| budget of the top 30% | 7 | 75% | 0.800 | 0.795 | 60 | 0.9200 ± 0.0141 |",
        "| all layers, in the time of budget of the top 30% | 9 | 100% | 1 | 1 | 48 | 0.9400 |",
    ]


def test_the_figure_is_a_whole_png(tmp_path):
    ((name, draw),) = pareto.figures({"budget": result()}).items()
    draw(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_budgets_are_compared_with_their_rivals_seed_by_seed():
    (sentence,) = pareto.comparisons(result())
    assert sentence == (
        "- Budget of the top 30%, whose step took 0.99 of the plain one's: held-out loss "
        "-0.0400 (seed 0) against the plain top 30% and -0.0300 (seed 0) against all layers in "
        "its time."
    )


def test_without_a_rival_nothing_is_compared():
    lone = result()
    lone["trained"] = {"as-top-0.3-seed-0": {"held_out_loss": 0.91}}
    assert pareto.comparisons(lone) == []
