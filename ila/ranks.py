"""What only one of several processes may do, with an outcome that all of them share."""

from __future__ import annotations

from collections.abc import Callable

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
