"""A merge into a model whose layers share a weight computes what the adapted model computed."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import ila
from ila.models.merge import merge, untie

CASES = {
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "both": {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    "both, tied": {
        "target_modules": ["lm_head", "embed_tokens", "q_proj"],
        "ensure_weight_tying": True,
    },
    "neither": {"target_modules": ["q_proj"]},
    "rows of the embedding": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "a saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def tied_base(tiny, folder, kind="llama"):
    base = tiny.base(kind, tie_word_embeddings=True) if kind != "qwen2" else qwen2()
    base.save_pretrained(folder)
    return base


def qwen2():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).double()


# PEFT says of these adapters what it does with the embedding, and of a merge what goes wrong.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("case", CASES)
def test_a_merge_into_tied_weights(tiny, tmp_path, case, kind):
    model = tiny.attached(tiny.config(**CASES[case]), tied_base(tiny, tmp_path / "base", kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("modules_to_save" in name or "token_" in name):
                parameter += 0.1 * torch.randn_like(parameter)
    expected = model.eval()(tiny.tokens()).logits
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    whole = merge(tiny.loaded(base, tmp_path / "adapter")).eval()
    torch.testing.assert_close(whole(tiny.tokens()).logits, expected, rtol=1e-6, atol=1e-6)
    whole.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    torch.testing.assert_close(again(tiny.tokens()).logits, expected, rtol=1e-6, atol=1e-6)


def test_only_weights_of_adapted_layers_are_untied(tiny):
    base = tiny.base(tie_word_embeddings=True)
    model = tiny.attached(tiny.config(), base)
    assert untie(model) == [] and base.lm_head.weight is base.model.embed_tokens.weight
    model = tiny.attached(tiny.config(target_modules=["lm_head"]), tiny.base())
    assert untie(model) == []
    config = tiny.config(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]])
    model = tiny.attached(config)
    assert len(untie(model)) == 2  # each block twice; the last keeps what it had
    expected = model(tiny.tokens()).logits
    got = model.merge_and_unload()(tiny.tokens()).logits
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("closed", ["nothing", "layers", "the embedding's neighbours"])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"], ["lm_head"]])
def test_an_embedding_that_changed_is_saved_beside_its_adapter(tiny, tmp_path, targets, closed):
    base = tiny.base()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.model.embed_tokens.weight[-4:] += 1.0
        base.lm_head.weight[-4:] += 0.5
    model = tiny.attached(tiny.config(target_modules=[*targets, "q_proj", "up_proj"]), base).eval()
    if closed != "nothing":
        ends = ("0.self_attn.q_proj",) if closed == "layers" else ("0.self_attn.q_proj", "up_proj")
        ila.apply_mask(model, tiny.mask(model, lambda at, name: name.endswith(ends)))
    ids = tiny.tokens().fill_(62)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    plain = tiny.loaded(base, tmp_path / "adapter")
    if "embed_tokens" in targets and "lm_head" not in targets:
        # The head has no adapter, and PEFT saves no module that has none.
        plain.get_base_model().lm_head.weight.data.copy_(model.get_base_model().lm_head.weight)
    if "embed_tokens" not in targets:
        embedding = model.get_base_model().model.embed_tokens.weight
        plain.get_base_model().model.embed_tokens.weight.data.copy_(embedding)
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-10, atol=1e-10)


# --- a vocabulary that grew


def grown(folder, rows=None):
    """The base of a folder with six more tokens, whose rows are drawn, or all alike."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    base.resize_token_embeddings(70, mean_resizing=False)
    with torch.no_grad():
        for at, layer in enumerate((base.get_input_embeddings(), base.get_output_embeddings())):
            torch.manual_seed(at)
            layer.weight[64:] = torch.randn(6, 32).double() if rows is None else rows
    return base


def saved_by_peft(tiny, base, targets, folder):
    """What PEFT saves of an adapter of these layers alone, without its own tensors."""
    tiny.plain(tiny.config(target_modules=targets), base).save_pretrained(folder)
    return {name for name in load_file(folder / "adapter_model.safetensors") if "lora_" not in name}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("closed", ["lm_head", "up_proj"])
def test_a_head_beside_an_adapter_whose_vocabulary_grew(tiny, tmp_path, tied, closed):
    """Closed, it is saved under the name of a head without an adapter, as PEFT finds it."""
    tiny.base(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    targets = ["q_proj", "up_proj", "lm_head"]
    model = tiny.attached(tiny.config(target_modules=targets), grown(tmp_path / "base")).eval()
    ila.apply_mask(model, tiny.mask(model, lambda at, name: name.endswith(closed)))
    ids = 60 + tiny.tokens() % 10
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "ours")
    weights = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    beside = {name for name in weights if "lora_" not in name}
    left = [name for name in targets if name != closed]
    assert beside == saved_by_peft(tiny, grown(tmp_path / "base"), left, tmp_path / "peft")
    # The embedding comes back where PEFT saves it too: beside a head that has no adapter.
    other = grown(tmp_path / "base", rows=0.0 if closed == "lm_head" else None)
    again = tiny.loaded(other, tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("closed", [False, True])
def test_the_state_of_a_head_is_loaded_under_either_name(tiny, closed):
    base = tiny.base()
    model = tiny.attached(tiny.config(target_modules=["q_proj", "lm_head"]), base)
    if closed:
        ila.apply_mask(model, tiny.mask(model, lambda at, name: name.endswith("lm_head")))
    head = "base_model.model.lm_head"
    for name in (f"{head}.weight", f"{head}.base_layer.weight"):
        state = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
        state.pop(f"{head}.weight" if closed else f"{head}.base_layer.weight")
        state[name] = torch.full_like(base.lm_head.weight, 2.0)
        if not closed and name == f"{head}.weight":
            with pytest.raises(RuntimeError, match="Unexpected key"):
                model.load_state_dict(state)
            continue
        model.load_state_dict(state)
        assert (model.get_submodule(head).base_layer.weight == 2.0).all()
        assert (f"{head}.weight" in model.state_dict()) == closed
        with torch.no_grad():
            model.get_submodule(head).base_layer.weight.zero_()
