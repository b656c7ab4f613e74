"""Inputs of realistic size and a tolerance without a knob, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ila_kernels.functional import masked_lora_linear

NAMES = ("x", "weight", "lora_a", "lora_b", "gate", "bias")


@dataclass(frozen=True)
class Inputs:
    """The tensors of one masked LoRA linear, and dy (M, N) to run it backward with."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor | None
    bias: Tensor | None
    dy: Tensor

    def wanted(self) -> dict[str, Tensor]:
        """Return the inputs that require grad, by name."""
        named = {name: getattr(self, name) for name in NAMES}
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}

    def cast(self, dtype: torch.dtype) -> Inputs:
        """Copy everything to one dtype; the same inputs require grad."""
        copies = {"dy": self.dy.to(dtype)}
        for name in NAMES:
            tensor = getattr(self, name)
            if tensor is not None:
                tensor = tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)
            copies[name] = tensor
        return Inputs(**copies)

    def wanting(self, requires: Iterable[str]) -> Inputs:
        """Copy (not the values) so that exactly the named inputs require grad."""
        requires = set(requires)
        named = {name: getattr(self, name) for name in NAMES}
        return replace(
            self,
            **{
                name: t if t is None else t.detach().requires_grad_(name in requires)
                for name, t in named.items()
            },
        )


def make_inputs(
    m: int,
    k: int,
    n: int,
    r: int,
    *,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    gate: float | None = None,
    bias: bool = False,
    seed: int = 0,
    requires: Iterable[str] = NAMES,
) -> Inputs:
    """Draw inputs as large as the tensors of a transformer in training.

    x is normalised (σ = 1), W and A keep that size (σ = 1/√K), the update is 0.3 of the base
    output. dy is noise plus the direction of the update itself: dγ = ⟨dy, update⟩ is one sum over
    M·N terms, and where such a sum cancels it measures luck, not an implementation.

    Args:
        m: Rows M (tokens).
        k: In-features K.
        n: Out-features N.
        r: Rank R.
        dtype: Of x, weight, bias and dy.
        adapter_dtype: Of lora_a, lora_b and the gate; ``dtype`` if ``None``.
        device: Where the tensors live; the values do not depend on it.
        gate: Value of γ, or ``None`` for no gate.
        bias: Whether there is a base bias.
        seed: Of the values, which are drawn in fp64: two dtypes differ by rounding only.
        requires: Names of the inputs that require grad.

    Returns:
        The inputs; all leaves, contiguous.

    >>> inputs = make_inputs(2, 3, 4, 1, dtype=torch.bfloat16, gate=0.5, requires=["lora_a"])
    >>> inputs.gate.shape, list(inputs.wanted())
    (torch.Size([1]), ['lora_a'])
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

    x, noise = normal(m, k), normal(m, n)
    weight, lora_a = normal(n, k, std=max(k, 1) ** -0.5), normal(r, k, std=max(k, 1) ** -0.5)
    lora_b, base_bias = normal(n, r, std=0.3 * r**-0.5), normal(n)
    update = x @ lora_a.t() @ lora_b.t()
    dy = noise + update / 0.3

    adapter_dtype = adapter_dtype or dtype
    tensors = {
        "x": x.to(device, dtype),
        "weight": weight.to(device, dtype),
        "lora_a": lora_a.to(device, adapter_dtype),
        "lora_b": lora_b.to(device, adapter_dtype),
        "gate": None if gate is None else torch.tensor([gate], dtype=adapter_dtype, device=device),
        "bias": base_bias.to(device, dtype) if bias else None,
        "dy": dy.to(device, dtype),
    }
    return Inputs(**tensors).wanting(requires)


def values_and_grads(function: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Run ``function`` and its backward; return ``{"y": …, "dx": …}`` with wanted gradients."""
    y = function(inputs)
    wanted = inputs.wanted()
    grads = torch.autograd.grad(y, list(wanted.values()), inputs.dy) if wanted else ()
    return {"y": y.detach()} | {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}


def assert_within_rounding(
    actual: Tensor, expected_fp64: Tensor, same_dtype_eager: Tensor, name: str = "result"
) -> None:
    """Assert that ``actual`` is as right as its dtype lets plain eager code be.

        max|actual − fp64| ≤ 2 · (max|eager − fp64| + eps · max|fp64|)

    The maxima run over all elements: where sums cancel, the error of an element follows the size
    of its terms, which its own value does not show and its neighbours' do. ``max|fp64|`` is that
    size. ``eps`` is ``finfo(same_dtype_eager.dtype).eps``, the spacing of that dtype at 1 and
    twice the error of one rounding: of storing the result, which nothing avoids, and of one
    intermediate result, for a chain may be split elsewhere than in eager. Eager measures the
    further error of the sums. The factor 2 is there because both may be as far from fp64,
    on opposite sides. Nothing in it can be set by the caller.

    Args:
        actual: The result in question.
        expected_fp64: The specification run in fp64 on the same values.
        same_dtype_eager: The specification run in the dtype that ``actual`` was computed in.
            That is the dtype of x: dA of an fp32 A over a bf16 x is a bf16 result.
        name: Name of the value in the error message.

    Raises:
        AssertionError: If it is further away, or not finite; tells the ratio of error to bound.

    >>> third = torch.tensor([1 / 3], dtype=torch.float64)
    >>> assert_within_rounding(third.bfloat16(), third, third.bfloat16())
    >>> assert_within_rounding(third.bfloat16() * 1.1, third, third.bfloat16(), "y")
    Traceback (most recent call last):
    AssertionError: y: error 0.0339 is 5.2 x the bound 0.00651 (eager is 0.00065 off, bfloat16)
    """
    if actual.shape != expected_fp64.shape:
        raise AssertionError(
            f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected_fp64.shape)}"
        )
    if expected_fp64.dtype != torch.float64:
        raise TypeError(f"{name}: expected_fp64 must be float64, got {expected_fp64.dtype}")
    if actual.numel() == 0:
        return
    expected = expected_fp64.detach()
    error = (actual.detach().double() - expected).abs().max().item()
    eager = (same_dtype_eager.detach().double() - expected).abs().max().item()
    dtype = same_dtype_eager.dtype
    bound = 2.0 * (eager + torch.finfo(dtype).eps * expected.abs().max().item())
    if not error <= bound:  # a NaN on either side fails
        ratio = error / bound if bound else float("inf")
        raise AssertionError(
            f"{name}: error {error:.3g} is {ratio:.2g} x the bound {bound:.3g} "
            f"(eager is {eager:.2g} off, {str(dtype).removeprefix('torch.')})"
        )


def assert_matches_reference(
    inputs: Inputs,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    impl: str = "auto",
) -> dict[str, Tensor]:
    """Assert that y and every wanted gradient are within rounding and in their own dtypes.

    Args:
        inputs: Arguments of the call; the computation has the dtype of ``inputs.x``.
        scale: α.
        dropout_p: p; positive only with a ``seed``, so that all runs share one mask.
        seed: As in ``masked_lora_linear``.
        impl: As in ``masked_lora_linear``.

    Returns:
        The results of ``impl``, as ``values_and_grads`` returns them.
    """

    def run(word: str) -> Callable[[Inputs], Tensor]:
        return lambda i: masked_lora_linear(
            i.x,
            i.weight,
            i.lora_a,
            i.lora_b,
            i.gate,
            bias=i.bias,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
            impl=word,
        )

    actual = values_and_grads(run(impl), inputs)
    expected = values_and_grads(run("reference"), inputs.cast(torch.float64))
    eager = values_and_grads(run("reference"), inputs.cast(inputs.x.dtype))
    for name, value in actual.items():
        own = inputs.x if name == "y" else inputs.wanted()[name[1:]]
        if value.dtype != own.dtype:
            raise AssertionError(f"{name}: dtype {value.dtype}, expected {own.dtype}")
        peer = eager[name]
        if torch.finfo(own.dtype).eps > torch.finfo(peer.dtype).eps:
            peer = peer.to(own.dtype)  # a bf16 A over an fp32 x: its gradient is stored in bf16
        assert_within_rounding(value, expected[name], peer, name)
    return actual
