"""Sections of counted results and of real data, each from a result small enough to check by eye."""

import json

import torch

from benchmarks import small_updates as measured
from benchmarks.sections import (
    compile_report,
    memory,
    qlora,
    real_data,
    saved_bytes,
    small_updates,
    time_budget,
)
from benchmarks.sections.memory_counts import PEFT_BF16
from ila_kernels import eager

GB = 10**9
QUIET = {"busy": False, "spread": 1.02, "why": []}


def memory_row(
    contestant: str, share: float, position: str, kept: int, checkpointing: bool
) -> dict:
    """A step that keeps ``kept`` bytes a token, and at its peak as many on top of what stands."""
    return {
        "model": "llama-3-8b",
        "base": "bf16",
        "contestant": contestant,
        "share": share,
        "position": position,
        "seed": None,
        "checkpointing": checkpointing,
        "weights": 16 * GB,
        "adapters": 1 * GB,
        "optimizer": 2 * GB,
        "gradients": 1 * GB,
        "kept": [0, kept],
        "peaks": [[0, kept]],
    }


def memory_result() -> dict:
    mega = 10**6
    rows = [
        memory_row("PEFT", 1.0, "all", 5 * mega, False),
        memory_row("ours", 1.0, "all", 2 * mega, False),
        memory_row(PEFT_BF16, 1.0, "all", 3 * mega, False),
        memory_row("PEFT", 1.0, "all", 1 * mega, True),
        memory_row(PEFT_BF16, 1.0, "all", 1 * mega, True),
        memory_row("ours", 1.0, "all", 1 * mega, True),
    ]
    return {"memory": {"options": {"rank": 16}, "rows": rows}}


def test_memory_says_parts_peaks_and_what_fits():
    text = "\n".join(memory.markdown(memory_result()))
    ours = [line for line in text.splitlines() if line.startswith("| ours, all layers")]
    # 16 + 1 of weights, 2 of AdamW, 1 of gradients, 4096 tokens of 2 MB; 1 MB with checkpoints.
    assert ours[0] == (
        "| ours, all layers | 17.00 GB | 2.00 GB | 1.00 GB | 8.19 GB | 28.19 GB | 24.10 GB |"
    )
    # 20 GB stand: no token on 16 GB, 4 GB of 2 MB each on 24 GB, and so on.
    assert ours[1].startswith("| ours, all layers | – | 2,000 | 10,000 | 30,000 | – | 4,000 |")
    assert "run from 28.2 to 40.5 GB without gradient checkpointing, and from 24.1 to 24.1" in text


def test_memory_is_drawn_for_the_bases_that_were_counted(tmp_path):
    found = memory.figures(memory_result())
    assert sorted(found) == ["memory-by-share-bf16.png", "memory-step-bf16.png"]
    for name, draw in found.items():
        draw(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_saved_bytes_by_place():
    options = {"model": "Llama-2-7B", "rows": 4, "tokens": 1024, "dtype": "bf16", "rank": 16}
    rows = {"PEFT": {"bytes": 2**30, "by_place": {"mlp": 2**29, "rest": 2**29}}}
    text = saved_bytes.markdown(
        {"saved-bytes": {"options": options | {"dropout": 0}, "rows": rows}}
    )
    assert "| PEFT | 1.0 GiB | 0.5 GiB | 0.5 GiB |" in "\n".join(text)


def test_qlora_says_how_far_losses_are_off_and_what_was_held():
    def row(last: float, off: float, peak: int | None) -> dict:
        found = {"losses": [2.0, last], "largest_relative_difference": off}
        return found | {"loaded_bytes": 2**20, "peak_bytes": peak}

    shared = {"model": "m", "rank": 8, "steps": 2, "rows": 4, "tokens": 16}
    options = shared | {"load_in": "4bit", "dtype": "float32"}
    rows = {"peft": row(1.0, 0.0, 5 * 2**20), "ours": row(1.0, 2e-7, None)}
    text = qlora.markdown({"qlora-float32": {"options": options, "rows": rows}})
    assert text[1].splitlines()[2:] == [
        "| peft, 4bit, computing in float32 | 2.0000 → 1.0000 |  | 4 MiB |",
        "| ours, 4bit, computing in float32 | 2.0000 → 1.0000 | 2.0e-07 | not measured |",
    ]


def test_compile_report_counts_spills_and_the_longest_loop():
    def row(target: str, spills: int, loop: int, plain: int | None) -> dict:
        known = {"target": target, "spills": spills, "shared_bytes": 50, "shared_limit_bytes": 100}
        return known | {"loop_instructions": loop, "plain_loop_instructions": plain}

    rows = [row("sm_80", 0, 102, 100), row("sm_80", 3, 101, 100), row("gfx942", 0, 7, None)]
    text = compile_report.markdown({"compile-report": {"triton": "3.9.0", "rows": rows}})
    assert text[1].splitlines()[2:] == [
        "| `sm_80` | 2 | 1 | 50% | +2% |",
        "| `gfx942` | 1 | 0 | 50% | not compared |",
    ]


def test_real_data_shows_losses_times_and_memory_of_both():
    def run(open_modules: int, loss: float, seconds: float) -> dict:
        return {
            "open_modules": open_modules,
            "total_modules": 10,
            "trainable_parameters": 1_000_000,
            "held_out_loss_before": 1.5,
            "held_out_loss": loss,
            "step_time_ms": {"median": 1e3 * seconds, "p10": 900 * seconds, "p90": 1100 * seconds},
            "peak_memory_bytes": 2**30,
        }

    names = ("limit", "max_length", "steps", "batch_size", "stage2_steps", "seed")
    spread = {"min": 0.0, "max": 1.0, "std": 0.25}
    held = {"before": 1.5, "after_stage1": 1.0, "rows": 60}
    result = {
        "options": dict.fromkeys(names, 4) | {"model": "m"},
        "environment": {"layers": 10, "dtype": "bfloat16", "rank": 8, "threads": 2},
        "learned": {"a": {"held_out_loss": held, "spread": spread}},
        "agreement": [],
        "trained": {"a-all-layers": run(10, 0.9, 2.0), "a-top-30-percent": run(3, 0.95, 1.0)},
        "busy": QUIET,
    }
    text = "\n".join(real_data.markdown({"real-data-path": result}))
    assert "| `path`, a | 1.500 → 1.000 | 0 … 1 | 0.25 |" in text
    all_layers = "10 of 10 | 1.00 M | 1.500 → 0.900 | 2.00 s (1.80–2.20) | 1.00 GiB |"
    top = "3 of 10 | 1.00 M | 1.500 → 0.950 | 1.00 s (0.90–1.10) | 1.00 GiB |"
    assert f"| `path`, a-all-layers | {all_layers}" in text
    assert f"| `path`, a-top-30-percent | {top}" in text
    assert "`path`: The machine was quiet (calibration spread 1.02)." in text


def test_budgets_of_time_are_marked_as_modelled_and_say_what_would_show_them_wrong():
    first, *parts = time_budget.markdown({})
    assert first.startswith("**Modelled, not measured: none of these times was taken on a GPU.**")
    tables = [part.splitlines() for part in parts if part.startswith("| modelled")]
    assert len(tables) == len(time_budget.GPUS) + 1
    for table in tables[:-1]:
        assert table[0].endswith("| shown wrong by |") and len(table) == 2 + 8 + 1
        assert all(line.split("|")[-2].strip() for line in table[2:])
    # The sums of the last table are those under the others.
    sums = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in tables[-1][2:]}
    for name, table in zip(time_budget.GPUS.values(), tables, strict=False):
        under = [cell.partition("(")[2].strip(" )") for cell in table[-1].split("|")[2:-2]]
        found = [cell.strip() for cell in sums[f"{name}, 8192 tokens"]]
        assert [found[0], *found[3:]] == under


def test_small_updates_are_measured_as_they_are_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "SIZES", (1e-3,))
    monkeypatch.setattr(measured, "TIMED", (("SmolLM2-135M", "k", 80),))
    monkeypatch.setattr(measured, "STEPS", ((1, 80),))
    monkeypatch.setattr(measured.STEP_MODEL, "num_hidden_layers", 1)
    file = tmp_path / "small-updates.json"
    measured.main(["--json", str(file), "--rounds", "2"])
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    for of in ("y", "dx"):
        assert abs(row[of]["ours"] - 1.0) < 0.01
        assert max(row[of]["PEFT"], row[of]["base first"]) < 0.6
    text = "\n".join(small_updates.markdown({"small-updates": found}))
    cells = [f"{row[of][name]:.2f}" for of in ("y", "dx") for name in small_updates.NAMES]
    assert f"| 0.001 | {' | '.join(cells)} |" in text
    assert f"| SmolLM2-135M k, M 80 | {found['timed'][0]['median']:.2f} (" in text
    assert f"step of 1 × 80 tokens | {found['steps'][0]['median']:.2f} (" in text


def test_the_two_orders_that_are_timed_differ_in_nothing_else():
    before = eager.base_adds
    with measured.base_first():
        assert not eager.base_adds(torch.empty(4096, 8), torch.empty(8, 8), 8)
    assert eager.base_adds is before
