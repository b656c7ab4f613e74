"""The self-check launches every form that training does, and reports one that writes nothing."""

import pytest
import torch

pytest.importorskip("triton")

from ila_kernels import masked_lora_linear_group
from ila_kernels.kernels import selfcheck
from ila_kernels.kernels.launch import Launch
from ila_kernels.testing import make_inputs

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
# Which arguments a kernel writes; of what it writes nothing, zeros are seen.
OUTPUTS = {
    "_shrink": ("t_ptrs",),
    "_lowrank_gemm": ("c_ptr",),
    "_joined_gemm": ("c_ptrs",),
    "_grad_out": ("u_ptr", "db_ptr"),
    "_grad_a": ("da_ptrs",),
    "_sum_partials": ("out_ptrs", "inner_ptrs"),
}

# Which argument tells how many adapters, outputs or sums a launch serves.
SEVERAL = {
    "_shrink": ("a_ptrs",),
    "_grad_a": ("u_ptrs",),
    "_joined_gemm": ("c_ptrs",),
    "_sum_partials": ("out_ptrs",),
}


def form(launch: Launch) -> str:
    """Name the code that a launch runs: a kernel, and what its arguments leave in of it."""
    z, words = launch.arguments, [launch.kernel.fn.__name__]
    words += [f"of {len(z[name])}" for name in SEVERAL.get(words[0], ())]
    words += [name for name in ("DROPOUT", "HAS_UPDATE", "ACCUMULATE") if z.get(name)]
    for name in ("gate_ptr", "gate_ptrs", "inner_ptrs"):
        value = z.get(name)
        held = value if isinstance(value, tuple) else (value,)
        words += [name] if any(one is not None for one in held) else []
    return " ".join(words)


@pytest.fixture
def launched(monkeypatch):
    """Every form that was launched; the one named by ``launched.silent`` writes nothing."""
    run = Launch.run

    class Forms(list):
        silent = ""

    def spy(launch):
        forms.append(form(launch))
        if forms[-1] != forms.silent:
            return run(launch)
        adds = launch.arguments.get("ACCUMULATE")
        for name in () if adds else OUTPUTS[launch.kernel.fn.__name__]:
            value = launch.arguments[name]
            for tensor in value if isinstance(value, tuple) else (value,):
                if tensor is not None:
                    tensor.zero_()
        return None

    forms = Forms()
    monkeypatch.setattr(Launch, "run", spy)
    return forms


def train(count: int, dropout_p: float) -> None:
    rows = [make_inputs(20, 24, 40, 3, dtype=torch.float16, device="cuda") for _ in range(count)]
    names = ("weight", "lora_a", "lora_b", "gate")
    columns = [[getattr(row, name) for row in rows] for name in names]
    ys = masked_lora_linear_group(rows[0].x, *columns, dropout_p=dropout_p, impl="triton")
    torch.autograd.backward(ys, [row.dy for row in rows])


def test_it_launches_every_form_that_training_does(launched):
    selfcheck.check(DEVICE)
    checked = set(launched)
    assert len(launched) == 68  # as its docstring says: a first use stays cheap
    launched.clear()
    selfcheck._passed.add((DEVICE, None))
    for count in (1, 2, 3):
        for dropout_p in (0.0, 0.3):
            train(count, dropout_p)
    assert launched
    assert set(launched) <= checked


FORMS = [
    *(
        f"{kernel} of {n}{word}"
        for kernel in ("_shrink", "_grad_a")
        for n in (1, 2, 3)
        for word in ("", " DROPOUT")
    ),
    *(
        f"_lowrank_gemm{word} HAS_UPDATE{rest}"
        for word in ("", " DROPOUT")
        for rest in ("", " gate_ptr", " ACCUMULATE")
    ),
    "_grad_out",
    *(f"_joined_gemm of {n}" for n in (2, 3)),
    *(f"_sum_partials of {n}" for n in (1, 2, 3)),
    "_sum_partials of 2 gate_ptrs",
    "_sum_partials of 2 gate_ptrs inner_ptrs",
]


@pytest.mark.parametrize("silent", FORMS)
def test_a_form_that_writes_nothing_is_reported(launched, silent):
    launched.silent = silent
    with pytest.raises(RuntimeError, match=r"compute wrong results on cuda.*impl='eager'"):
        selfcheck.check(DEVICE)
    assert silent in launched
