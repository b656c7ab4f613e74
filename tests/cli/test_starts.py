"""How adapters start (`--init-lora-weights`) and learn (`--loraplus-lr-ratio`), by PEFT's names."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, set_seed

from ila.commands.inputs import Inputs, prepare
from ila.masks.mask import LayerMask
from ila.runs.metrics import load_run
from ila.training.config import TrainConfig
from ila.training.train import arguments_of

TAKE_BASE = ("pissa", "pissa_niter_4", "olora")
LEAVE_BASE = ("true", "false", "gaussian", "orthogonal", "mica")


@pytest.fixture
def mask_file(tiny_model_folder, tmp_path):
    """Return a file that opens every third layer."""
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    names = [n for n, _ in base.named_modules() if n.endswith("_proj")]
    gates = {f"base_model.model.{n}": index % 3 == 0 for index, n in enumerate(names)}
    mask = LayerMask({name: float(gate) for name, gate in gates.items()}, gates)
    mask.save(tmp_path / "third.json")
    return tmp_path / "third.json"


@pytest.fixture
def trained_logits(monkeypatch):
    """Return the logits that the model in memory gives at the end of a training."""
    from ila.training import train as module

    found, real = {}, module._save

    def save(part, *args):
        part.model.eval()
        with torch.no_grad():
            found["logits"] = part.model(input_ids=TOKENS).logits
        real(part, *args)

    monkeypatch.setattr(module, "_save", save)
    return found


TOKENS = torch.arange(3, 23).reshape(2, 10)


def plain_logits(run, folder):
    """Return logits and model of plain PEFT over the base as it was downloaded."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(run)).eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits, model


@pytest.mark.parametrize("masked", [False, True], ids=["all open", "a third open"])
@pytest.mark.parametrize("kind", [(), ("--use-rslora",), ("--use-dora",)], ids="".join)
@pytest.mark.parametrize("init", TAKE_BASE)
def test_plain_peft_loads_the_result_on_the_pretrained_base(
    train, tmp_path, tiny_model_folder, mask_file, trained_logits, init, kind, masked
):
    out, more = tmp_path / "out", ("--mask", mask_file) if masked else ()
    answer = train(out, "--init-lora-weights", init, *kind, *more)
    assert answer.code == 0, answer.err
    logits, model = plain_logits(out, tiny_model_folder)
    torch.testing.assert_close(logits, trained_logits["logits"], rtol=0, atol=2e-5)
    config = model.peft_config["default"]
    assert config.r == 4 and config.init_lora_weights is True  # rank 2, and what it began with
    held = {n for n, m in model.named_modules() if "default" in getattr(m, "lora_A", ())}
    assert held == set(LayerMask.load(mask_file).open) if masked else len(held) == 14
    # It is the training that is saved, not the start: the base alone gives other logits.
    with model.disable_adapter(), torch.no_grad():
        assert (model(input_ids=TOKENS).logits - logits).abs().max() > 1e-2


@pytest.mark.parametrize("init", TAKE_BASE)
def test_such_a_start_changes_no_output_and_losses_are_those_of_peft(
    train, source, tmp_path, tiny_model_folder, init
):
    """All open, in fp32: the first losses are PEFT's own for the same start."""
    assert train(tmp_path / "out", "--init-lora-weights", init).code == 0
    mine = load_run(tmp_path / "out")
    plain = prepare(Inputs(model=source[1], data=source[3], rank=2), progress=False)
    assert mine["held_out_loss_before"] == pytest.approx(
        load_run(_run(train, tmp_path / "zero"))["held_out_loss_before"], abs=1e-5
    )
    if init.startswith("pissa_niter"):  # its random start is drawn at another place
        return
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    lora = LoraConfig(
        r=2, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM",
        init_lora_weights=init,
    )  # fmt: skip
    theirs = _losses_of(get_peft_model(base, lora), plain, tmp_path / "theirs")
    assert mine["losses"] == [[s, pytest.approx(loss, abs=1e-4)] for s, loss in theirs]


def _run(train, out):
    assert train(out).code == 0
    return out


def _losses_of(model, prepared, folder, optimizer=None):
    config = TrainConfig(steps=4, batch_size=2, learning_rate=0.01, save_every=None)
    arguments = arguments_of(config, folder, keep=False)
    trainer = Trainer(
        model, arguments, prepared.collator, prepared.dataset,
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    return [[e["step"], e["loss"]] for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("init", LEAVE_BASE)
def test_other_starts_reach_peft(train, tmp_path, tiny_model_folder, trained_logits, init):
    answer = train(tmp_path / "out", "--init-lora-weights", init)
    assert answer.code == 0, answer.err
    logits, model = plain_logits(tmp_path / "out", tiny_model_folder)
    torch.testing.assert_close(logits, trained_logits["logits"], rtol=0, atol=2e-5)
    config = model.peft_config["default"]
    assert str(config.init_lora_weights).lower() == init and config.r == 2


def test_a_run_with_such_a_start_goes_on_from_its_checkpoint(
    train, tmp_path, mask_file, monkeypatch
):
    more = ("--init-lora-weights", "pissa", "--mask", mask_file, "--loraplus-lr-ratio", "4")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole, *more).code == 0
    from ila.training.callbacks import LogFile

    real = LogFile.on_log

    def stop(self, args, state, control, logs=None, **kwargs):
        real(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LogFile, "on_log", stop)
        assert train(cut, *more).code != 0
    assert train(cut, *more, "--resume").code == 0
    assert load_run(cut)["losses"] == load_run(whole)["losses"]
    one, other = (load_file(run / "adapter_model.safetensors") for run in (whole, cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert train(cut, *more, "--resume").code == 0  # a finished run is read again


def test_such_a_run_is_merged_described_and_repeated(ila, train, tmp_path, tiny_model_folder):
    out = tmp_path / "out"
    assert train(out, "--init-lora-weights", "olora", "--loraplus-lr-ratio", "8").code == 0
    logits, _ = plain_logits(out, tiny_model_folder)
    assert ila("export", out, "--merge", "--out", tmp_path / "merged").code == 0
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, logits, rtol=0, atol=2e-5)
    card = (out / "README.md").read_text()
    assert "rank 4, alpha 32." in card and "It began as `olora` of rank 2." in card
    assert json.loads((out / "run.json").read_text())["inputs"]["init_lora_weights"] == "olora"
    again = ila("train", "--config", out / "config.yaml", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert load_run(tmp_path / "again")["losses"] == load_run(out)["losses"]


def test_a_file_takes_true_and_false_for_a_start(ila, source, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("init_lora_weights: false\nsteps: 2\nbatch_size: 2\nloraplus_lr_ratio: 2\n")
    answer = ila("train", *source, "--config", file, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert adapter["init_lora_weights"] is False
    assert load_run(tmp_path / "out")["config"]["loraplus_lr_ratio"] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--init-lora-weights", "pisa"), "init_lora_weights must be one of true, false, gaussian"),
        (("--init-lora-weights", "pissa_niter_0"), "got 'pissa_niter_0'"),
        (("--init-lora-weights", "eva"), "needs a step of PEFT's before the adapter is attached"),
        (("--init-lora-weights", "pissa", "--load-in", "4bit"), "leave out load_in"),
        (("--init-lora-weights", "pissa", "--rank", "100"), "rank must be ≤"),
        (("--init-lora-weights", "olora", "--select-at", "0.5", "--top", "0.5"), "--select-at"),
        (("--init-lora-weights", "gaussian", "--adapter", "adalora"), "does nothing with adapter"),
        (("--init-lora-weights", "true", "--from", "x", "--mask", "m"), "no --init-lora-weights"),
        (("--loraplus-lr-ratio", "4", "--optim", "lomo"), "training_args optim"),
        (("--loraplus-lr-ratio", "0"), "loraplus_lr_ratio must be positive, got 0.0"),
    ],
)
def test_starts_and_rates_that_do_not_fit_are_one_line(train, tmp_path, options, said):
    assert said in train(tmp_path / "out", *options).error()
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    "option", [("--init-lora-weights", "pissa"), ("--loraplus-lr-ratio", "4")], ids="".join
)
def test_a_training_in_full_has_no_start_and_no_loraplus(ila, source, tmp_path, option):
    without_rank = source[: source.index("--rank")]
    answer = ila("train", *without_rank, "--out", tmp_path / "out", "--full", *option)
    assert f"{option[0]} does nothing here: --full trains no adapter" in answer.error()


def test_a_search_refuses_a_start_that_takes_a_part_of_the_base(learn, tmp_path):
    line = learn(tmp_path / "out", "--init-lora-weights", "pissa").error()
    assert "a search scores updates that begin at zero" in line
    assert learn(tmp_path / "out", "--init-lora-weights", "gaussian").code == 0


def test_loraplus_has_the_groups_and_losses_of_peft(train, source, tmp_path, monkeypatch):
    rates = {}
    real = Trainer.create_scheduler

    def look(self, num_training_steps, optimizer=None):
        named = {id(p): name for name, p in self.model.named_parameters()}
        for group in (optimizer or self.optimizer).param_groups:
            rates.update({named[id(p)]: group["lr"] for p in group["params"]})
        return real(self, num_training_steps, optimizer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "create_scheduler", look)
        answer = train(tmp_path / "out", "--loraplus-lr-ratio", "16")
    assert answer.code == 0, answer.err
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {0.01}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {0.16}
    assert len(rates) == 28
    prepared = prepare(Inputs(model=source[1], data=source[3], rank=2), progress=False)
    base = AutoModelForCausalLM.from_pretrained(source[1])
    set_seed(0)
    lora = LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16, betas=(0.9, 0.999), eps=1e-8
    )
    theirs = _losses_of(model, prepared, tmp_path / "theirs", optimizer)
    mine = load_run(tmp_path / "out")["losses"]
    assert mine == [[s, pytest.approx(loss, abs=1e-5)] for s, loss in theirs]
    plain = load_run(_run(train, tmp_path / "plain"))["losses"]
    assert abs(plain[-1][1] - mine[-1][1]) > 1e-3


def test_loraplus_reaches_both_halves_of_one_run_and_stage_1(learn, train, tmp_path):
    one = ("--select-at", "0.5", "--top", "0.3", "--steps", "8")
    plus = ("--loraplus-lr-ratio", "16")
    for verb, more in ((learn, ()), (train, one)):
        for name, options in (("plain", ()), ("plus", plus)):
            answer = verb(tmp_path / f"{name}{len(more)}", *more, *options)
            assert answer.code == 0, answer.err
    logs = {
        name: [
            json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("plain0", "plus0", "plain6", "plus6")
    }
    for plain, plus_run in (("plain0", "plus0"), ("plain6", "plus6")):
        both = zip(logs[plain], logs[plus_run], strict=True)
        trained = [(a["loss"], b["loss"]) for a, b in both if a["stage"] in ("stage1", "train")]
        assert trained[0][0] == trained[0][1] and trained[-1][0] != trained[-1][1]
