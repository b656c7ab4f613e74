"""What attach refuses, that it then leaves no trace, and names that PEFT matches by their end."""

import copy
import re

import pytest
import torch
from peft import IA3Config, LoHaConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MistralConfig,
    MistralForSequenceClassification,
)

import ila
from ila.models.loading import find_source, load_model

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
HEADS = [
    (LlamaForSequenceClassification, LlamaConfig, "SEQ_CLS"),
    (MistralForSequenceClassification, MistralConfig, "SEQ_CLS"),
    (LlamaForTokenClassification, LlamaConfig, "TOKEN_CLS"),
    (LlamaForQuestionAnswering, LlamaConfig, "QUESTION_ANS"),
]


# --- a base that has adapters


def by_transformers(tiny, base):
    try:
        base.add_adapter(tiny.config())
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers refuses this peft: {error}")
    return base


def by_injection(tiny, base):
    return inject_adapter_in_model(tiny.config(), base)


def of_another_method(tiny, base):
    return inject_adapter_in_model(
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]), base
    )


def inside_of_a_peft_model(tiny, base):
    return tiny.plain(tiny.config(), base).get_base_model()


def the_tuner_of_a_peft_model(tiny, base):
    return get_peft_model(base, LoHaConfig(target_modules=["q_proj"])).base_model


def around_a_peft_model(tiny, base):
    return nn.Sequential(tiny.attached(tiny.config(), base))


def with_a_saved_module(tiny, base):
    config = tiny.config(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = tiny.plain(config, base).get_base_model()
    for block in model.model.layers:
        block.self_attn.q_proj = block.self_attn.q_proj.base_layer
    return model


@pytest.mark.parametrize(
    "make",
    [
        by_transformers,
        by_injection,
        of_another_method,
        inside_of_a_peft_model,
        the_tuner_of_a_peft_model,
        around_a_peft_model,
        with_a_saved_module,
    ],
)
def test_a_base_that_has_adapters_is_refused(tiny, make):
    model = make(tiny, tiny.base())
    before = tiny.snapshot(model)
    with pytest.raises(TypeError, match=r"got a \w+ that has adapters already"):
        ila.attach(model, tiny.config())
    assert tiny.snapshot(model) == before


def test_a_base_whose_adapters_were_unloaded_is_taken(tiny):
    base = tiny.attached(tiny.config()).unload()
    assert isinstance(ila.attach(base, tiny.config()), PeftModel)


@pytest.mark.parametrize("beside", [False, True], ids=["adapter alone", "beside a model"])
def test_a_folder_with_an_adapter_is_no_model(tiny, tmp_path, beside):
    model = tiny.attached(tiny.config())
    if beside:
        tiny.base().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a base model, but it holds an adapter"):
        load_model(find_source(str(tmp_path)))


# --- an error leaves the model as it was


class Odd(nn.Linear):
    """A linear layer that the library does not cover."""


def odd_layers(model):
    for block in model.model.layers:
        block.self_attn.q_proj.__class__ = Odd


def same(model):
    """Change nothing."""


REFUSED = {
    "replicated, then no layer of ours": (
        odd_layers,
        {"layer_replication": [[0, 2], [0, 2]], "target_modules": ["q_proj"]},
    ),
    "replicated, then no such layer": (
        same,
        {"layer_replication": [[0, 2], [1, 2]], "target_modules": ["nothing"]},
    ),
    "a norm after linear layers": (
        same,
        {"target_modules": ["q_proj", "down_proj", "input_layernorm"]},
    ),
    "PiSSA, then a norm": (
        same,
        {"target_modules": ["q_proj", "norm"], "init_lora_weights": "pissa"},
    ),
    "OLoRA, then a norm": (
        same,
        {"target_modules": ["q_proj", "norm"], "init_lora_weights": "olora"},
    ),
    "a bias to train, then a norm": (same, {"target_modules": ["q_proj", "norm"], "bias": "all"}),
    "a module to save, then a norm": (
        same,
        {"target_modules": ["q_proj", "norm"], "modules_to_save": ["lm_head"]},
    ),
    "an odd rank for orthogonal": (
        same,
        {"rank_pattern": {"down_proj": 3}, "init_lora_weights": "orthogonal"},
    ),
    "tokens beyond the embedding": (same, {"trainable_token_indices": {"nothing": [1, 2]}}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_leaves_the_model_as_it_was(tiny, case):
    change, options = REFUSED[case]
    base = tiny.base(dtype=torch.float32)
    change(base)
    base.lm_head.weight.requires_grad_(False)
    before, config = tiny.snapshot(base), copy.deepcopy(vars(base.config))
    expected, modules = base(tiny.tokens()).logits, [m for _, m in base.named_modules()]
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        tiny.attached(tiny.config(**options), base)
    assert tiny.snapshot(base) == before and vars(base.config) == config
    assert [m for _, m in base.named_modules()] == modules
    assert torch.equal(base(tiny.tokens()).logits, expected)
    assert isinstance(ila.attach(base, tiny.config(target_modules=["k_proj"])), PeftModel)


# --- names that match nothing


def test_names_that_match_nothing_are_said(tiny):
    with pytest.warns(UserWarning, match=r"names 'layers.9.up_proj', 'q_prj', and the"):
        model = tiny.attached(tiny.config(target_modules=["q_prj", "v_proj", "layers.9.up_proj"]))
    assert {name.rpartition(".")[2] for name in tiny.layers(model)} == {"v_proj"}


def test_a_warning_made_an_error_leaves_the_model_as_it_was(tiny):
    base = tiny.base()
    before = tiny.snapshot(base)
    with pytest.raises(UserWarning, match="q_prj"):
        ila.attach(base, tiny.config(target_modules=["q_prj", "v_proj"]))
    assert tiny.snapshot(base) == before


# --- names that PEFT matches by their end


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kind", "config", "task"), HEADS, ids=lambda v: getattr(v, "__name__", v))
def test_models_with_a_head_of_their_own(tiny, tmp_path, kind, config, task, masked):
    found = []
    for make in (tiny.plain, tiny.attached):
        torch.manual_seed(0)
        model = make(tiny.config(task_type=task), kind(config(**SIZES)).double()).eval()
        if masked and make is tiny.attached:
            ila.apply_mask(model, tiny.mask(model, lambda at, name: False))
        inputs = {"input_ids": tiny.tokens(2)}
        out = model(**inputs)
        logits = out.logits if hasattr(out, "logits") else out.start_logits + out.end_logits
        logits.sum().backward()
        named = model.named_parameters()
        found.append({n: p.grad for n, p in named if p.grad is not None} | {"y": logits.detach()})
        model.save_pretrained(tmp_path / make.__name__)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(
            kind(config(**SIZES)).double(), tmp_path / make.__name__, autocast_adapter_dtype=False
        )
        out = again(**inputs)
        same = out.logits if hasattr(out, "logits") else out.start_logits + out.end_logits
        torch.testing.assert_close(same, logits)
    tiny.assert_close(found[1], found[0])


def test_an_adapter_with_a_module_to_save_is_added_after_conversion(tiny):
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES)).double()
    model = tiny.converted(tiny.config(task_type=None), base)
    model.add_adapter("second", tiny.config(modules_to_save=["score"]))
    model.set_adapter("second")
    assert model(input_ids=tiny.tokens(2)).logits.shape == (2, 2)
    saved = [n for n, p in model.named_parameters() if "modules_to_save.second" in n]
    assert saved == ["base_model.model.score.modules_to_save.second.weight"]


def test_no_name_of_ours_ends_like_a_module_that_one_may_save(tiny):
    """PEFT saves every module whose name ends in that of one to save, dot or none."""
    plain, ours = tiny.plain(tiny.config()), tiny.attached(tiny.config())
    added = {n for n, _ in ours.named_modules()} - {n for n, _ in plain.named_modules()}
    assert {name.rpartition(".")[2] for name in added} == {"lora_S"}
    ends = "score classifier lm_head embed_tokens norm qa_outputs head gate router wte pooler s"
    for end in ends.split():
        assert not any(re.search(f"{end}$", name) for name in added), end
