"""The lean head's numbers: transformers' loss and gradients, from answers alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

import ila
from benchmarks.harness.gate import assert_gradients
from ila.models import lean_loss, lean_paths
from ila.models.lean_families import _MAPS
from ila.models.lean_head import lean_head, plain_head
from ila.models.lean_loss import LogitMap, sum_and_gradient
from ila.models.lean_paths import CHUNKS, TORCH, cross_entropy_sum, loss_path
from ila_kernels.testing import assert_within_rounding

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROWS, LENGTH, VOCABULARY = 3, 11, 64
WITH_TORCH = hasattr(F, "linear_cross_entropy")


@pytest.fixture(params=[TORCH, CHUNKS])
def path(request, monkeypatch):
    """Run on torch's own op where it has one, and on our chunks of four rows, in blocks of two."""
    if request.param == TORCH and not WITH_TORCH:
        pytest.skip("this torch has no linear_cross_entropy")
    monkeypatch.setattr(lean_paths, "has_torch", lambda: request.param == TORCH)
    monkeypatch.setattr(lean_loss, "CHUNK_BYTES", 4 * VOCABULARY * 8)
    monkeypatch.setattr(lean_loss, "BLOCK_BYTES", 2 * VOCABULARY * 8)
    return request.param


def ids() -> torch.Tensor:
    return torch.arange(ROWS * LENGTH).mul(17).remainder(VOCABULARY).view(ROWS, LENGTH)


def labelled(keep) -> dict[str, torch.Tensor]:
    """A batch whose labels count where ``keep(row, place)`` holds."""
    labels = ids()
    for row in range(ROWS):
        for place in range(LENGTH):
            if not keep(row, place):
                labels[row, place] = -100
    return {"input_ids": ids(), "labels": labels}


def answers(row: int, place: int) -> bool:
    return place > 3 + row


def packed() -> dict[str, torch.Tensor]:
    batch = labelled(answers)
    batch["position_ids"] = torch.cat([torch.arange(4), torch.arange(LENGTH - 4)]).repeat(ROWS, 1)
    return batch


def padded() -> dict[str, torch.Tensor]:
    batch = labelled(lambda row, place: place < LENGTH - row and answers(row, place))
    lengths = LENGTH - torch.arange(ROWS)
    return batch | {"attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long()}


BATCHES = {
    "every token is a label": lambda: labelled(lambda row, place: True),
    "answers": lambda: labelled(answers),
    "a row without labels": lambda: labelled(lambda row, place: row != 1 and answers(row, place)),
    "one label": lambda: labelled(lambda row, place: (row, place) == (2, 7)),
    "the first token alone, which nothing predicts": lambda: (
        labelled(lambda row, place: place == 0) | {"num_items_in_batch": 5}
    ),
    "a count of Trainer": lambda: labelled(answers) | {"num_items_in_batch": torch.tensor(57)},
    "a count as a number": lambda: labelled(answers) | {"num_items_in_batch": 57},
    "labels shifted already": lambda: (
        labelled(answers)
        | {"shift_labels": ids().roll(-1, 1).masked_fill(torch.arange(LENGTH) % 3 == 0, -100)}
    ),
    "packed": packed,
    "padded": padded,
}


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_formula(model: nn.Module, batch: dict) -> torch.Tensor:
    """Transformers' loss from the model's own logits; those in fp64 are not rounded to fp32."""
    inputs = {
        n: v for n, v in batch.items() if n in ("input_ids", "attention_mask", "position_ids")
    }
    logits = type(model.get_base_model()).forward(model.get_base_model(), **inputs).logits
    targets = batch.get("shift_labels", F.pad(batch["labels"], (0, 1), value=-100)[..., 1:])
    z = logits.reshape(-1, logits.shape[-1])
    z = z if z.dtype == FP64 else z.float()
    count = batch.get("num_items_in_batch")
    loss = F.cross_entropy(z, targets.reshape(-1), reduction="mean" if count is None else "sum")
    return loss if count is None else loss / count


def family(name: str, **changes) -> nn.Module:
    """A tiny model of a family, its head away from zero so that no gradient is."""
    model_type = {"SmolLM3": "smollm3", "StableLm": "stablelm", "Gemma3": "gemma3_text"}
    kind = model_type.get(
        name, "".join(f"_{c}" if c == "M" and i else c for i, c in enumerate(name))
    )
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "initializer_range": 0.2, "use_cache": False, "pad_token_id": None,
        "num_experts": 4, "num_experts_per_tok": 2,
         "num_local_experts": 4, "moe_intermediate_size": 16,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    known = AutoConfig.for_model(kind.lower())
    config = AutoConfig.for_model(
        kind.lower(), **{n: v for n, v in options.items() if hasattr(known, n)} | changes
    )
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager")


def adapted(tiny, base: nn.Module, **changes) -> nn.Module:
    torch.manual_seed(2)
    return tiny.plain(tiny.config(target_modules=["q_proj", "v_proj", "o_proj"], **changes), base)


def with_bias(base: nn.Module) -> nn.Module:
    base.lm_head = nn.Linear(32, VOCABULARY, bias=True).to(base.dtype)
    return base


MODELS = {
    "llama": lambda tiny: tiny.base(),
    "mistral": lambda tiny: tiny.base("mistral"),
    "tied": lambda tiny: tiny.base(tie_word_embeddings=True),
    "a head with a bias": lambda tiny: with_bias(tiny.base()),
    "capped logits": lambda tiny: family("Gemma2", final_logit_softcapping=2.0).double(),
    "divided logits": lambda tiny: family("Granite", logits_scaling=3.0).double(),
    "multiplied logits": lambda tiny: family("Cohere", logit_scale=0.25).double(),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP64, 1e-12), (FP32, 1e-6)])
def test_loss_and_gradients_are_those_of_transformers(tiny, path, make, batch, dtype, tolerance):
    """Relative to the whole gradient: to a small part of it, fp32 itself is further off."""
    model = adapted(tiny, MODELS[make](tiny)).to(dtype)
    loss = by_formula(model, BATCHES[batch]())
    expected = gradients(model, loss) | {"loss": loss.detach()}
    own = model(**BATCHES[batch]()).loss
    assert expected["loss"].isfinite()
    lean_head(model)
    outputs = model(**BATCHES[batch]())
    assert outputs.logits is None
    actual = gradients(model, outputs.loss) | {"loss": outputs.loss.detach()}
    error, size = (
        torch.stack([t.double().norm() for t in tensors]).norm()
        for tensors in ([actual[n] - expected[n] for n in expected], expected.values())
    )
    assert set(actual) == set(expected) and error <= tolerance * size
    assert (actual["loss"] - expected["loss"]).abs() <= tolerance * expected["loss"]
    assert own.double().item() == pytest.approx(outputs.loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", _MAPS)
def test_every_family_of_the_table_computes_its_own_loss(tiny, name):
    model = family(name).double()
    targets = [
        n for n in ("q_proj", "qkv_proj") if any(k.endswith(n) for k, _ in model.named_modules())
    ]
    model = tiny.plain(tiny.config(target_modules=targets), model).double()
    batch = BATCHES["answers"]()
    loss = by_formula(model, batch)
    expected = gradients(model, loss) | {"loss": loss.detach()}
    kind = type(model(**batch))
    lean_head(model)
    outputs = model(**batch)
    assert outputs.logits is None and type(outputs) is kind
    tiny.assert_close(gradients(model, outputs.loss) | {"loss": outputs.loss.detach()}, expected)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_16_bits_are_as_right_as_transformers_own(tiny, make, dtype):
    batch, results = BATCHES["answers"](), []
    base = adapted(tiny, MODELS[make](tiny)).to(dtype)
    for kind, lean in ((FP64, False), (dtype, False), (dtype, True)):
        model = copy.deepcopy(base).to(kind)
        if lean:
            lean_head(model)
        loss = by_formula(model, batch) if kind == FP64 else model(**batch).loss
        results.append((loss.detach(), gradients(model, loss)))
    (exact, truth), (plain, by_plain), (ours, by_ours) = results
    assert ours.dtype == FP32
    assert_gradients(by_ours, truth, by_plain, dtype)
    assert abs(ours.double() - exact) <= 2 * (
        abs(plain.double() - exact) + torch.finfo(dtype).eps * exact
    )


@pytest.mark.parametrize("count", [None, torch.tensor(12), torch.tensor(0)])
def test_a_batch_without_any_label_gives_transformers_number_and_no_gradient(tiny, path, count):
    batch = labelled(lambda row, place: False) | {"num_items_in_batch": count}
    batch = {n: v for n, v in batch.items() if v is not None}
    plain = adapted(tiny, tiny.base())
    lean = copy.deepcopy(plain)
    lean_head(lean)
    expected, actual = (model(**batch).loss for model in (plain, lean))
    assert expected.isnan() == actual.isnan() and (actual.isnan() or actual == expected)
    theirs, ours = gradients(plain, expected), gradients(lean, actual)
    tiny.assert_close(ours, theirs)
    assert all((gradient == 0).all() for gradient in ours.values())


@pytest.mark.parametrize(
    "logit_map", [LogitMap(), LogitMap(cap=1.5), LogitMap(0.3), LogitMap(2.0, 3.0)]
)
def test_the_gradient_is_the_derivative(path, logit_map):
    h, weight, bias = torch.randn(7, 5), torch.randn(9, 5), torch.randn(9)
    targets = torch.tensor([1, -100, 3, 8, -100, 0, 2])
    h, weight, bias = h.double().requires_grad_(), weight.double(), bias.double()
    check = lambda h: cross_entropy_sum(h, weight, bias, targets, logit_map)  # noqa: E731
    assert torch.autograd.gradcheck(check, (h,))


def test_a_scale_of_the_loss_reaches_the_gradient_unrounded():
    """A gradient scaler multiplies by powers of two beyond fp16's largest number."""
    for dtype in (BF16, FP16):
        h = torch.randn(6, 16).mul(1e-3).to(dtype).requires_grad_()
        weight, targets = torch.randn(40, 16).to(dtype), torch.arange(6)
        (one,) = torch.autograd.grad(cross_entropy_sum(h, weight, None, targets), h)
        (scaled,) = torch.autograd.grad(cross_entropy_sum(h, weight, None, targets) * 2.0**17, h)
        assert torch.equal(scaled, (one.float() * 2.0**17).to(dtype))
        (third,) = torch.autograd.grad(cross_entropy_sum(h, weight, None, targets) / 3, h)
        assert torch.equal(third, (one.float() * (1 / 3)).to(dtype))


def test_rows_that_do_not_count_may_hold_anything():
    h, targets = torch.randn(5, 4), torch.tensor([2, -100, 1, -100, 0])
    weight = torch.randn(6, 4)
    expected, _ = sum_and_gradient(h, weight, None, targets)
    h[1], h[3] = float("nan"), float("inf")
    total, gradient = sum_and_gradient(h, weight, None, targets)
    assert torch.equal(total, expected) and gradient.isfinite().all()


def test_nothing_of_tokens_by_vocabulary_is_kept_or_made(tiny):
    """A chunk is an eighth of the tokens; no tensor is larger than its logits, or the head.

    In fp32 there is never more than a block, an eighth of the chunk.
    """
    vocabulary, tokens = 4096, 512
    model = adapted(tiny, tiny.base(vocab_size=vocabulary, max_position_embeddings=tokens)).to(BF16)
    lean_head(model)
    ids = torch.arange(tokens).remainder(vocabulary)[None]
    kept, largest, wide = [], [], []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [
                t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)
            ]
            largest.extend(t.numel() for t in tensors)
            wide.extend(t.numel() for t in tensors if t.dtype == FP32 and vocabulary in t.shape)
            return result

    own = {p.data_ptr() for p in model.parameters()}
    pack = lambda t: kept.append(0 if t.data_ptr() in own else t.numel()) or t  # noqa: E731
    with pytest.MonkeyPatch.context() as patch, saved_tensors_hooks(pack, lambda t: t), Sizes():
        patch.setattr(lean_loss, "CHUNK_BYTES", 64 * vocabulary * 4)
        patch.setattr(lean_loss, "BLOCK_BYTES", 8 * vocabulary * 4)
        model(input_ids=ids, labels=ids).loss.backward()
    assert max(kept) < tokens * vocabulary // 16
    assert max(largest) <= max(64 * vocabulary, model.lm_head.weight.numel())
    assert max(wide) == 8 * vocabulary


def test_evaluation_makes_no_gradient(tiny, path):
    model = adapted(tiny, tiny.base()).eval()
    batch = BATCHES["answers"]()
    expected = by_formula(model, batch)
    lean_head(model)
    with torch.no_grad():
        loss = model(**batch).loss
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_under_autocast_the_loss_is_that_of_the_plain_model(tiny):
    base = adapted(tiny, tiny.base(dtype=FP32))
    batch, results = BATCHES["answers"](), []
    exact = copy.deepcopy(base).double()
    truth = gradients(exact, by_formula(exact, batch))
    for lean in (False, True):
        model = copy.deepcopy(base)
        if lean:
            lean_head(model)
        with torch.autocast("cpu", BF16):
            loss = model(**batch).loss
        results.append((loss.detach(), gradients(model, loss)))
    (plain, by_plain), (ours, by_ours) = results
    assert ours.dtype == FP32
    assert ours.item() == pytest.approx(plain.item(), rel=2**-8)
    assert_gradients(by_ours, truth, by_plain, BF16)


def test_second_derivatives_are_refused(monkeypatch):
    monkeypatch.setattr(lean_paths, "has_torch", lambda: False)
    h, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss = cross_entropy_sum(h, weight, None, torch.tensor([0, 1, 2]))
    (first,) = torch.autograd.grad(loss.square(), h, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        first.sum().backward()


def test_a_graph_may_be_run_backward_twice(path):
    h, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss = cross_entropy_sum(h, weight, None, torch.tensor([0, 1, 2]))
    one, two = (torch.autograd.grad(loss, h, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_the_operator_for_compiled_code_keeps_its_contract():
    arguments = (torch.randn(4, 3, requires_grad=True), torch.randn(5, 3), torch.randn(5))
    targets = torch.tensor([1, -100, 0, 4])
    for options in ((1.0, None, True), (0.5, 2.0, True)):
        # Its second result is for backward alone: the tests of autograd would differentiate it.
        torch.library.opcheck(
            lean_paths.lean_cross_entropy,
            (*arguments, targets, *options),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


# --- who computes it


def test_the_choice_is_a_pure_function():
    installed = {"has_torch": True, "has_liger": True}
    nothing = {"has_torch": False, "has_liger": False}
    assert loss_path(FP32, "cuda", **installed).path == "torch"
    assert loss_path(FP64, "cpu", **installed).path == "torch"
    assert loss_path(BF16, "cuda", **installed).path == "liger"
    assert loss_path(FP16, "cuda", has_torch=False, has_liger=True).path == "liger"
    assert loss_path(FP32, "cuda", has_torch=False, has_liger=True).path == "liger"
    assert loss_path(FP64, "cuda", has_torch=False, has_liger=True).path == "chunks"
    assert loss_path(BF16, "cpu", **installed).path == "chunks"
    assert loss_path(FP32, "cpu", **nothing).path == "chunks"
    assert loss_path(FP32, "cpu", LogitMap(cap=3.0), **installed).path == "chunks"
    assert loss_path(FP32, "cpu", traced=True, **installed).path == "chunks"
    reasons = {
        loss_path(d, v, **o).reason
        for d in (FP32, BF16)
        for v in ("cpu", "cuda")
        for o in (installed, nothing)
    }
    assert all(reasons) and len(reasons) == 4


def test_torchs_own_op_would_lose_the_loss_in_16_bits():
    """The reason given for our chunks; when this fails, torch's op can have its place."""
    if not WITH_TORCH:
        pytest.skip("this torch has no linear_cross_entropy")
    h, weight, targets = (
        torch.randn(300, 8).to(BF16),
        torch.randn(50, 8).to(BF16),
        torch.arange(300) % 50,
    )
    exact = F.cross_entropy(h.double() @ weight.double().T, targets, reduction="sum")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=10)
    theirs = F.linear_cross_entropy(h, weight, targets, reduction="sum", options=options)
    ours = cross_entropy_sum(h, weight, None, targets)
    assert abs(ours.double() - exact) < exact * 2**-10 < abs(theirs.double() - exact)
    assert_within_rounding(
        ours, exact, F.cross_entropy((h @ weight.T).float(), targets, reduction="sum")
    )


def test_liger_is_called_by_its_names(monkeypatch):
    """Its kernels need a GPU; here a stand-in sees what it would be given."""
    import sys
    from types import ModuleType

    calls = []

    def liger_fused_linear_cross_entropy(input, weight, target, bias=None, *, reduction="mean"):
        calls.append((target.tolist(), reduction))
        return F.cross_entropy(F.linear(input, weight, bias), target, reduction=reduction)

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    choice = lambda *args, **kwargs: lean_paths.LossPath("liger", "")  # noqa: E731
    h, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    targets = torch.tensor([1, -100, 0, 4])
    expected = cross_entropy_sum(h, weight, None, targets)
    monkeypatch.setattr(lean_paths, "loss_path", choice)
    total = cross_entropy_sum(h, weight, None, targets)
    torch.testing.assert_close(total, expected)
    assert calls == [([1, 0, 4], "sum")]
    empty = cross_entropy_sum(h, weight, None, torch.full((4,), -100))
    assert empty == 0 and len(calls) == 1


def test_plain_head_gives_the_logits_back(tiny):
    model = adapted(tiny, tiny.base())
    lean_head(model)
    assert plain_head(model) and not plain_head(model)
    assert model(**BATCHES["answers"]()).logits is not None
    assert ila.models.lean_head.head_route(model) is None
