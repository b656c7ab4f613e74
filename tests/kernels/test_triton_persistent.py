"""The persistent form of the GEMM: descriptors for P and Q, several tiles to a program."""

import math

import pytest
import torch

pytest.importorskip("triton.tools.tensor_descriptor")

from ila_kernels import masked_lora_linear, prefer
from ila_kernels.config import GEMM_PERSISTENT, SHARED_LIMIT_BYTES
from ila_kernels.device import target_of
from ila_kernels.kernels import lowrank_gemm, selfcheck
from ila_kernels.kernels.launch import Launch
from ila_kernels.testing import assert_within_rounding, make_inputs, values_and_grads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
        reason="tensor descriptors are for sm_90 and newer",
    ),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Two tiles or more each way, the last of each a rim; a tail of K; R of several steps at most tiles.
M, K, N, R = 150, 136, 264, 40


@pytest.fixture
def persistent():
    prefer(gemm="persistent")
    yield
    prefer()


@pytest.fixture
def forms(monkeypatch):
    """The form of every GEMM that was launched."""
    seen, run = [], Launch.run

    def spy(self):
        if "PERSISTENT" in self.arguments:
            seen.append("persistent" if self.arguments["PERSISTENT"] else "pointer")
        run(self)

    monkeypatch.setattr(Launch, "run", spy)
    return seen


def normal(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to("cuda", dtype)


def operands(layout: str, dtype: torch.dtype = BF16) -> dict:
    forward = layout == "forward"
    return {
        "p": normal(M, K, dtype=dtype),
        "q": normal(N, K, dtype=dtype).t() if forward else normal(K, N, dtype=dtype),
        "u": normal(M, R, dtype=dtype),
        "v": normal(N, R, dtype=FP32).t() if forward else normal(R, N, dtype=FP32),
        "gate": torch.tensor([0.7], device="cuda"),
        "bias": normal(N, dtype=dtype),
    }


def run(z: dict, programs: int, target: str = "sm_90", seed=None, dropout_p=0.0) -> torch.Tensor:
    c = torch.full((M, N), math.nan, dtype=z["p"].dtype, device="cuda")
    arguments = (z["p"], z["q"], z["u"], z["v"], c, 0.5, z["gate"], z["bias"], seed, dropout_p)
    lowrank_gemm.launch(*arguments, target, programs).run()
    return c


def expected(z: dict, dtype: torch.dtype) -> torch.Tensor:
    wide = {name: None if t is None else t.to(dtype) for name, t in z.items()}
    c = wide["p"] @ wide["q"]
    if wide["u"] is not None:
        gate = 1.0 if wide["gate"] is None else wide["gate"]
        c = c + wide["u"] @ (wide["v"] * (0.5 * gate))
    return c if wide["bias"] is None else c + wide["bias"]


@pytest.mark.parametrize("layout", ["forward", "dx"])
@pytest.mark.parametrize("target", GEMM_PERSISTENT)
def test_every_persistent_tile_is_right(target, layout):
    here = SHARED_LIMIT_BYTES.get(target_of(normal(1)), 0)
    if "fake" not in torch.cuda.get_device_name() and here < SHARED_LIMIT_BYTES[target]:
        pytest.skip("tile of a GPU with more shared memory")
    z = operands(layout)
    c = run(z, 2, target)
    assert_within_rounding(c, expected(z, torch.float64), expected(z, BF16), "C")


@pytest.mark.parametrize("absent", [("u", "v", "gate", "bias"), ("gate", "bias"), ("bias",)])
def test_what_is_absent_is_left_out(absent):
    z = operands("forward", FP16) | dict.fromkeys(absent)
    c = run(z, 3)
    assert_within_rounding(c, expected(z, torch.float64), expected(z, FP16), "C")


@pytest.mark.parametrize(("seed", "dropout_p"), [(None, 0.0), (5, 0.3)])
def test_the_number_of_programs_changes_no_bit(seed, dropout_p):
    z = operands("dx") | {"bias": None}
    one = run(z, 1, seed=seed, dropout_p=dropout_p)
    for programs in (3, 1000):
        assert torch.equal(run(z, programs, seed=seed, dropout_p=dropout_p), one)


def test_dropout_masks_as_the_pointer_form_does():
    z = operands("dx") | {"gate": None, "bias": None}
    z["p"], z["q"] = torch.zeros_like(z["p"]), torch.zeros_like(z["q"])  # the update alone
    ours = run(z, 2, seed=5, dropout_p=0.3)
    c = torch.empty_like(ours)
    pointer = (z["p"], z["q"], z["u"], z["v"], c, 0.5, None, None, 5, 0.3, "sm_90")
    lowrank_gemm.launch(*pointer).run()
    assert torch.equal(ours == 0, c == 0)
    assert 0.2 < (c == 0).double().mean() < 0.4


def aligned_inputs(**options):
    return make_inputs(M, K, N, 8, dtype=BF16, adapter_dtype=FP32, gate=0.5, bias=True, **options)


def op(i, x) -> torch.Tensor:
    return masked_lora_linear(
        x, i.weight, i.lora_a, i.lora_b, i.gate, bias=i.bias, scale=2.0, impl="triton"
    )


def test_a_layer_takes_it_forward_and_backward_where_it_is_preferred(persistent, forms):
    i = aligned_inputs(device="cuda")
    selfcheck.ensure(i.x.device)
    forms.clear()
    got = values_and_grads(lambda i: op(i, i.x), i)
    assert forms == ["persistent", "persistent"]

    def by_reference(i):
        arguments = (i.x, i.weight, i.lora_a, i.lora_b, i.gate)
        return masked_lora_linear(*arguments, bias=i.bias, scale=2.0, impl="reference")

    exact = values_and_grads(by_reference, i.cast(torch.float64))
    plain = values_and_grads(by_reference, i.cast(BF16))
    for name in ("y", "dx"):
        assert_within_rounding(got[name], exact[name], plain[name], name)


def test_an_x_that_no_descriptor_takes_goes_by_pointers(persistent, forms):
    i = aligned_inputs(device="cuda", requires=())
    selfcheck.ensure(i.x.device)
    forms.clear()
    offset = i.x.new_full((M, K + 3), math.nan)[:, 3:].copy_(i.x)  # 6 bytes past a multiple of 16
    assert_within_rounding(op(i, offset), op(i, i.x).double(), op(i, i.x), "y")
    assert forms == ["pointer", "persistent", "persistent"]


def test_a_triton_without_descriptors_is_no_error_but_a_reason(monkeypatch):
    z = operands("forward")
    assert lowrank_gemm.form(z["p"], z["q"], "sm_90", "persistent")[0] == "persistent"
    monkeypatch.setattr(lowrank_gemm, "find_spec", lambda name: None)
    lowrank_gemm.has_descriptors.cache_clear()
    try:
        chosen, why = lowrank_gemm.form(z["p"], z["q"], "sm_90", "persistent")
    finally:
        lowrank_gemm.has_descriptors.cache_clear()
    assert chosen == "pointer"
    assert "has no tensor descriptors, 3.4 has" in why


def test_the_self_check_runs_the_form_that_is_preferred(persistent, forms, monkeypatch):
    monkeypatch.setattr(selfcheck, "_passed", set())
    device = torch.device("cuda", 0)
    selfcheck.ensure(device)
    # y and dx of two members, with dropout and without; the outputs of three members and of two.
    assert forms.count("persistent") == 8 + 2 * 5
    launched = len(forms)
    selfcheck.ensure(device)
    assert len(forms) == launched
    prefer(gemm="pointer")
    selfcheck.ensure(device)
    assert "persistent" not in forms[launched:]
    assert len(forms) > launched
