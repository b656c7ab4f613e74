"""Several processes that train as one: an action of one process, and sums over all.

Except for ``processes``, all processes must call a function here at the same point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, get_int_from_env, parse_flag_from_env
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from ila.runs.lock import owned

T = TypeVar("T")


def processes() -> PartialState:
    """Return the number of processes, the index of this one, and its device.

    ``PartialState`` takes a CPU process for one of several only if told so, and its first call
    decides for all later calls.

    Raises:
        RuntimeError: If a launcher started several processes and this one was set up as if alone.
    """
    launched = get_int_from_env(["WORLD_SIZE"], 1)
    no_device = launched > 1 and not torch.accelerator.is_available()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or no_device)
    if launched > 1 and state.num_processes == 1:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate was set up for one in this "
            "process; on CPUs, call PartialState(cpu=True) before anything else does"
        )
    return state


def on_main_process(action: Callable[[], T]) -> T:
    """Run ``action`` on the main process; the others wait, get its result, and fail if it fails.

    Raises:
        Exception: The exception of ``action``, on every process; on the others it has the
            attribute ``raised_by_main_process``.
    """
    state = processes()
    result: list[object] = [None, None]
    if state.is_main_process:
        try:
            result = [action(), None]
        except Exception as error:
            result = [None, error]
    if state.num_processes > 1:
        broadcast_object_list(result, from_process=0)
    value, failure = result
    if isinstance(failure, Exception):
        if not state.is_main_process:
            failure.raised_by_main_process = True
        raise failure
    return value


@contextmanager
def owning(folder: Path | None) -> Iterator[None]:
    """Let the main process own an output folder while the block runs; see ``ila.runs.lock``.

    Args:
        folder: Output folder, if the run has one.

    Raises:
        ValueError: Another process owns it.
    """
    with ExitStack() as stack:
        if folder is not None:
            on_main_process(lambda: stack.enter_context(owned(folder)))
        yield


def leave_the_screen_to_the_main_process() -> bool:
    """Silence the progress bars and log lines of libraries on every other process.

    Returns:
        Whether this process is one of the others.
    """
    other = not processes().is_main_process
    if other:
        disable_progress_bar()
        set_verbosity_error()
    return other


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Add each number up over all processes, in fp64; every process gets the same bits."""
    state = processes()
    if state.num_processes == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=state.device)
    dist.all_reduce(total)
    return total.tolist()


def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes: one collective for all of them."""
    if processes().num_processes == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= processes().num_processes
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def stack_whole(values: Sequence[Tensor]) -> Tensor:
    """Stack numbers, each a tensor of shape (); complete the sums over sharded tensors.

    One collective adds the parts of all sharded sums.
    """
    first = values[0]
    if not isinstance(first, DTensor):
        return torch.stack(list(values))
    parts = torch.stack([value.to_local() for value in values])
    return DTensor.from_local(parts, first.device_mesh, first.placements).full_tensor()


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; return any other unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def leave_process_group() -> None:
    """End the process group, if there is one; call it last in a script, on every process.

    Without it a process can abort at exit, while its communication threads are torn down.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
