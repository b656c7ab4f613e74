"""How kernels are launched: the precision of products, seeds under a capture."""

import pytest
import torch

pytest.importorskip("triton")

from ila_kernels import masked_lora_linear
from ila_kernels.kernels import launch, selfcheck
from ila_kernels.testing import make_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def switches():
    """PyTorch's two switches of tf32, put back after the test."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"


def set_all(value: str) -> None:
    torch.backends.fp32_precision = value


def set_matmul(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def set_old(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


SWITCHED = [
    ("nothing", [], False),
    ("the old switch", [(set_old, True)], True),
    ("the old switch, and back", [(set_old, True), (set_old, False)], False),
    ("the new switch of products", [(set_matmul, "tf32")], True),
    ("the new switch of everything", [(set_all, "tf32")], True),
    ("everything, but not products", [(set_all, "tf32"), (set_matmul, "ieee")], False),
    ("products to ieee", [(set_matmul, "ieee")], False),
]


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="PyTorch 2.9 brought the new switch"
)
@pytest.mark.parametrize(
    ("settings", "allowed"), [row[1:] for row in SWITCHED], ids=[row[0] for row in SWITCHED]
)
def test_tf32_follows_whichever_switch_was_set(switches, settings, allowed):
    for setting, value in settings:
        setting(value)
    assert launch.precision(FP32, "sm_90") == ("tf32" if allowed else "ieee")
    assert launch.precision(FP32, "gfx942") == ("tf32" if allowed else "ieee")
    for dtype, target in ((FP32, "gfx90a"), (FP32, "unknown"), (BF16, "sm_90"), (FP16, "sm_90")):
        assert launch.precision(dtype, target) == "ieee"


def test_the_old_switch_is_read_where_there_is_no_new_one(monkeypatch):
    class Matmul:
        allow_tf32 = True

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
    assert launch.precision(FP32, "sm_80") == "tf32"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_kernels_run_under_the_new_switch_of_tf32(switches, dtype, monkeypatch):
    monkeypatch.setattr(selfcheck, "_passed", set())
    set_matmul("tf32")
    i = make_inputs(20, 24, 40, 4, dtype=dtype, device="cuda")
    masked_lora_linear(i.x, i.weight, i.lora_a, i.lora_b, impl="triton").backward(i.dy)
    assert i.lora_b.grad.isfinite().all()


# --- CUDA graphs


@pytest.fixture
def capture(monkeypatch):
    """A capture from here on, on a machine that need not have a GPU."""

    def begin():
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


def test_a_seed_is_not_frozen_into_a_captured_graph(capture):
    seed = torch.tensor([5])
    assert launch.seed_number(seed) == 5
    capture()
    with pytest.raises(RuntimeError, match="dropout_p must be 0 while a CUDA graph is captured"):
        launch.seed_number(seed)


@pytest.mark.gpu
def test_dropout_under_a_capture_is_refused_and_a_call_without_runs(capture):
    i = make_inputs(20, 24, 40, 4, dtype=FP16, device="cuda", requires=())
    selfcheck.ensure(torch.device("cuda", 0))
    capture()
    masked_lora_linear(i.x, i.weight, i.lora_a, i.lora_b, impl="triton")
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        masked_lora_linear(i.x, i.weight, i.lora_a, i.lora_b, dropout_p=0.1, impl="triton")


def test_the_first_use_of_a_device_is_no_part_of_a_graph(capture, monkeypatch):
    monkeypatch.setattr(selfcheck, "_passed", set())
    monkeypatch.setattr(selfcheck, "check", lambda device: None)
    capture()
    with pytest.raises(RuntimeError, match="run one step before the capture"):
        selfcheck.ensure(torch.device("cuda", 0))
