"""One call of a layer and one of a group, as the tests of every implementation on a GPU make it."""

from torch import Tensor

from ila_kernels import masked_lora_linear, masked_lora_linear_group
from ila_kernels.testing import Inputs


def linear(i: Inputs, dropout_p: float = 0.0, *, impl: str) -> Tensor:
    """y of one layer."""
    return masked_lora_linear(
        i.x, i.weight, i.lora_a, i.lora_b, i.gate, bias=i.bias, scale=1.7, dropout_p=dropout_p,
        impl=impl,
    )  # fmt: skip


def group(i: Inputs, dropout_p: float = 0.0, *, impl: str) -> Tensor:
    """A sum of three outputs: with a gate, closed, and of a lower rank."""
    weights, gates, biases = [i.weight] * 3, [i.gate, None, None], [i.bias, i.bias, None]
    lora_as, lora_bs = [i.lora_a, None, i.lora_a[:2]], [i.lora_b, None, i.lora_b[:, :2]]
    ys = masked_lora_linear_group(
        i.x, weights, lora_as, lora_bs, gates, biases=biases, scales=[1.7, 1.0, 0.5],
        dropout_p=dropout_p, impl=impl,
    )  # fmt: skip
    return ys[0] + 0.5 * ys[1] + ys[2]
