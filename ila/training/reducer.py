"""Let DDP synchronise the parameters that train now.

DDP waits in each step for a gradient of every parameter that trained when it wrapped the model. If
some stop to train, its buckets have to be made anew. A wrapper does so when it is unpickled; here
it takes its own state, and Trainer goes on with the same object.
"""

from __future__ import annotations

import gc

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def reduce_trained(model: nn.Module) -> int:
    """Make the buckets of every DDP wrapper around a model anew; return the number of wrappers.

    Call it between two steps, on all processes. Trainer hands its callbacks the model without its
    wrapper, so this looks for wrappers among the objects of the process.
    """
    wrappers = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), DistributedDataParallel) and each.module is model
    ]
    for wrapper in wrappers:
        hooks, wrapper._comm_hooks = wrapper._comm_hooks, []
        wrapper.__setstate__(wrapper.__getstate__())
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)
    return len(wrappers)
