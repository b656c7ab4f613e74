import itertools

import pytest
import torch

import ila_kernels
from ila_kernels import choice, config
from ila_kernels.choice import Call, prefer
from ila_kernels.config import (
    GEMM_16BIT,
    GEMM_PERSISTENT,
    PERSISTENT_BY_DEFAULT,
    SHARED_LIMIT_BYTES,
    descriptor_refusal,
    gemm_form,
    gemm_tile,
    grad_tile,
    persistent_tile,
    rank_block,
    resolve_impl,
    shrink_tile,
)

TARGETS = [*GEMM_16BIT, "sm_75", "sm_86", "gfx942", "unknown", ""]
RANKS = [1, 2, 15, 16, 17, 64, 70, 256, 1000]
CALL = Call(8192, 4096, (4096,), 16, "bfloat16", "float32", False, "a GPU")


@pytest.fixture(autouse=True)
def no_preference():
    yield
    prefer()


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def assert_triton_takes(tile):
    blocks = (tile.m, tile.n, tile.k, tile.r, tile.warps)
    assert all(map(is_power_of_two, blocks)), tile
    assert tile.r >= 16  # the least of a product
    assert tile.stages >= 1


@pytest.mark.parametrize("target", TARGETS)
def test_every_request_has_a_tile_that_triton_takes(target):
    for r, width in itertools.product(RANKS, [2, 4]):
        tiles = [grad_tile(r, width, target, adapters) for adapters in (1, 2, 3)]
        for m, adapters, dropout in itertools.product([0, 1, 4096, 4097], [1, 3], [False, True]):
            tiles.append(shrink_tile(m, r, width, target, adapters, dropout))
        for m, n, dropout in itertools.product([0, 1, 64, 65, 10**6], [0, 1, 4096], [False, True]):
            tiles.append(gemm_tile(m, n, r, width, target, dropout))
        for tile in tiles:
            assert_triton_takes(tile)


@pytest.mark.parametrize("target", GEMM_PERSISTENT)
def test_every_persistent_tile_is_one_that_triton_takes(target):
    for r, dropout in itertools.product(RANKS, [False, True]):
        assert_triton_takes(persistent_tile(r, target, dropout))


def test_every_tile_fits_the_shared_memory_of_its_target():
    # What its stages hold; the compile report checks what the compiler takes.
    for tile, target in (
        *((GEMM_16BIT[t], t) for t in GEMM_16BIT),
        *((GEMM_PERSISTENT[t], t) for t in GEMM_PERSISTENT),
        *((config.GEMM_SAFE, t) for t in SHARED_LIMIT_BYTES),
    ):
        assert 2 * tile.stages * (tile.m + tile.n) * tile.k <= SHARED_LIMIT_BYTES[target], target


@pytest.mark.parametrize(
    ("sister", "target"), [("sm_103", "sm_100"), ("sm_121", "sm_120"), ("sm_87", "sm_80")]
)
def test_a_gpu_takes_the_tiles_of_its_sister_with_as_much_shared_memory(sister, target):
    assert SHARED_LIMIT_BYTES[sister] >= SHARED_LIMIT_BYTES[target]
    for table in (GEMM_16BIT, GEMM_PERSISTENT):
        assert table.get(sister) == table.get(target)


# --- sums over programs


@pytest.mark.parametrize("columns", [1, 256, 257, 1024, 4096, 14336, 10**6])
def test_rows_of_a_program_fall_as_programs_run_out_and_never_with_more_columns(columns):
    seen = [config.rows_per_program(m, columns) for m in (1, 255, 2048, 8192, 65536, 10**7)]
    assert seen == sorted(seen)  # more rows: longer stretches
    assert set(seen) <= {256, 512, 1024}
    for m, rows in zip((1, 255, 2048, 8192, 65536, 10**7), seen, strict=True):
        programs = -(-columns // 256) * -(-m // rows)
        assert rows == 256 or programs >= config.PROGRAMS
        assert rows <= config.rows_per_program(m, columns + 256)


@pytest.mark.parametrize("r", [1, 16, 32, 33, 64, 300])
def test_parts_of_k_are_there_for_few_rows_at_a_large_rank_only(r):
    for m, k in itertools.product([0, 1, 64, 2048, 4096, 4097, 10**6], [0, 1, 1024, 4096, 14336]):
        parts = config.shrink_shares(m, k, r)
        assert parts >= 1
        assert parts == 1 or (r > 32 and m <= 4096)
        assert (parts - 1) * 1024 < max(k, 1)  # no part without a product
        assert parts == 1 or parts * -(-m // 64) <= config.PROGRAMS
    assert config.shrink_shares(2048, 14336, r) == (1 if r <= 32 else 8)


def test_tiles_depend_on_m_in_two_classes_at_most():
    # Each class is one more compilation of a kernel in training with rows of any length.
    for r, adapters, dropout in itertools.product(RANKS, [1, 2, 3], [False, True]):
        tiles = {shrink_tile(m, r, 2, "sm_90", adapters, dropout) for m in range(1, 20000, 37)}
        assert len(tiles) <= 2


def test_rank_block_covers_r_or_stops_at_the_most():
    for r in range(1, 300):
        block = rank_block(r, 64)
        assert 16 <= block <= 64
        assert block >= min(r, 64)
        assert block < 2 * max(r, 16)


# --- which form of the GEMM

ALIGNED = (512, (150, 136), (136, 1), 2)


@pytest.mark.parametrize(
    ("matrix", "why"),
    [
        (ALIGNED, None),
        ((512, (150, 136), (1000, 1), 2), None),  # rows inside a wider buffer
        ((512, (150, 1), (8, 3), 2), None),  # one column: its stride is never used
        ((512, (150, 136), (136, 1), 4), None),
        ((520, (150, 136), (136, 1), 2), "starts 8 bytes past"),
        ((512, (150, 137), (137, 1), 2), "274 bytes apart"),
        ((512, (150, 136), (272, 2), 2), "2 elements apart, not 1"),
        ((512, (150, 136), (1, 150), 2), "150 elements apart, not 1"),
        ((512, (150, 136), (0, 1), 2), "0 elements apart"),  # one row, repeated
        ((512, (150, 136), (128, 1), 2), "128 elements apart"),  # rows that overlap
        ((512, (0, 136), (136, 1), 2), "not in"),
        ((512, (150, 0), (8, 1), 2), "not in"),
        ((512, (2**31, 136), (136, 1), 2), "not in"),
    ],
)
def test_a_descriptor_takes_aligned_rows_only(matrix, why):
    refusal = descriptor_refusal(*matrix)
    assert refusal is None if why is None else why in refusal


def test_what_a_descriptor_takes_triton_takes():
    tools = pytest.importorskip("triton.tools.tensor_descriptor")
    x = torch.zeros(40, 64, dtype=torch.bfloat16)
    views = [x, x[:, 8:], x[:, 1:], x[::2], x[:, ::2], x.t(), x[:, :5], x[1:, :24], x[:7, :8]]
    for view in views:
        matrix = (view.data_ptr(), tuple(view.shape), view.stride(), 2)
        try:
            tools.TensorDescriptor(view, list(view.shape), list(view.stride()), [16, 16])
        except AssertionError:
            assert descriptor_refusal(*matrix) is not None
        else:
            assert descriptor_refusal(*matrix) is None


@pytest.mark.parametrize(
    ("arguments", "form", "why"),
    [
        ({}, "pointer", "not measured on sm_90"),
        ({"preferred": "persistent"}, "persistent", "preferred"),
        ({"preferred": "pointer"}, "pointer", "preferred"),
        (
            {"preferred": "persistent", "target": "sm_80"},
            "pointer",
            "no tile of the persistent form",
        ),
        (
            {"preferred": "persistent", "target": "gfx942"},
            "pointer",
            "no tile of the persistent form",
        ),
        (
            {"preferred": "persistent", "target": "unknown"},
            "pointer",
            "no tile of the persistent form",
        ),
        ({"preferred": "persistent", "element_bytes": 4}, "pointer", "16-bit"),
        ({"preferred": "persistent", "m": 64}, "pointer", "half a tile"),
        ({"preferred": "persistent", "n": 1}, "pointer", "half a tile"),
        ({"preferred": "persistent", "refusals": ("odd", None)}, "pointer", "of P: odd"),
        ({"preferred": "persistent", "refusals": (None, "odd")}, "pointer", "of Q: odd"),
    ],
)
def test_the_form_follows_from_target_shape_and_operands(arguments, form, why):
    request = {"m": 8192, "n": 4096, "element_bytes": 2, "target": "sm_90"} | arguments
    chosen, reason = gemm_form(**request)
    assert chosen == form
    assert why in reason


def test_no_form_runs_unasked_that_was_not_measured():
    assert not PERSISTENT_BY_DEFAULT


# --- which implementation


@pytest.mark.parametrize("impl", config.KERNEL_IMPLS)
def test_asking_for_kernels_says_what_is_missing(impl, monkeypatch):
    monkeypatch.setattr(config, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=f"'{impl}' .* triton is not installed; use impl='auto'"):
        resolve_impl(impl, "cuda")
    monkeypatch.setattr(config, "has_triton", lambda: True)
    assert resolve_impl(impl, "cuda") == (impl, "asked for")
    with pytest.raises(RuntimeError, match="the tensors are on mps; use impl='auto'"):
        resolve_impl(impl, "mps")


@pytest.mark.parametrize("gpu", ["a GPU", "NVIDIA H100 80GB HBM3", "unknown"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_auto_claims_nothing_that_was_not_measured(gpu, dtype):
    call = CALL._replace(dtype=dtype, gpu=gpu)
    chosen, why = resolve_impl("auto", "cuda", call)
    assert chosen == "eager"
    assert f"not measured on {gpu} yet" in why


@pytest.mark.parametrize("impl", config.KERNEL_IMPLS)
def test_a_preference_for_kernels_is_taken_or_raises(impl, monkeypatch):
    prefer(auto=impl)
    monkeypatch.setattr(config, "has_triton", lambda: True)
    assert resolve_impl("auto", "cuda", CALL) == (
        impl,
        f"auto: ila_kernels.prefer(auto='{impl}')",
    )
    assert resolve_impl("auto", "cpu")[0] == "eager"
    fp64 = CALL._replace(dtype="float64")
    assert resolve_impl("auto", "cuda", fp64)[0] == "eager"
    assert resolve_impl("eager", "cuda", CALL) == ("eager", "asked for")
    monkeypatch.setattr(config, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        resolve_impl("auto", "cuda", CALL)


def test_a_preference_is_one_of_the_words():
    for wrong in ({"auto": "fast"}, {"gemm": "tma"}):
        with pytest.raises(ValueError, match=r"must be ('\w+', )+('\w+') or None, got"):
            prefer(**wrong)
    assert choice.preference() == choice.Preference()
    assert ila_kernels.prefer is prefer
