"""Damages of files as hypothesis strategies: of bytes, and of the values in a JSON document."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Damage = Callable[[bytes], bytes]

# What stands where something else belongs.
ODD = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 10**9, 10**30, -(10**30), 0.5, 1e308, 1e-320),
    *("", "x", "1e-05", "16bit", "../../etc", "\ud800", "a[/b]", "日本", "x" * 5000),
    *([], {}, [None], [[]], {"x": 1}, [1, 2, 3], float("nan"), float("inf"), -float("inf")),
)
ENCODINGS = ("utf-16", "utf-32", "utf-8-sig", "cp037")


@st.composite
def byte_damages(draw: st.DrawFn) -> Damage:
    """Cut, flip, insert, overwrite, repeat, or encode otherwise."""
    kind = draw(
        st.sampled_from(("cut", "flip", "insert", "overwrite", "drop", "garbage", "encode"))
    )
    place = draw(st.floats(0, 1))
    some = draw(st.binary(min_size=1, max_size=40))
    bit = draw(st.integers(0, 7))
    encoding = draw(st.sampled_from(ENCODINGS))
    # Headers are short and decide most: half of the places are among the first bytes.
    near = draw(st.booleans())

    def damaged(content: bytes) -> bytes:
        at = int(place * max(0, min(len(content), 400 if near else len(content)) - 1))
        if kind == "cut":
            return content[:at]
        if kind == "flip":
            return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
        if kind == "insert":
            return content[:at] + some + content[at:]
        if kind == "overwrite":
            return content[:at] + some + content[at + len(some) :]
        if kind == "drop":
            return content[:at] + content[at + len(some) :]
        if kind == "garbage":
            return some
        return content.decode("latin-1").encode(encoding, "replace")

    return damaged


@st.composite
def json_damages(draw: st.DrawFn) -> Damage:
    """Replace, remove, rename or double one value anywhere in a JSON document (or in its lines)."""
    kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "wrap")))
    choice = draw(st.integers(0, 10**6))
    odd = draw(st.sampled_from(ODD))

    def damaged(content: bytes) -> bytes:
        lines = content.decode().strip().split("\n")
        if content.lstrip()[:1] == b"{" and len(lines) > 1 and lines[0].rstrip().endswith("}"):
            at = choice % len(lines)
            lines[at] = _changed(lines[at], kind, choice, odd)
            return "\n".join(lines).encode()
        return _changed(content.decode(), kind, choice, odd).encode()

    return damaged


def _changed(text: str, kind: str, choice: int, odd: Any) -> str:
    root = [json.loads(text)]
    places = list(_places(root))
    inside, key = places[choice % len(places)]
    if kind == "replace":
        inside[key] = odd
    elif kind == "remove":
        del inside[key]
    elif kind == "rename" and isinstance(inside, dict):
        inside[f"{key}x"] = inside.pop(key)
    else:
        inside[key] = [inside[key]]
    changed = json.dumps(root[0]) if root else ""
    # Another layout of the same values is no damage.
    return text if changed == json.dumps(json.loads(text)) else changed


def _places(value: Any) -> Any:
    keys = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(keys):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)
