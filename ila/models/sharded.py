"""Let FSDP2 gather the parameters that a model has, and no others.

``fully_shard`` lists the parameters of a block once. A closed layer's adapter leaves the model and
would stay in the list, so that every step gathers it for nothing. torch has no public call to
change a list; this module alone knows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.distributed.fsdp import FSDPModule

# List of a block as it was when the block was sharded, to find the parameters of layers that open.
_LISTED: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()


def reshard(model: nn.Module) -> None:
    """Let every block hold its shards alone, as it does between two steps.

    After a forward without backward some blocks still hold gathered weights, which are other
    parameters than the optimiser's: to close or freeze those would do nothing for long.
    """
    for module in _sharded(model):
        module.reshard()


def gather_present(model: nn.Module) -> None:
    """Take parameters that have left the model out of the lists, and put back the returned ones.

    All processes must call this at the same point.
    """
    modules = set(model.modules())
    for sharded in _sharded(model):
        state = sharded._get_fsdp_state()
        for group in getattr(state, "_fsdp_param_groups", ()) or [state._fsdp_param_group]:
            if group is None:
                continue
            listed = _LISTED.setdefault(group, tuple(group.fsdp_params))
            group.fsdp_params = [p for p in listed if _is_there(p._module_info, modules)]


def _is_there(place: Any, modules: set[nn.Module]) -> bool:
    return place.module in modules and place.param_name in place.module._parameters


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    yield from (module for module in model.modules() if isinstance(module, FSDPModule))
