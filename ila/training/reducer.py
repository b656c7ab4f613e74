"""Let DDP synchronise the parameters that train now.

DDP waits in each step for a gradient of every parameter that trained when it wrapped the model. If
some stop to train, its buckets have to be made anew. A wrapper does so when it is unpickled; here
it takes its own state, and Trainer goes on with the same object.
"""

from __future__ import annotations

import gc

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def wrappers_of(model: nn.Module) -> list[DistributedDataParallel]:
    """Return the DDP wrappers around a model, found among the objects of the process.

    Trainer hands its callbacks the model without its wrapper.
    """
    return [
        each
        for each in gc.get_objects()
        if issubclass(type(each), DistributedDataParallel) and each.module is model
    ]


def reduce_trained(model: nn.Module) -> None:
    """Make the buckets of every DDP wrapper around a model anew; nothing without one.

    Call it between two steps, on all processes.
    """
    for wrapper in wrappers_of(model):
        hooks, wrapper._comm_hooks = wrapper._comm_hooks, []
        wrapper.__setstate__(wrapper.__getstate__())
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)
