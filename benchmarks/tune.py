"""Search the tiles of ``lowrank_gemm`` on this machine's GPU and print table rows ready to paste.

    python -m benchmarks.tune                              rows of GEMM_16BIT and GEMM_PERSISTENT
    python -m benchmarks.tune --form pointer --rank 64     one form, another rank
    python -m benchmarks.tune --shapes 8192x4096x4096      M x K x N, forward and dx of each

Which implementation ``impl="auto"`` takes is measured by ``ila_kernels.tune``, with these tiles.

A tile has to give the right numbers before it is timed. All candidates run on the first product;
the best of them on every product, in interleaved rounds of which the median counts. A tile's score
is the geometric mean, over the products, of its time over the best time there.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ila_kernels.config import GEMM_PERSISTENT, SHARED_LIMIT_BYTES, Tile, rank_block
from ila_kernels.device import multiprocessors, target_of
from ila_kernels.kernels import lowrank_gemm
from ila_kernels.kernels.launch import Launch
from ila_kernels.testing import assert_within_rounding

# Llama-3-8B: q and o, k and v, gate and up, down.
SHAPES = ((8192, 4096, 4096), (8192, 4096, 1024), (8192, 4096, 14336), (8192, 14336, 4096))
# What every GPU that Triton supports lets a block have without asking for more.
LEAST_SHARED_BYTES = 48 * 1024
CHECKED_ROWS = 128
SCALE = 0.5
Timer = Callable[[Launch], float]


@dataclass(frozen=True)
class Product:
    """One product C (M, N) = P Q + γα U V: the forward of a layer, or its input gradient."""

    use: str
    m: int
    k: int
    n: int
    r: int

    def tensors(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Draw the operands as they lie in memory: W (out, in), adapters in fp32."""
        size, wide = {"dtype": dtype, "device": device}, {"device": device}
        v = (self.n, self.r) if self.use == "forward" else (self.r, self.n)
        q = (self.n, self.k) if self.use == "forward" else (self.k, self.n)
        transposed = self.use == "forward"
        stored_q, stored_v = torch.randn(q, **size) / self.k**0.5, torch.randn(v, **wide)
        return {
            "p": torch.randn(self.m, self.k, **size),
            "q": stored_q.t() if transposed else stored_q,
            "u": torch.randn(self.m, self.r, **size),
            "v": (stored_v.t() if transposed else stored_v) / self.r**0.5,
            "c": torch.empty(self.m, self.n, **size),
        }


def products(shapes: Iterable[tuple[int, int, int]], r: int) -> list[Product]:
    """Forward and input gradient of each layer (M, K, N)."""
    pairs = [(Product("forward", m, k, n, r), Product("dx", m, n, k, r)) for m, k, n in shapes]
    return list(itertools.chain.from_iterable(pairs))


def candidates(
    target: str, form: str, r: int, shared_bytes: int | None = None, element_bytes: int = 2
) -> list[Tile]:
    """Tiles worth a try, less those that cannot run or cannot be good.

    Args:
        target: GPU class; one that no table knows gets what every GPU has.
        form: ``"pointer"`` or ``"persistent"``; the latter only where there are descriptors.
        r: Rank R.
        shared_bytes: Shared memory of a block; by the table of targets if ``None``.
        element_bytes: Of P and Q.
    """
    if form == "persistent" and target not in GEMM_PERSISTENT:
        return []
    if shared_bytes is None:
        shared_bytes = SHARED_LIMIT_BYTES.get(target, LEAST_SHARED_BYTES)
    lanes = 64 if target.startswith("gfx") else 32
    found = []
    for m, n, k, warps, stages in itertools.product(
        (64, 128, 256), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)
    ):
        if stages * (m + n) * k * element_bytes > shared_bytes:
            continue
        # fp32 accumulators of a thread, of its 255 registers: with more than 128 nothing is left
        # for the update, and with fewer than 16 loads outnumber products.
        if not 16 <= m * n // (warps * lanes) <= 128:
            continue
        # wgmma and tcgen05 give each four warps 64 rows.
        if target in ("sm_90", "sm_100", "sm_103") and m < 16 * warps:
            continue
        found.append(Tile(m, n, k, rank_block(r, k), warps, stages))
    return found


def search(
    jobs: Sequence[Product],
    tiles: Sequence[Tile],
    launch_of: Callable[[Product, Tile], Launch],
    timer: Timer,
    keep: int = 6,
    rounds: int = 3,
) -> dict[Tile, list[float]]:
    """Time tiles; ``inf`` from the timer means that one cannot run. Returns ms for each job."""
    first = {tile: timer(launch_of(jobs[0], tile)) for tile in tiles}
    best = sorted((t for t in tiles if math.isfinite(first[t])), key=first.__getitem__)[:keep]
    seen: dict[Tile, list[list[float]]] = {tile: [[] for _ in jobs] for tile in best}
    for _ in range(rounds):
        for i, job in enumerate(jobs):
            for tile in best:
                seen[tile][i].append(timer(launch_of(job, tile)))
    return {tile: [statistics.median(times) for times in lists] for tile, lists in seen.items()}


def ranking(times: Mapping[Tile, Sequence[float]]) -> list[tuple[Tile, float]]:
    """Tiles with their scores, best first; one that failed on any job is left out."""
    whole = {tile: row for tile, row in times.items() if all(map(math.isfinite, row))}
    if not whole:
        return []
    best = [min(column) for column in zip(*whole.values(), strict=True)]
    scores = {
        tile: statistics.geometric_mean(ms / least for ms, least in zip(row, best, strict=True))
        for tile, row in whole.items()
    }
    return sorted(scores.items(), key=lambda item: item[1])


def commented(text: str) -> str:
    """The text as a comment inside a table, no line longer than 100."""
    return "\n".join(textwrap.wrap(text, 100, initial_indent="    # ", subsequent_indent="    # "))


def tile_row(target: str, tile: Tile, evidence: str) -> str:
    """A row of GEMM_16BIT or GEMM_PERSISTENT; BLOCK_R stays 0 there, it follows from R."""
    size = f"{tile.m}, {tile.n}, {tile.k}, 0, warps={tile.warps}, stages={tile.stages}"
    return f'{commented(evidence)}\n    "{target}": Tile({size}),'


# --- on a GPU


class Bench:
    """The products' tensors, and a timer that checks the result before it times."""

    def __init__(self, jobs: Sequence[Product], form: str, target: str, programs: int):
        self.target, self.programs = target, programs if form == "persistent" else None
        self.tensors = {job: job.tensors(torch.bfloat16, "cuda") for job in jobs}
        self.expected = {job: self._expected(z) for job, z in self.tensors.items()}

    @staticmethod
    def _expected(z: Mapping[str, Tensor]) -> list[tuple[slice, Tensor, Tensor]]:
        """Some rows of C, in fp64 and as the library computes them; a whole fp64 C takes long."""
        found = []
        for rows in (slice(0, CHECKED_ROWS), slice(-CHECKED_ROWS, None)):
            c = []
            for dtype in (torch.float64, torch.bfloat16):
                p, q, u, v = (z[name].to(dtype) for name in "pquv")
                c.append(p[rows] @ q + u[rows] @ (v * SCALE))
            found.append((rows, *c))
        return found

    def launch(self, job: Product, tile: Tile) -> Launch:
        z = self.tensors[job]
        arguments = (z["p"], z["q"], z["u"], z["v"], z["c"], SCALE, None, None, None, 0.0)
        return lowrank_gemm.launch(*arguments, self.target, self.programs, tile)

    def time(self, launch: Launch) -> float:
        c = launch.arguments["c_ptr"]
        job = next(job for job, z in self.tensors.items() if z["c"] is c)
        c.fill_(math.nan)
        try:
            launch.run()
            for rows, exact, plain in self.expected[job]:
                assert_within_rounding(c[rows], exact, plain, "C")
        except (OutOfResources, PTXASError, CompilationError, AssertionError) as error:
            print(f"  {launch.tile}: {type(error).__name__}: {error}", file=sys.stderr)
            return math.inf
        return time_ms(launch.run)


def time_ms(run: Callable[[], object]) -> float:
    """Median time of a call on the current GPU, the L2 cache flushed before each."""
    return triton.testing.do_bench(run, return_mode="median")


def provenance() -> str:
    """GPU, versions and date of what is measured now."""
    name, day = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}, {day}"


def tune(shapes, r: int, forms: Sequence[str], target: str) -> list[str]:
    """Search each form; returns its row, or a line that says why there is none."""
    limit = getattr(torch.cuda.get_device_properties(0), "shared_memory_per_block_optin", None)
    rows, jobs = [], products(shapes, r)
    for form in forms:
        table = "GEMM_PERSISTENT" if form == "persistent" else "GEMM_16BIT"
        tiles = candidates(target, form, r, limit)
        print(f"{form}: {len(tiles)} candidates on {target}", file=sys.stderr)
        if not tiles:
            rows.append(f"# {table}: no candidate on {target}")
            continue
        bench = Bench(jobs, form, target, multiprocessors(0))
        ranked = ranking(search(jobs, tiles, bench.launch, bench.time))
        if not ranked:
            rows.append(f"# {table}: no candidate ran on {target}")
            continue
        for tile, score in ranked[:3]:
            print(f"  {score:.3f} {tile}", file=sys.stderr)
        (best, score), *others = ranked
        next_best = f", the next tile's {others[0][1]:.3f}" if others else ""
        evidence = (
            f"Measured: score {score:.3f}{next_best}, of {len(tiles)} tiles over {len(jobs)} "
            f"products at R = {r}; {provenance()}."
        )
        rows.append(f"# {table}\n{tile_row(target, best, evidence)}")
    return rows


def shape(text: str) -> tuple[int, int, int]:
    """Read ``"8192x4096x4096"``."""
    sizes = tuple(int(size) if size.isdigit() else 0 for size in text.split("x"))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"a shape is MxKxN, e.g. 8192x4096x4096, not {text!r}")
    return sizes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="MxKxN")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--form", choices=("pointer", "persistent"))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks.tune times tiles on a GPU, and PyTorch sees none here: nothing was "
            "measured. benchmarks.compile_report shows what can be known without one.",
            file=sys.stderr,
        )
        return 1
    target = target_of(torch.empty(1, device="cuda"))
    forms = (options.form,) if options.form else ("pointer", "persistent")
    rows = tune(options.shapes, options.rank, forms, target)
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
