"""Choose layers by their names alone: the last blocks, a pattern, a share of each kind. No torch.

A rule is a text, as ``ila select --layers`` takes it:

    last:16   first:8   blocks:0,4,8-11   last-mlps:21   no-qk   q_proj,v_proj   REGEX

Names and a regular expression mean the layers that they mean in PEFT's ``target_modules``: a name
is a layer's own or its end, and an expression must match a whole name of the base model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ila.masks.names import BLOCK_NUMBER, DOWN, GATE_UP, PEFT_PREFIX, parse_module_name

RULES = (
    "last:N, first:N, blocks:0,4,8-11, last-mlps:N, no-qk, names with commas or a regular "
    "expression"
)
_QUERY_KEY = ("q_proj", "k_proj")
_BLOCK_RULE = re.compile("(last|first|blocks|last-mlps):(.*)")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_MLP = ("mlp", "feed_forward", *GATE_UP, *DOWN)  # a part of the name of a layer of an MLP
_NAMES = re.compile(r"\w+(\.\w+)*(,\s*\w+(\.\w+)*)*")
_RANGE = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?")


def chosen_by(rule: str, names: Sequence[str]) -> list[str]:
    r"""Return the names that a rule chooses, in their order.

    Raises:
        ValueError: If the rule has no such form, or chooses none.

    >>> names = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]
    >>> chosen_by("last:1", names)
    ['layers.1.q_proj', 'layers.1.v_proj']
    >>> chosen_by("no-qk", names)
    ['layers.0.v_proj', 'layers.1.v_proj']
    >>> chosen_by("last-mlps:1", ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj", *names])
    ['layers.1.mlp.up_proj']
    >>> chosen_by("v_proj", names) == chosen_by(r".*\.v_proj", names)
    True
    """
    if by_block := _BLOCK_RULE.fullmatch(rule):
        names = _mlps(names) if by_block[1] == "last-mlps" else names
        wanted = _blocks(by_block[1], by_block[2], names)
        return [name for name in names if _block(name) in wanted]
    if rule == "no-qk":
        return _without_query_key(names)
    if _NAMES.fullmatch(rule):
        return _named(rule, names)
    try:
        pattern = re.compile(rule)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"layers must be {RULES}, got {rule!r}: {error}") from error
    found = [name for name in names if pattern.fullmatch(bare(name))]
    if not found:
        raise ValueError(
            f"layers must be {RULES}; {rule!r} is no file here, and as a regular expression it "
            f"matches none of the {len(names)} whole names, such as {bare(names[0])}"
        )
    return found


def _named(rule: str, names: Sequence[str]) -> list[str]:
    found: set[str] = set()
    for end in re.split(r",\s*", rule):
        alike = [name for name in names if f".{name}".endswith(f".{end}")]
        if not alike:
            raise ValueError(
                f"layers must be {RULES}; {end!r} is no file here, and no name or end of a name of "
                f"the {len(names)} layers, such as {bare(names[0])}"
            )
        found.update(alike)
    return [name for name in names if name in found]


def bare(name: str) -> str:
    """Return the name of a layer as the base model has it."""
    return name.removeprefix(PEFT_PREFIX)


def kind_of(name: str) -> str:
    """Return the name after the number of its block; the whole name if there is no number.

    >>> kind_of("model.layers.3.self_attn.q_proj")
    'self_attn.q_proj'
    """
    parts = name.split(".")
    places = [at for at, part in enumerate(parts[:-1]) if BLOCK_NUMBER.fullmatch(part)]
    return ".".join(parts[places[0] + 1 :]) if places else name


def within_kinds(
    scores: Mapping[str, float], kinds: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Return the place of each layer within its kind, 1 for the best and 1 / count for the worst.

    The best share of these places is the same share of every kind. Equal scores keep their order.

    Args:
        scores: Name -> number, not NaN.
        kinds: Name -> kind; None takes ``kind_of``.

    >>> within_kinds({"0.q": 5.0, "1.q": 7.0, "0.v": 0.1, "1.v": 0.2})
    {'0.q': 0.5, '1.q': 1.0, '0.v': 0.5, '1.v': 1.0}
    """
    groups: dict[str, list[str]] = {}
    for name in scores:
        groups.setdefault(kind_of(name) if kinds is None else kinds[name], []).append(name)
    places = {}
    for names in groups.values():
        ranked = sorted(names, key=scores.__getitem__, reverse=True)
        places |= {name: 1.0 - at / len(names) for at, name in enumerate(ranked)}
    return {name: places[name] for name in scores}


def _block(name: str) -> int | None:
    parsed = parse_module_name(name)
    return None if parsed is None else parsed[0]


def _blocks(which: str, text: str, names: Iterable[str]) -> set[int]:
    """Return the numbers of the blocks that a rule means."""
    there = sorted({block for name in names if (block := _block(name)) is not None})
    if which == "blocks":
        return _listed(text, there)
    count = int(text) if BLOCK_NUMBER.fullmatch(text) else 0
    if not 1 <= count <= len(there):
        raise ValueError(
            f"layers {which}:N must have N from 1 to {len(there)}, the blocks with layers, got "
            f"{text!r}"
        )
    return set(there[:count] if which == "first" else there[-count:])


def _listed(text: str, there: Sequence[int]) -> set[int]:
    wanted: set[int] = set()
    for part in text.split(","):
        ends = _RANGE.fullmatch(part)
        low, high = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if low > high or not {low, high} <= set(there):
            raise ValueError(
                "layers blocks:… must be numbers and ranges of blocks with layers "
                f"({there[0]}-{there[-1]}), with commas, got {part!r}"
                if there
                else "layers blocks:… needs layers in numbered blocks, and there are none"
            )
        wanted |= {block for block in there if low <= block <= high}
    return wanted


def _is_of_mlp(parts: Sequence[str]) -> bool:
    return not set(_MLP).isdisjoint(parts) and set(_ROUTERS).isdisjoint(parts)


def _mlps(names: Sequence[str]) -> list[str]:
    found = [name for name in names if _is_of_mlp(name.split("."))]
    if not found:
        raise ValueError(
            f"layers last-mlps:N opens layers of MLPs, with one of {', '.join(_MLP)} in their "
            f"names; the layers here are {', '.join(dict.fromkeys(map(kind_of, names)))}"
        )
    return found


def _without_query_key(names: Sequence[str]) -> list[str]:
    kept = [name for name in names if name.rpartition(".")[2] not in _QUERY_KEY]
    if len(kept) == len(names) or not kept:
        raise ValueError(
            f"layers no-qk closes {' and '.join(_QUERY_KEY)} and opens the others; the layers here "
            f"are {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in names))}"
        )
    return kept
