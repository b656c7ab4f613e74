"""What only one of several processes may do, with an outcome that all of them share."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def on_main_process(action: Callable[[], None]) -> None:
    """Run ``action`` on the main process; the others wait, and fail if it fails.

    Raises:
        Exception: What ``action`` raised, on every process.
    """
    state = PartialState()
    failure: list[Exception | None] = [None]
    if state.is_main_process:
        try:
            action()
        except Exception as error:
            failure[0] = error
    if state.num_processes > 1:
        broadcast_object_list(failure, from_process=0)
    if failure[0] is not None:
        raise failure[0]


def leave_process_group() -> None:
    """End the process group, if there is one: a script's last act on every process.

    A process that exits without it can abort while its communication threads are torn down.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
