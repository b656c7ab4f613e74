"""Tiny models, the same ones for plain PEFT and for ours, and comparisons that assert."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import ila

# Transformers' prefix and, beside the sizes below, the options of a family.
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),  # norms on q and k
    "olmo2": ("Olmo2", {"pad_token_id": None, "eos_token_id": None}),  # norms behind the layers
    "gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),  # GeGLU, capped scores
}
VOCABULARY = 64


def make_base(family: str = "llama", dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    """Two blocks of width 32; the weights are large enough that attention is not uniform."""
    prefix, own = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")
    model = getattr(transformers, f"{prefix}ForCausalLM")
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "use_cache": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return model(config(**options | own | changes)).to(dtype)


def make_config(**changes) -> LoraConfig:
    """Both A and B random, so that every adapter has an effect and every gradient is not zero."""
    options = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**options | changes)


def make_plain(config: LoraConfig, base: nn.Module | None = None, **options) -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(make_base() if base is None else base, config, **options)


def make_attached(config: LoraConfig, base: nn.Module | None = None, **options) -> PeftModel:
    torch.manual_seed(2)
    return ila.attach(make_base() if base is None else base, config, **options)


def make_converted(config: LoraConfig, base: nn.Module | None = None, **options) -> PeftModel:
    model = make_plain(config, base, **options)
    ila.convert(model)
    return model


def load_plain(base: nn.Module, folder) -> PeftModel:
    """An adapter over a base model, by PEFT alone, in the dtype of the base."""
    return PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()


def tokens(rows: int = 3, length: int = 7) -> Tensor:
    return torch.arange(rows * length).mul(17).remainder(VOCABULARY).view(rows, length)


def run(model: nn.Module, **inputs) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter that gets one, by name."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=inputs.pop("input_ids", tokens()), **inputs).logits
    result = {"logits": logits.detach()}
    if logits.requires_grad:
        generator = torch.Generator().manual_seed(3)
        dy = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        logits.backward(dy.to(logits.dtype))
        named = model.named_parameters()
        result |= {name: p.grad.clone() for name, p in named if p.grad is not None}
    return result


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11
) -> None:
    """Same names, shapes and dtypes; the largest difference of each tensor against its size."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        error = (actual[name].double() - tensor.double()).abs().max()
        assert error <= tolerance * tensor.double().abs().max() + 1e-14, (name, error)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def differs(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether the logits are apart by more than rounding: guards against comparing no-ops."""
    return bool((one["logits"] - other["logits"]).abs().max() > 1e-3)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def snapshot(model: nn.Module) -> tuple:
    """All that an edit could change: classes, identities, attributes, flags, bits."""
    modules = {
        name: (id(module), type(module), module.training, frozenset(vars(module)))
        for name, module in model.named_modules()
    }
    parameters = {
        name: (id(p), p.requires_grad, p.dtype, p.detach().cpu().numpy().tobytes())
        for name, p in model.named_parameters()
    }
    configs = {name: str(c.to_dict()) for name, c in getattr(model, "peft_config", {}).items()}
    return modules, parameters, configs


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ila.MaskedLoraLinear)}


def mask_of(model: nn.Module, closed: Callable[[int, str], bool]) -> ila.LayerMask:
    """The mask that closes the layers for which ``closed(position, name)`` holds."""
    names = list(layers_of(model))
    gates = {name: not closed(position, name) for position, name in enumerate(names)}
    return ila.LayerMask(dict.fromkeys(names, 1.0), gates)


@pytest.fixture
def tiny() -> SimpleNamespace:
    """The functions of this file: pytest imports the test files on their own."""
    return SimpleNamespace(
        base=make_base,
        config=make_config,
        plain=make_plain,
        attached=make_attached,
        converted=make_converted,
        loaded=load_plain,
        tokens=tokens,
        run=run,
        assert_close=assert_close,
        assert_equal=assert_equal,
        differs=differs,
        state_of=state_of,
        snapshot=snapshot,
        layers=layers_of,
        mask=mask_of,
    )


@pytest.fixture(params=["attached", "converted"])
def pair(request: pytest.FixtureRequest, tiny: SimpleNamespace) -> Callable:
    """Plain PEFT's model and ours, attached or converted, on the same weights."""

    def make(config: LoraConfig | None = None, **changes) -> tuple[PeftModel, PeftModel]:
        config = tiny.config() if config is None else config
        plain = tiny.plain(config, tiny.base(**changes))
        ours = getattr(tiny, request.param)(config, tiny.base(**changes))
        tiny.assert_equal(tiny.state_of(ours), tiny.state_of(plain))
        return plain, ours

    return make
