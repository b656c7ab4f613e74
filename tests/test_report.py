"""What the pictures and tables say is what the masks and runs hold."""

import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ila.masks.agreement import compare_table
from ila.masks.mask import LayerMask, chance_jaccard
from ila.masks.names import KINDS
from ila.reports.figures import draw_runs, heatmap, heatmap_figure, runs_figure
from ila.reports.tables import render_compare, runs_markdown, runs_table
from ila.runs.metrics import load_run

matplotlib = pytest.importorskip("matplotlib")
FigureCanvasAgg = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg

PNG = b"\x89PNG\r\n\x1a\n"


def llama(blocks, seed=0):
    generator = np.random.default_rng(seed)
    names = [
        f"base_model.model.model.layers.{block}.{'self_attn' if i < 4 else 'mlp'}.{kind}"
        for block in range(blocks)
        for i, kind in enumerate(KINDS)
    ]
    generator.shuffle(names)  # the picture must not depend on the order of the scores
    return LayerMask({name: float(generator.random()) for name in names})


def metrics(**changes):
    run = {
        "name": "all",
        "open_modules": 210,
        "total_modules": 210,
        "fraction_open": 1.0,
        "trainable_parameters": 4_000_000,
        "steps": 3,
        "held_out_loss_before": 3.0,
        "held_out_loss": 2.0,
        "step_time_ms": {"median": 100.0, "p10": 90.0, "p90": 120.0},
        "peak_memory_bytes": 4 * 2**30,
        "tokens_per_step": 4096.0,
        "losses": [[1, 3.0], [2, 2.5], [3, 2.0]],
        "device": "cpu",
        "dtype": "float32",
    }
    return run | changes


def some():
    return metrics(
        name="some [bold]| $x$",
        open_modules=63,
        fraction_open=0.3,
        trainable_parameters=1_000_000,
        held_out_loss=2.1,
        step_time_ms={"median": 50.0, "p10": 40.0, "p90": 60.0},
        peak_memory_bytes=None,
    )


def printed(table, width=200):
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def texts(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


@pytest.mark.parametrize("blocks", [1, 5, 30])
def test_heatmap_puts_every_score_in_its_cell(blocks):
    mask = llama(blocks).top(0.3)
    axes, bar = heatmap_figure(mask).axes
    grid = axes.images[0].get_array()
    assert grid.shape == (blocks, 7) and texts(axes) == list(KINDS)
    for name, score in mask.scores.items():
        block, kind = int(name.split(".")[4]), name.split(".")[-1]
        assert grid[block, KINDS.index(kind)] == score
    assert [label.get_text() for label in axes.get_yticklabels()] == list(map(str, range(blocks)))
    low, high = axes.get_ylim()
    assert low < high  # block 0 is at the bottom
    assert "Block" in axes.get_ylabel() and "Kind" in axes.get_xlabel()
    assert "Score" in bar.get_ylabel()


def test_heatmap_hatches_exactly_the_closed_layers():
    mask = llama(5).top(0.3)
    axes = heatmap_figure(mask).axes[0]
    hatched = {
        f"{int(patch.get_y() + 0.5)} {KINDS[int(patch.get_x() + 0.5)]}"
        for patch in axes.patches
        if patch.get_hatch()
    }
    assert hatched == {f"{n.split('.')[4]} {n.split('.')[-1]}" for n in mask.closed}
    assert not heatmap_figure(llama(5)).axes[0].patches


def test_heatmap_explains_itself():
    mask = LayerMask({"layers.0.q_proj": 1.0, "layers.0.k_proj": 3.0}).top(0.5)
    figure = heatmap_figure(mask)
    assert figure.axes[0].get_title() == (
        "1 of 2 layers open; scores 1 to 3, mean 2, standard deviation 1"
    )
    assert "Importance" in figure.get_suptitle()
    assert heatmap_figure(mask, title="a$b$").get_suptitle() == "a$b$"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any("open" in text for text in legend) and any("closed" in text for text in legend)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["h.0.mlp.c_proj", "h.0.attn.c_proj"], ["attn.c_proj", "mlp.c_proj"]),
        (["lm_head", "layers.0.up_proj"], ["up_proj", "lm_head"]),
        (["layers.0.e.0.w1", "layers.0.e.1.w1"], ["0.w1", "1.w1"]),
        (["v.layers.0.q_proj", "t.layers.0.q_proj"], ["t.layers.*.q_proj", "v.layers.*.q_proj"]),
        (["layers.0.q_proj", "a.layers.0.q_proj"], ["a.layers.*.q_proj", "layers.*.q_proj"]),
        (["layers.0.zzz", "layers.0.down_proj"], ["down_proj", "zzz"]),
    ],
)
def test_no_two_modules_share_a_cell(names, columns):
    figure = heatmap_figure(LayerMask({name: i for i, name in enumerate(names)}))
    grid = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    assert texts(figure.axes[0]) == columns
    assert sorted(grid[np.isfinite(grid)]) == list(range(len(names)))


@pytest.mark.parametrize("score", [0.0, 1.0, -3.0, 1e-30, 1e30])
def test_equal_scores_are_drawn_without_complaint(tmp_path, score):
    mask = LayerMask({"layers.0.q_proj": score, "layers.1.q_proj": score})
    heatmap(mask, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def overlapping(figure):
    """Pairs of visible texts whose boxes overlap, and texts that stick out of the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    found = figure.findobj(lambda a: isinstance(a, matplotlib.text.Text) and a.get_text().strip())
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in found if t.get_visible()]
    inside = figure.bbox.padded(1)
    bad = [text for text, box in boxes if not inside.containsx(box.x0) or box.x1 > inside.x1]
    for i, (text, box) in enumerate(boxes):
        bad += [
            (text, other) for other, b in boxes[i + 1 :] if box.padded(-1).overlaps(b.padded(-1))
        ]
    return bad


@pytest.mark.parametrize("blocks", [1, 5, 30, 80])
def test_no_text_of_the_heatmap_overlaps_another(blocks):
    assert overlapping(heatmap_figure(llama(blocks).top(0.3))) == []


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_no_text_of_the_runs_overlaps_another(count):
    runs = [metrics(name="n" * 50), *[some() for _ in range(count - 1)]]
    assert overlapping(draw_runs(runs)) == []


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(PNG)
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_saved_pictures_are_large_enough_to_read(tmp_path):
    assert heatmap(llama(30), tmp_path / "a.png") == tmp_path / "a.png"
    assert runs_figure([metrics(), some()], tmp_path / "b.png") == tmp_path / "b.png"
    assert min(png_size(tmp_path / "a.png")) > 1000
    assert min(png_size(tmp_path / "b.png")) > 700


def test_full_disk_keeps_the_old_picture(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")

    def disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        heatmap(llama(1), tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"old"


def test_every_pair_is_compared_once_beside_chance():
    masks = {label: llama(30, seed) for label, seed in (("a", 1), ("b", 2), ("c", 3))}
    masks = {label: LayerMask(dict(sorted(m.scores.items()))) for label, m in masks.items()}
    rows = compare_table(masks)
    assert [(row["a"], row["b"]) for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    for row in rows:
        one, two = masks[row["a"]], masks[row["b"]]
        assert row["modules"] == 210 and row["spearman"] == one.spearman(two)
        assert [top["fraction"] for top in row["top"]] == [0.1, 0.3, 0.5, 0.75]
        assert [top["kept"] for top in row["top"]] == [21, 63, 105, 158]
        for top in row["top"]:
            p = top["fraction"]
            assert top["jaccard"] == one.top(p).jaccard(two.top(p))
            assert top["chance"] == chance_jaccard(p)
    assert json.loads(json.dumps(rows)) == rows


def test_comparison_is_printed_with_chance_and_without_markup():
    constant = LayerMask(dict.fromkeys(llama(1).scores, 1.0))
    rows = compare_table({"[red]a": llama(1), "b": llama(1), "c": constant}, fractions=[0.3])
    text = printed(render_compare(rows))
    assert "[red]a" in text and "and b" in text and "(0.18)" in text and "30 %" in text
    assert rows[1]["spearman"] is None and "none, equal" in text and "nan" not in text
    json.dumps(rows, allow_nan=False)


def test_masks_that_cannot_be_compared_are_named():
    with pytest.raises(ValueError, match="at least two masks to compare, got 1"):
        compare_table({"a": llama(1)})
    with pytest.raises(ValueError, match=r"'a' and 'b' cannot be compared: .* 7 missing"):
        compare_table({"a": llama(2), "b": llama(1)})
    with pytest.raises(ValueError, match="fraction must be in"):
        compare_table({"a": llama(1), "b": llama(1)}, fractions=[0])


def save(folder, run):
    (folder / "metrics.json").write_text(json.dumps(run))


def test_run_is_read_back(tmp_path):
    save(tmp_path, metrics(extra=1))
    assert load_run(tmp_path) == metrics(extra=1)
    unmeasured = metrics(peak_memory_bytes=None, held_out_loss=None, losses=[])
    save(tmp_path, unmeasured)
    assert load_run(str(tmp_path)) == unmeasured


@pytest.mark.parametrize("key", metrics())
def test_missing_and_mistyped_keys_are_named(tmp_path, key):
    run = metrics()
    del run[key]
    save(tmp_path, run)
    with pytest.raises(ValueError, match=rf"metrics\.json: missing {key}$"):
        load_run(tmp_path)
    for wrong in (True, [[1]], math.nan, {"median": 1}):
        save(tmp_path, metrics(**{key: wrong}))
        with pytest.raises(ValueError, match=rf"metrics\.json: {key} must be "):
            load_run(tmp_path)


def test_broken_run_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.json: no such file"):
        load_run(tmp_path)
    for content in (b"", b'{"name": ', b"\xff", b"[" * 100_000):
        (tmp_path / "metrics.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"metrics\.json: not JSON"):
            load_run(tmp_path)
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(ValueError, match=r"metrics\.json: must hold an object, got list"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        load_run(tmp_path / "metrics.json")
    save(tmp_path, metrics(held_out_loss=10**400))
    with pytest.raises(ValueError, match="held_out_loss must be"):
        load_run(tmp_path)


def test_ratios_are_to_the_first_run_with_most_layers_open():
    text = runs_markdown([some(), metrics(), metrics(name="later")])
    row = next(line for line in text.splitlines() if "some" in line)
    assert row == (
        "| some [bold]\\| $x$ | 63 of 210 (30%) | 1,000,000 (0.25x) | 3.000 → 2.100 "
        "| 50.0 (0.50x) [40.0 to 60.0] | not measured |"
    )
    assert "x: ratio to “all”. Measured on: cpu, float32." in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5 and {line.replace("\\|", "").count("|") for line in lines} == {7}


def test_table_shows_the_cells_of_the_markdown():
    text = printed(runs_table([metrics(), some()]))
    for cell in ("some [bold]| $x$", "50.0", "(0.50x)", "not measured", "4.00", "[p10"):
        assert cell in text


def test_80_columns_break_no_word_and_no_number():
    long = metrics(
        name="arithmetic-top-30-percent",
        step_time_ms=dict.fromkeys(("median", "p10", "p90"), 12345.6),
    )
    masks = {name: llama(4, seed) for seed, name in enumerate(("learn-arithmetic", "learn-polite"))}
    tables = [runs_table([metrics(), long]), render_compare(compare_table(masks))]
    text = "".join(printed(table, width=80) for table in tables)
    assert max(map(len, text.splitlines())) <= 80
    words = ["parameters", "correlation", "memory,", "12346", "[12346 to", "4,000,000"]
    for word in [*words, "learn-arithmetic", "top-30-percent", "(0.18)"]:
        assert word in text, word


def test_different_devices_are_not_compared_silently():
    text = runs_markdown([metrics(), metrics(device="cuda")])
    assert "Measured on: cpu, float32; cuda, float32." in text and "cannot be compared" in text
    assert "cannot be compared" not in runs_markdown([metrics()])


def test_one_run_alone_has_no_ratios():
    slow = metrics(step_time_ms={"median": 2793.24, "p10": 999.96, "p90": 4676.1})
    text = runs_markdown([slow])
    assert "x)" not in text and "ratio" not in text and "Measured on: cpu, float32." in text
    assert "| 2793 [1000.0 to 4676] |" in text


def test_a_baseline_of_zero_has_no_ratios():
    text = runs_markdown([metrics(trainable_parameters=0, peak_memory_bytes=0)])
    assert "| 0 |" in text and "| 0.00 |" in text
    draw_runs([metrics(trainable_parameters=0, losses=[])])


@pytest.mark.parametrize("call", [runs_table, runs_markdown, draw_runs])
def test_no_runs_are_refused(call):
    with pytest.raises(ValueError, match="at least one run"):
        call([])


def test_bars_and_curves_hold_the_numbers_of_the_runs():
    runs = [metrics(), some()]
    curves, *panels = draw_runs(runs).axes
    for index, run in enumerate(runs):
        assert curves.lines[2 * index].get_xydata().tolist() == run["losses"]
    widths = [[bar.get_width() for bar in axes.patches] for axes in panels]
    assert widths == [[2.0, 2.1], [100.0, 50.0], [4 * 2**30, 0], [4e6, 1e6]]
    assert all(axes.get_xlim()[0] == 0 for axes in panels)  # bars from zero: lengths compare
    labels = [[text.get_text() for text in axes.texts] for axes in panels]
    assert labels[1] == ["100.0 (1.00x)", "50.0 (0.50x)"] and labels[2][1] == "not measured"
    assert panels[0].get_xlabel() == "before training: 3.000"


def test_pictures_leave_matplotlib_and_the_import_alone():
    code = (
        "import sys, ila.reports.figures as r\n"
        "assert not {'matplotlib', 'rich', 'torch'} & set(sys.modules)\n"
        "r.heatmap_figure(r.LayerMask({'layers.0.q_proj': 1.0}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_names_are_never_read_as_mathematics(tmp_path):
    broken = "$\\frac$"  # drawn as mathematics, this raises
    heatmap(LayerMask({f"layers.0.{broken}": 1.0}), tmp_path / "a.png", title=broken)
    runs_figure([metrics(name=broken)], tmp_path / "b.png")
