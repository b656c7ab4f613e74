"""The search over layers trained in full: gates turn ΔW = W − W₀, and scores say what it did."""

import json
import runpy

import pytest
import torch
from peft import LoraConfig
from torch.func import functional_call
from transformers import LlamaForCausalLM, Trainer

import ila
from ila.data.encoding import Collator
from ila.models.edit import masked_layers
from ila.models.open_weights import OpenLinear, open_layers
from ila.search.stage2 import PATH_POINTS
from ila.search.weight_updates import GatedLinear, UpdateGradient, WeightUpdates


def batch_of(rows):
    return Collator(0)(rows)


class Gates:
    """The loss of a model at W₀ + γ (W − W₀), computed without its gates: γ by layer."""

    def __init__(self, updates, start, batch):
        self.model, self.start, self.batch = updates.model, start, batch
        self.names = {name: name.removeprefix("base_model.model.") for name in updates.layers}
        self.trained = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def loss(self, gammas):
        weights = dict(self.trained)
        for name, gamma in gammas.items():
            for key in [n for n in weights if n.rpartition(".")[0] == self.names[name]]:
                weights[key] = self.start[key] + gamma * (self.trained[key] - self.start[key])
        with torch.no_grad():
            return functional_call(self.model, weights, kwargs=self.batch)["loss"].item()

    def slopes(self, gamma, step=1e-4):
        """dL/dγ of each layer, all the gates at γ, by central differences."""
        found = {}
        for name in self.names:
            at = {n: gamma for n in self.names}
            up, down = (self.loss(at | {name: gamma + sign * step}) for sign in (1, -1))
            found[name] = (up - down) / (2 * step)
        return found


def copied(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.fixture
def moved(make_toy, rows):
    """Return the updates of a float64 model whose open weights and biases were changed, and W₀."""
    updates = WeightUpdates(open_layers(make_toy()))
    start = copied(updates.model)
    with torch.no_grad():
        for parameter in updates.model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return updates, start, Gates(updates, start, batch_of(rows))


# Central differences of step h in fp64: h² from the third derivative, ε/h from rounding.
NEAR = {"rel": 1e-6, "abs": 1e-8}


@pytest.mark.parametrize("gamma", [0.1, 0.9])
def test_the_gradient_of_a_gate_is_that_of_the_interpolated_weights(moved, gamma):
    updates, _, gates = moved
    score = torch.logit(torch.tensor(gamma, dtype=torch.float64)).item()
    with updates.scored(score):
        trained = [p for p in updates.model.parameters() if p.requires_grad]
        assert len(trained) == 3 and all(p.shape == (1,) for p in trained)
        loss = updates.model(**gates.batch)["loss"]
        loss.backward()
        found = {
            name: layer.lora_S["full"].grad.item() / (gamma * (1 - gamma))
            for name, layer in updates.layers.items()
        }
    assert loss.item() == pytest.approx(gates.loss(dict.fromkeys(updates.layers, gamma)), rel=1e-12)
    assert found == pytest.approx(gates.slopes(gamma), **NEAR)
    assert min(map(abs, found.values())) > 1e-3
    assert {type(layer) for layer in updates.layers.values()} == {OpenLinear}


def test_training_measures_the_gates_at_one_for_free(moved):
    updates, _, gates = moved
    signal = updates.signal()
    assert isinstance(signal, UpdateGradient)
    updates.model(**gates.batch)["loss"].backward()
    signal.gather(0)
    expected = {name: -slope for name, slope in gates.slopes(1.0).items()}
    assert signal.mean() == pytest.approx(expected, **NEAR)


def test_path_scores_are_the_mean_slopes_along_the_path(make_toy, rows, search):
    """One batch of all rows, so that every step of stage 2 sees the same loss."""
    opened = open_layers(make_toy())
    start, flags = copied(opened.model), [p.requires_grad for p in opened.model.parameters()]
    mask = search(opened, rows, method="path", stage1_steps=6, stage2_steps=10, batch_size=10)
    assert [p.requires_grad for p in opened.model.parameters()] == flags
    assert not any(isinstance(m, GatedLinear) for m in opened.model.modules())
    updates = WeightUpdates(opened)
    assert list(mask.scores) == list(updates.layers)
    gates = Gates(updates, start, batch_of(rows))
    slopes = [gates.slopes(gamma) for gamma in PATH_POINTS]
    expected = {n: -sum(each[n] for each in slopes) / len(slopes) for n in updates.layers}
    assert mask.scores == pytest.approx(expected, **NEAR)
    # The midpoint rule of the integral from W₀ to W: the layers share the loss that fell.
    fell = gates.loss(dict.fromkeys(updates.layers, 0.0)) - gates.loss({})
    assert fell > 0.01 and sum(mask.scores.values()) == pytest.approx(fell, rel=0.02)


def test_a_gate_of_one_is_the_trained_weight_bit_for_bit(tiny_model_folder):
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16)
    model = ila.attach(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    updates = WeightUpdates(open_layers(model))
    before = {n: p.detach().clone() for n, p in updates.model.named_parameters()}
    with torch.no_grad():
        for parameter in updates.model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    ids = torch.arange(6, 18).view(2, 6)
    trained = updates.model(input_ids=ids).logits
    kept = [t for start in updates.start.values() for t in start.values()]
    assert {t.dtype for t in kept} == {torch.bfloat16}
    with updates.scored(40.0):  # σ(40) is 1 in float32
        assert updates.model(input_ids=ids).logits.equal(trained)
    with updates.scored(-120.0):  # and σ(−120) is 0
        closed = updates.model(input_ids=ids).logits
    for name, parameter in updates.model.named_parameters():
        parameter.data = before[name]
    assert updates.model(input_ids=ids).logits.equal(closed)
    assert not closed.equal(trained)


def peft_config(**changes):
    from peft import LoraConfig

    return LoraConfig(
        **{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    )


@pytest.mark.parametrize("method", ["path", "ila"])
def test_a_search_that_was_broken_off_ends_with_the_same_scores(
    method, make_llama, rows, search, tmp_path, break_off, killed
):
    def run(folder, resume=False):
        opened = open_layers(make_llama())
        options = {"method": method, "learning_rate": 1e-3, "save_every": 2, "output_dir": folder}
        return search(opened, rows, resume=resume, **options)

    expected = run(tmp_path / "whole")
    assert len(set(expected.scores.values())) == 14
    broken = tmp_path / "broken"
    for call in (6, 8):  # in stage 1, then in stage 2
        break_off(Trainer, "training_step", call, error=killed)
        with pytest.raises(killed):
            run(broken, resume=call != 6)
    checkpoints = list((broken / "stage2").glob("checkpoint-*"))
    assert checkpoints and not list(broken.rglob("model*.safetensors"))
    assert max(f.stat().st_size for f in checkpoints[0].glob("changed.safetensors")) < 4000
    assert run(broken, resume=True).scores == expected.scores


def test_the_mask_opens_layers_of_an_adapter_and_of_the_weights(make_llama, rows, search):
    opened = open_layers(make_llama())
    mask = search(opened, rows, method="gate_gradient", learning_rate=1e-3).top(0.3)
    model = make_llama()
    ila.apply_mask(model, mask)
    names = masked_layers(model, "default")
    assert [n for n, m in names.items() if not m.is_closed("default")] == list(mask.open)
    again = open_layers(make_llama(), mask)
    assert len(again.names) == 4
    with pytest.raises(ValueError, match="10 of 14 layers are closed; the search needs every"):
        search(again, rows)


def test_an_adapter_search_is_not_resumed_with_weights(make_llama, rows, search, tmp_path):
    search(make_llama(), rows, output_dir=tmp_path, method="gate_gradient")
    with pytest.raises(ValueError, match="differs in adapter"):
        search(
            open_layers(make_llama()), rows,
            output_dir=tmp_path, method="gate_gradient", resume=True,
        )  # fmt: skip


TWO = """
import json, os, sys
from pathlib import Path
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM
import ila
from ila.models.open_weights import OpenLinear, open_layers
from ila.runs.processes import leave_process_group


def run(folder, size):
    rows = [{"input_ids": [1, 6 + i, 9 + i, *range(8, 8 + i), 2]} for i in range(8)]
    rows = [{**row, "labels": [-100, -100, *row["input_ids"][2:]]} for row in rows]
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    opened = open_layers(ila.attach(LlamaForCausalLM.from_pretrained(folder), lora))
    config = ila.SearchConfig(stage1_steps=4, stage2_steps=5, epsilon=0.0, batch_size=size,
                              learning_rate=1e-3, save_every=None)
    return dict(ila.learn_mask(opened, rows, config, progress=False).scores)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out = sys.argv[1:]
    Path(f"{out}-{os.environ['RANK']}.json").write_text(json.dumps(run(folder, 2)))
    leave_process_group()
"""


def test_two_processes_score_weights_as_one(run_ranks, tiny_model_folder, tmp_path):
    run_ranks(TWO, tiny_model_folder, tmp_path / "two")
    two, other = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert two == other  # the same bits on both
    (tmp_path / "job.py").write_text(TWO)
    one = runpy.run_path(str(tmp_path / "job.py"))["run"](tiny_model_folder, 4)
    largest = max(map(abs, one.values()))
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5 * largest)
