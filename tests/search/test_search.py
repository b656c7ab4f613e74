"""Laws of the two stages: what is learned, from which gradients, and what is left behind."""

import json
import math

import pytest
import torch
from peft import PeftModel
from peft.utils import load_peft_weights
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import ila
from ila.data.encoding import Collator
from ila.masks.mask import LayerMask
from ila.models.edit import masked_layers
from ila.models.layer import MaskedLoraLinear
from ila.search import stage2
from ila.search.config import SEARCHES
from ila.search.gate_gradients import GateGradient
from ila.search.learn import SearchConfig, learn_mask
from ila.search.stage1 import StopWhenStable
from ila.training.config import TrainConfig


def adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" not in n}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def whole(rows):
    return Collator(0)(rows)


def loss_at(model, batch, gamma):
    """Return the loss with every update scaled by gamma, by changing B: nothing under test."""
    layers = masked_layers(model, "default").values()
    kept = [layer.lora_B["default"].weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer, b in zip(layers, kept, strict=True):
            layer.lora_B["default"].weight.copy_(gamma * b)
        loss = model(**batch)["loss"].item()
        for layer, b in zip(layers, kept, strict=True):
            layer.lora_B["default"].weight.copy_(b)
    return loss


def slopes_at(model, batch, gamma):
    """Return -dL/dγ of every layer at one gamma, by autograd through B(γ) = γ B."""
    layers = masked_layers(model, "default")
    kept = {name: layer.lora_B["default"].weight.detach().clone() for name, layer in layers.items()}
    found = {}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_B["default"].weight.copy_(gamma * kept[name])
    parameters = [layer.lora_B["default"].weight for layer in layers.values()]
    grads = torch.autograd.grad(model(**batch)["loss"], parameters)
    for (name, b), grad in zip(kept.items(), grads, strict=True):
        found[name] = -(grad * b).sum().item()
        with torch.no_grad():
            layers[name].lora_B["default"].weight.copy_(b)
    return found


# ---- stage 1


def test_stage_1_lowers_the_loss_and_moves_only_the_adapter(make_llama, rows, search):
    model = make_llama(lora_dropout=0.0)
    base, before = frozen(model), adapter(model)
    mask = search(model, rows, stage1_steps=40, method="gate_gradient", learning_rate=2e-2)
    stage1 = mask.provenance["stage1"]
    assert stage1["steps"] == 40 and stage1["stopped"] == "budget"
    assert stage1["last_window_loss"] < 0.8 * stage1["first_window_loss"]
    assert same(base, frozen(model)) and not same(before, adapter(model))


def test_gate_gradient_is_the_mean_of_minus_the_inner_product(make_toy, rows, search):
    # By hand: the same steps with a plain loop over one fixed batch, AdamW and Trainer's schedule.
    steps, rate = 4, 1e-2
    mask = search(
        make_toy(),
        rows,
        method="gate_gradient",
        stage1_steps=steps,
        learning_rate=rate,
        batch_size=len(rows),
        training_args={"max_grad_norm": 0.0},
    )
    model, batch = make_toy(), whole(rows)
    layers = masked_layers(model, "default")
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    total = dict.fromkeys(layers, 0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (steps - step) / steps
        model(**batch)["loss"].backward()
        for name, layer in layers.items():
            b = layer.lora_B["default"].weight
            total[name] -= (b.grad * b.detach()).sum().item() / steps
        optimizer.step()
        optimizer.zero_grad()
    # The batch's rows come in another order: float64 sums differ in the last bits.
    assert mask.scores == pytest.approx(total, rel=1e-9, abs=1e-12)
    assert mask.provenance["signals"]["gate_gradient"] == mask.scores
    assert mask.provenance["stage2"] == {"steps": 0}


def test_gate_gradient_at_one_step_is_the_slope_of_the_loss(make_toy, rows, search):
    truth = slopes_at(make_toy(), whole(rows), 1.0)
    mask = search(
        make_toy(),
        rows,
        method="gate_gradient",
        stage1_steps=1,
        batch_size=len(rows),
        training_args={"max_grad_norm": 0.0},
    )
    assert mask.scores == pytest.approx(truth, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gate_gradient_is_read_before_clipping(accumulated, make_toy, rows, search):
    truth = slopes_at(make_toy(), whole(rows), 1.0)
    options = {"method": "gate_gradient", "stage1_steps": 1}
    options["batch_size"] = len(rows) // accumulated
    clipped = {"max_grad_norm": 1e-3, "gradient_accumulation_steps": accumulated}
    model = make_toy()
    before = adapter(model)
    mask = search(model, rows, training_args=clipped, **options)
    assert mask.scores == pytest.approx(truth, rel=1e-9, abs=1e-12)
    # And clipping does bite: SGD moves by rate times the clipped norm.
    rate = 0.5
    model = make_toy()
    search(model, rows, learning_rate=rate, training_args=clipped | {"optim": "sgd"}, **options)
    moved = [(weight - before[name]).square().sum() for name, weight in adapter(model).items()]
    assert sum(moved).sqrt().item() == pytest.approx(rate * 1e-3, rel=1e-2)


def test_a_step_that_overflowed_under_loss_scaling_is_not_counted(make_toy, rows):
    model, batch = make_toy(), whole(rows)
    truth = slopes_at(make_toy(), batch, 1.0)
    signal = GateGradient(masked_layers(model, "default"), "default")
    scale = 2.0**16
    for factor in (scale, math.inf, scale):
        (model(**batch)["loss"] * factor).backward()
        signal.gather(0, scale)
        model.zero_grad()
    assert signal.mean() == pytest.approx(truth, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("method", SEARCHES)
def test_every_method_reports_the_free_signal_and_the_course(method, make_toy, rows, search):
    model = make_toy()
    mask = search(model, rows, method=method)
    names = set(masked_layers(model, "default"))
    provenance = mask.provenance
    assert set(mask.scores) == names and set(mask.open) == names
    stages = {"stage1", "stage2", "signals", "cost", "parameters", "folds", "spread"}
    assert set(provenance) == {"config", *stages}
    course = {"first_window_loss", "last_window_loss", "loss_window"}
    assert set(provenance["stage1"]) == {"steps", "stopped", *course}
    assert set(provenance["signals"]["gate_gradient"]) == names
    assert provenance["config"]["method"] == method
    assert provenance["spread"] == mask.spread()
    free = search(make_toy(), rows, method="gate_gradient").scores
    assert provenance["signals"]["gate_gradient"] == free


# ---- determinism


@pytest.mark.parametrize("method", SEARCHES)
def test_a_seed_decides_every_bit(method, make_llama, rows, search):
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))  # what was drawn before the search must not matter
        model = make_llama()
        mask = search(model, rows, method=method, seed=seed, stage1_steps=4, stage2_steps=5)
        runs.append((dict(mask.scores), adapter(model)))
    (first, weights), (again, weights_again), (other, _) = runs
    assert first == again and same(weights, weights_again)
    assert first != other


# ---- stage 2: gradients


def test_the_score_gradient_is_that_of_the_loss(make_toy, rows):
    model, batch = make_toy(), whole(rows)
    layers = masked_layers(model, "default")

    def loss():
        return model(**batch)["loss"]

    for s in (-2.0, 0.0, 4.0):
        with stage2.scored(model, layers, "default", s):
            loss().backward()
            for name, layer in layers.items():
                score = layer.lora_S["default"]
                assert score.shape == (1,) and score.dtype == torch.float64
                step = 1e-5
                with torch.no_grad():
                    above = (score.add_(step), loss().item())[1]
                    below = (score.sub_(2 * step), loss().item())[1]
                    score.add_(step)
                # Central differences: step² · L''' / 6 and rounding, eps · L / step.
                bound = step**2 + 1e-15 / step
                assert abs(score.grad.item() - (above - below) / (2 * step)) <= bound, name


def test_the_score_gradient_is_the_gate_gradient_through_the_sigmoid(make_toy, rows):
    # All gates at γ: dL/ds = γ (1 − γ) dL/dγ, and γ dL/dγ = ⟨dB, B⟩.
    gamma = 0.3
    model, batch = make_toy(), whole(rows)
    layers = masked_layers(model, "default")
    truth = slopes_at(model, batch, gamma)
    with stage2.scored(model, layers, "default", math.log(gamma / (1 - gamma))):
        model(**batch)["loss"].backward()
        found = {n: -layer.lora_S["default"].grad.item() for n, layer in layers.items()}
    expected = {name: gamma * (1 - gamma) * slope for name, slope in truth.items()}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("method", ["ila", "path"])
def test_in_stage_2_only_scores_get_gradients_and_nothing_else_moves(
    method, make_llama, rows, search, monkeypatch
):
    seen = []
    kept = {}

    class Spy(stage2.ScoreTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if not seen:
                kept.update(adapter(model))
            loss = super().training_step(model, inputs, *args, **kwargs)
            with_grad = {n for n, p in model.named_parameters() if p.grad is not None}
            seen.append((with_grad, {n for n, p in model.named_parameters() if p.requires_grad}))
            return loss

    monkeypatch.setattr(stage2, "ScoreTrainer", Spy)
    model = make_llama()
    search(model, rows, method=method)
    scores = {f"{name}.lora_S.default" for name in masked_layers(model, "default")}
    assert seen == [(scores, scores)] * 7
    assert same({n: p for n, p in kept.items() if ".lora_S." not in n}, adapter(model))


def saved_shapes(model, batch):
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)["loss"].backward()
    return shapes


def test_in_stage_2_the_input_of_a_layer_is_not_saved(make_toy, rows):
    # The input of `head`, the top layer, is needed by no other op's backward: 8 features wide.
    model, batch = make_toy(target_modules=["head"]), whole(rows)
    m, k, r = batch["input_ids"].numel(), 8, 3
    layers = masked_layers(model, "default")
    sizes = [math.prod(shape) for shape in saved_shapes(model, batch)]
    assert sizes.count(m * k) == 1  # training wants it for dA
    model.zero_grad()
    with stage2.scored(model, layers, "default", 4.0):
        sizes = [math.prod(shape) for shape in saved_shapes(model, batch)]
    assert sizes.count(m * k) == 0
    assert sizes.count(m * r) >= 1  # t, which dγ is made of


# ---- stage 2: the path method


def test_path_scores_are_the_mean_slopes_and_add_up_to_the_loss_removed(make_toy, rows, search):
    model, batch = make_toy(), whole(rows)
    mask = search(model, rows, method="path", stage1_steps=6, stage2_steps=10, batch_size=len(rows))
    # The adapter is now the one that was scored.
    at_points = [slopes_at(model, batch, gamma) for gamma in stage2.PATH_POINTS]
    mean = {name: sum(p[name] for p in at_points) / len(at_points) for name in mask.scores}
    assert mask.scores == pytest.approx(mean, rel=1e-9, abs=1e-12)

    drop = loss_at(model, batch, 0.0) - loss_at(model, batch, 1.0)
    fine = [sum(slopes_at(model, batch, (i + 0.5) / 50).values()) for i in range(50)]
    # Midpoint rule with n points: |error| ≤ max|f''| / (24 n²); f'' from the fine grid.
    second = max(abs(fine[i - 1] - 2 * fine[i] + fine[i + 1]) * 50**2 for i in range(1, 49))
    assert abs(sum(fine) / 50 - drop) <= 1.5 * second / (24 * 50**2) + 1e-12
    assert abs(sum(mask.scores.values()) - drop) <= 1.5 * second / (24 * 5**2) + 1e-12
    assert abs(drop) > 10 * second / (24 * 5**2)  # or the bound would hold for anything


def test_every_point_of_the_path_counts_alike_however_many_steps_it_had(make_toy, rows, search):
    options = {"method": "path", "stage1_steps": 6, "batch_size": len(rows)}
    even = search(make_toy(), rows, stage2_steps=5, **options).scores
    uneven = search(make_toy(), rows, stage2_steps=7, **options).scores  # γ = 0.1 and 0.3 twice
    # One batch holds all rows, so each point measures the same slope whenever it is visited.
    assert uneven == pytest.approx(even, rel=1e-9)


def test_path_needs_a_step_for_every_point():
    with pytest.raises(ValueError, match=r"^stage2_steps must be ≥ 5 for method 'path'"):
        SearchConfig(method="path", stage2_steps=4)


@pytest.mark.parametrize("method", ["ila", "path"])
def test_training_args_do_not_clip_or_decay_the_scores(method, make_toy, rows, search, monkeypatch):
    seen = []

    class Spy(stage2.ScoreTrainer):
        def __init__(self, model, args, *more, **options):
            seen.append(args)
            super().__init__(model, args, *more, **options)

    monkeypatch.setattr(stage2, "ScoreTrainer", Spy)
    model, batch = make_toy(), whole(rows)
    user = {"max_grad_norm": 1e-6, "weight_decay": 0.5, "adam_beta1": 0.8}
    user |= {"lr_scheduler_type": "cosine", "optim": "adamw_torch"}
    mask = search(
        model, rows, method=method, stage2_steps=5, batch_size=len(rows), training_args=user
    )
    (args,) = seen
    assert args.max_grad_norm == 1e30 and args.weight_decay == 0.0 and args.adam_beta1 == 0.8
    assert args.lr_scheduler_type == "constant"
    assert args.learning_rate == (0.0 if method == "path" else 1e-2)
    if method == "path":
        at_points = [slopes_at(model, batch, gamma) for gamma in stage2.PATH_POINTS]
        mean = {name: sum(p[name] for p in at_points) / len(at_points) for name in mask.scores}
        assert mask.scores == pytest.approx(mean, rel=1e-9, abs=1e-12)


# ---- what is left


@pytest.mark.parametrize("method", SEARCHES)
def test_the_search_leaves_the_model_as_it_found_it(method, make_llama, rows, search, trace):
    model = make_llama()
    for name, parameter in model.named_parameters():
        if "layers.1.self_attn.v_proj.lora_A" in name:
            parameter.requires_grad_(False)  # a flag of the user's
    before, base = trace(model), frozen(model)
    search(model, rows, method=method)
    assert trace(model) == before and same(base, frozen(model))
    assert not any("lora_S" in name for name in model.state_dict())
    assert all(not layer.is_closed("default") for layer in masked_layers(model, "default").values())


@pytest.mark.parametrize("method", SEARCHES)
def test_mixed_precision_is_taken_off_again(method, make_llama, rows, search, trace):
    model = make_llama()
    before = trace(model)
    search(model, rows, method=method, training_args={"bf16": True, "use_cpu": True})
    assert trace(model) == before
    batch = whole(rows)
    assert model(**batch).logits.dtype == torch.float32


def test_both_stages_run_in_the_precision_asked_for(make_llama, rows, search, monkeypatch):
    dtypes, original = [], MaskedLoraLinear.forward

    def forward(self, x, **kwargs):
        y = original(self, x, **kwargs)
        dtypes.append(y.dtype)
        return y

    monkeypatch.setattr(MaskedLoraLinear, "forward", forward)
    search(make_llama(), rows, training_args={"bf16": True, "use_cpu": True})
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("method", "step", "error"),  # of 8 steps in stage 1 and 7 in stage 2
    [
        ("ila", 3, RuntimeError("broken")),
        ("ila", 9, RuntimeError("broken")),
        ("ila", 12, KeyboardInterrupt()),
        ("path", 9, KeyboardInterrupt()),
        ("path", 12, RuntimeError("broken")),
    ],
)
def test_an_exception_in_the_middle_leaves_a_clean_model(
    method, step, error, make_toy, rows, search, trace, break_off
):
    model = make_toy()
    before = trace(model)
    break_off(Trainer, "training_step", step, error=error)
    with pytest.raises(type(error)):
        search(model, rows, method=method)
    assert {**trace(model), "gradients": []} == before
    assert not any("lora_S" in name for name in model.state_dict())
    search(model, rows, method=method)  # and the model can be searched again


def test_the_progress_bar_is_closed_when_training_fails(make_toy, rows, break_off, monkeypatch):
    from ila.training import loop

    bars = []
    original = loop.ProgressBar.__init__
    monkeypatch.setattr(
        loop.ProgressBar,
        "__init__",
        lambda bar, title: (bars.append(bar), original(bar, title))[0],
    )
    break_off(Trainer, "training_step", 2, error=RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        learn_mask(make_toy(), rows, SearchConfig(stage1_steps=3, batch_size=2), progress=True)
    assert len(bars) == 1 and bars[0].progress is None


def test_the_saved_stage_1_adapter_is_plain_peft_under_any_name(
    make_llama, rows, search, tmp_path, tiny_model_folder
):
    from transformers import LlamaForCausalLM

    for name in ("default", "other"):
        model = make_llama(adapter_name=name)
        search(model, rows, output_dir=tmp_path / name)
        folder = tmp_path / name / "adapter"
        assert not any("score" in key for key in load_peft_weights(str(folder), device="cpu"))
        plain = PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(tiny_model_folder), str(folder)
        )
        batch = whole(rows)
        with torch.no_grad():
            expected, actual = model.eval()(**batch).logits, plain.eval()(**batch).logits
        assert not any(isinstance(m, MaskedLoraLinear) for m in plain.modules())
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_no_output_dir_writes_nothing(make_toy, rows, search, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    search(make_toy(), rows)
    assert list(tmp_path.iterdir()) == []


# ---- epsilon-stability


def state_of(losses):
    return TrainerState(log_history=[{"loss": x, "step": i + 1} for i, x in enumerate(losses)])


@pytest.mark.parametrize(
    ("losses", "epsilon", "window", "expected"),
    [
        ([1.0] * 4, 0.01, 2, True),
        ([1.0] * 3, 0.01, 2, False),  # two whole windows are needed
        ([1.0] * 4, 0.0, 2, False),  # 0 turns it off, even where nothing changes
        ([9.0, 1.0, 1.0, 1.0, 1.0], 0.01, 2, True),  # only the last two windows count
        ([1.0, 3.0, 3.0, 1.0], 0.01, 2, True),  # noise within a window averages out
        ([1.0, 1.0, 2.0, 2.0], 1.0, 2, False),  # a difference of ε is not less than ε
        ([2.0, 2.0, 1.0, 1.0], 1.0, 2, False),  # nor a fall of ε
        ([1.0, 1.25], 0.5, 1, True),
    ],
)
def test_stability_compares_the_last_two_windows(losses, epsilon, window, expected):
    rule, control = StopWhenStable(epsilon, window), TrainerControl()
    rule.on_log(None, state_of(losses), control)
    assert rule.stable(state_of(losses)) is control.should_training_stop is expected


def constant(model):
    """Zero what the loss depends on: it becomes log(words), whatever the adapter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name or "lora_B" in name:
                parameter.zero_()
    return model


@pytest.mark.parametrize(("epsilon", "steps", "why"), [(1e-3, 4, "stable"), (0.0, 8, "budget")])
def test_a_constant_loss_stops_stage_1_unless_epsilon_is_0(
    epsilon, steps, why, make_toy, rows, search
):
    mask = search(
        constant(make_toy()), rows, epsilon=epsilon, learning_rate=1e-12, method="gate_gradient"
    )
    stage1 = mask.provenance["stage1"]
    assert (stage1["steps"], stage1["stopped"]) == (steps, why)
    assert stage1["first_window_loss"] == pytest.approx(math.log(24)) == stage1["last_window_loss"]


@pytest.mark.parametrize(
    ("window", "steps", "taken"), [(3, 8, 3), (50, 8, 4), (50, 7, 3), (2, 1, 1)]
)
def test_the_course_of_stage_1_compares_windows_of_the_same_length(
    window, steps, taken, make_toy, rows, search, tmp_path
):
    options = {"stability_window": window, "stage1_steps": steps, "method": "gate_gradient"}
    stage1 = search(make_toy(), rows, output_dir=tmp_path, **options).provenance["stage1"]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if entry["stage"] == "stage1"]
    assert len(losses) == steps and stage1["loss_window"] == taken
    assert stage1["first_window_loss"] == pytest.approx(sum(losses[:taken]) / taken)
    assert stage1["last_window_loss"] == pytest.approx(sum(losses[-taken:]) / taken)


# ---- refusals


def test_a_model_without_our_layers_is_refused(rows, tiny_model_folder, search):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    plain = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"no MaskedLoraLinear layer.*ila\.attach"):
        search(plain, rows)
    with pytest.raises(TypeError, match="PeftModel"):
        search(base, rows)


def test_closed_layers_are_refused(make_llama, rows, search):
    model = make_llama()
    names = list(masked_layers(model, "default"))
    mask = LayerMask(dict.fromkeys(names, 0.0), {n: i != 3 for i, n in enumerate(names)})
    ila.apply_mask(model, mask)
    with pytest.raises(ValueError, match=f"{names[3]}.*closed"):
        search(model, rows)
    assert masked_layers(model, "default")[names[3]].is_closed("default")


def test_dora_layers_are_refused(make_llama, rows, search):
    with pytest.raises(ValueError, match=r"cannot be scored: LoRA variant Dora"):
        search(make_llama(use_dora=True), rows)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "at least one row, got none"),
        (iter([]), TypeError, "must have a length"),
        ([{"input_ids": [3, 4]}], ValueError, r"input_ids and labels, got \['input_ids'\]"),
        ([[3, 4]], ValueError, "input_ids and labels, got list"),
        ([{"text": "a"}], ValueError, r"got \['text'\]"),
    ],
)
def test_wrong_data_is_refused(dataset, error, message, make_toy, search, trace, tmp_path):
    model = make_toy()
    before = trace(model)
    with pytest.raises(error, match=message):
        search(model, dataset, output_dir=tmp_path / "out")
    assert trace(model) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_search(
    stage, make_toy, rows, search, trace, monkeypatch, tmp_path
):
    model = make_toy()
    before, step_one = trace(model), Trainer.training_step
    calls = []

    def poisoned(self, *args, **kwargs):
        calls.append(1)
        loss = step_one(self, *args, **kwargs)
        return loss * math.nan if len(calls) == (2 if stage == 1 else 10) else loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    with pytest.raises(FloatingPointError, match="the loss became nan at step 2; try"):
        search(model, rows, output_dir=tmp_path)
    assert len(calls) == (2 if stage == 1 else 10)
    assert {**trace(model), "gradients": []} == before
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_rows_without_any_answer_end_in_a_clear_error(make_toy, search):
    row = {"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}
    with pytest.raises(FloatingPointError, match="the loss became nan at step 1"):
        search(make_toy(), [row] * 2)


# ---- the folder


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"method": "gate_gradient"}, "method"),
        ({"stage1_steps": 9}, "stage1_steps"),
        ({"seed": 1}, "seed"),
        ({"score_init": 3.0, "batch_size": 3}, "batch_size, score_init"),
        ({"training_args": {"weight_decay": 0.1}}, "training_args"),
    ],
)
def test_a_folder_of_another_search_is_refused_by_the_field(
    change, field, make_toy, rows, search, tmp_path
):
    search(make_toy(), rows, output_dir=tmp_path, stage1_steps=2, stage2_steps=5)
    before = snapshot(tmp_path)
    changed = {"stage1_steps": 2, "stage2_steps": 5} | change
    fields = ", ".join(f"config.{name}" for name in field.split(", "))
    with pytest.raises(ValueError, match=f"holds a run that differs in {fields}; give another"):
        search(make_toy(), rows, output_dir=tmp_path, resume=True, **changed)
    with pytest.raises(ValueError, match="holds a run already; give another folder, or go on"):
        search(make_toy(), rows, output_dir=tmp_path, **changed)
    assert snapshot(tmp_path) == before


def test_a_folder_of_another_model_or_data_set_is_refused(make_toy, rows, search, tmp_path):
    options = {"output_dir": tmp_path, "stage1_steps": 2, "stage2_steps": 5}
    search(make_toy(), rows, **options)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="differs in layers;"):
        search(make_toy(target_modules=["head"]), rows, resume=True, **options)
    with pytest.raises(ValueError, match="differs in rows;"):
        search(make_toy(), rows[:-1], resume=True, **options)
    assert snapshot(tmp_path) == before


def test_resume_without_a_folder_is_refused(make_toy, rows, search):
    with pytest.raises(ValueError, match="resume=True needs the output_dir"):
        search(make_toy(), rows, resume=True)


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the configuration


@pytest.mark.parametrize(
    "change",
    [
        {"method": "magic"},
        {"method": "ILA"},
        {"stage1_steps": 0},
        {"stage1_steps": 2.0},
        {"stage2_steps": -1},
        {"stage2_steps": "3"},
        {"batch_size": 0},
        {"stability_window": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1e-3},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"score_learning_rate": 0.0},
        {"score_learning_rate": math.nan},
        {"epsilon": -1e-9},
        {"epsilon": math.nan},
        {"epsilon": math.inf},
        {"score_init": 30.0},
        {"score_init": -30.0},
        {"score_init": math.nan},
        {"save_every": 0},
        {"save_every": -5},
    ],
)
def test_a_configuration_out_of_range_is_refused_by_name(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name} must be"):
        SearchConfig(**change)


def test_a_configuration_is_json_and_frozen():
    config = SearchConfig(training_args={"bf16": True}, save_every=None, epsilon=0.0)
    assert SearchConfig(**json.loads(json.dumps(config.as_dict()))) == config
    with pytest.raises(AttributeError):
        config.seed = 1


@pytest.mark.parametrize("config", [SearchConfig, TrainConfig])
@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("learning_rate", "set learning_rate instead"),
        ("per_device_train_batch_size", "set batch_size instead"),
        ("auto_find_batch_size", "set batch_size instead"),
        ("max_steps", r"set (stage1_steps and stage2_steps|steps or epochs) instead"),
        ("num_train_epochs", r"set (stage1_steps and stage2_steps|steps or epochs) instead"),
        ("seed", "set seed instead"),
        ("save_steps", "set save_every instead"),
        ("save_strategy", "set save_every instead"),
        ("output_dir", "an argument of its own"),
        ("logging_steps", "every step is logged"),
        ("logging_strategy", "every step is logged"),
        ("disable_tqdm", "the argument progress decides"),
    ],
)
def test_training_args_must_not_set_what_is_decided_elsewhere(name, instead, config):
    assert name in TrainingArguments.__dataclass_fields__  # or it would be refused as unknown
    with pytest.raises(ValueError, match=rf"training_args must not set '{name}': .*{instead}"):
        config(training_args={name: 1})


def test_training_args_of_unknown_names_are_refused(make_toy, rows, search):
    with pytest.raises(ValueError, match=r"does not know: \['batchsize', 'learningrate'\]"):
        search(make_toy(), rows, training_args={"learningrate": 1, "batchsize": 1, "bf16": False})


def test_training_args_that_json_cannot_hold_are_refused_before_training(
    make_toy, rows, search, monkeypatch
):
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(TypeError, match="not JSON serializable"):
        search(make_toy(), rows, training_args={"optim_args": object()})
