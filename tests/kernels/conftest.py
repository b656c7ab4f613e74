"""What the tests of the kernels share."""

import sys

import pytest
import torch

from ila_kernels import functional


@pytest.fixture
def plain_tensors(monkeypatch):
    """Fake tensors refuse the device that emulation makes every tensor name, so it names none.

    Without one the public functions would not take impl="triton", and Dynamo would ask a CUDA
    device for its generator.
    """
    torch._dynamo.reset()
    if "ttsem" in sys.modules:
        for name in ("device", "is_cuda"):
            monkeypatch.delattr(torch.Tensor, name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(functional, "_chosen", lambda impl, *_: impl)
    yield
    torch._dynamo.reset()
