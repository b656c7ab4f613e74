"""`ila tune` where there is no GPU, and the shapes that it would measure."""

from ila.commands.tune import shapes_of
from ila.price.shapes import Shape


def test_without_a_gpu_it_says_so_and_exits_with_1(ila, tiny_model_folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    answer = ila("tune", "--model", str(tiny_model_folder))
    assert answer.code == 1
    assert answer.err.strip() == "error: PyTorch sees no GPU here, so nothing was measured"


def test_shapes_are_the_layers_of_a_block_that_read_one_x():
    # Llama-3-8B: 32 heads of 128, 8 of keys and values.
    shape = Shape(32, 4096, 14336, 32, 8, 128, 128_256, False, rank=16, rows=1, length=8192)
    assert shapes_of(shape) == [
        (4096, (4096, 1024, 1024)),
        (4096, (4096,)),
        (4096, (14336, 14336)),
        (4096, (14336,)),
        (14336, (4096,)),
    ]
