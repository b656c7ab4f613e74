"""A layer that the model never calls is scored, and no other layer is ranked below it."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ila
from ila.models.loading import Source, identity, same_layers

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "use_cache": False}
ROWS = [{"input_ids": [*range(at, at + 9)], "labels": [*range(at, at + 9)]} for at in range(8)]
METHODS = ["ila", "path", "gate_gradient", "gradient_norm", "output_norm", "update_norm"]


def base(**changes) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES | changes))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_never_called_comes_last(method):
    model = base()
    model.model.layers[1].self_attn.spare_proj = nn.Linear(16, 16, bias=False)
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "spare_proj"], task_type="CAUSAL_LM")
    config = ila.SearchConfig(method=method, stage1_steps=2, stage2_steps=5, batch_size=2)
    mask = ila.learn_mask(ila.attach(model, lora), ROWS, config, progress=False)
    (spare,) = (name for name in mask.scores if name.endswith("spare_proj"))
    assert len(mask) == 5
    assert mask.scores[spare] == (min(mask.scores.values()) if method == "ila" else 0.0)


# --- which model a mask is for


def fingerprints(**changes):
    return identity(base(**changes), Source("somewhere"))


@pytest.mark.parametrize(
    "changes",
    [
        {"initializer_range": 0.5},
        {"rms_norm_eps": 1e-3},
        {"vocab_size": 40},
        {"architectures": ["Own"]},
        {"unsloth_fixed": True},
        {"transformers.js_config": {"dtype": "q4"}},
        {"max_position_embeddings": 77},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"tie_word_embeddings": True},
        {"attention_dropout": 0.3},
        {"pretraining_tp": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_leaves_the_layers_alone_is_the_same_model(changes):
    assert same_layers(fingerprints(), fingerprints(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 32},
        {"intermediate_size": 20},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 1},
        {"head_dim": 4},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_layers_are_another_model(changes):
    assert not same_layers(fingerprints(), fingerprints(**changes))


def test_a_mask_of_an_older_version_still_fits_its_model():
    def old(**changes):
        found = fingerprints(**changes)
        del found["layers_fingerprint"]
        return found

    assert same_layers(old(), fingerprints()) and same_layers(old(rms_norm_eps=0.1), fingerprints())
    assert not same_layers(old(intermediate_size=20), fingerprints())
    assert same_layers({}, fingerprints()) and same_layers(fingerprints(), {})


def test_a_packed_or_rounded_copy_is_the_same_model():
    model = base()
    first = identity(model, Source("somewhere"))
    assert same_layers(first, identity(model.to(torch.bfloat16), Source("elsewhere")))
