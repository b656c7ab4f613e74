"""Read in the code of a class which computation its forward is; its name says nothing.

Transformers generates one file for each family, so the same lines stand in many classes. Two
questions are asked here: whether a forward is a known one, by its compiled code (``same_code``),
and whether it calls a few layers on one x, by its syntax tree (``why_not_one_x``).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType

from torch import nn

# `from __future__` sets flags beside these.
_KIND_OF_CALL = (
    inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
)
# A call inside one of these may not happen, or happen twice.
_BRANCHES = (
    *(ast.If, ast.IfExp, ast.BoolOp, ast.For, ast.While, ast.Try, ast.Match),
    *(ast.Lambda, ast.FunctionDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)


def same_code(function: Callable[..., object], reference: FunctionType) -> bool:
    """Tell whether two functions are compiled to one code: same steps, names and constants.

    A wrapper has other code than the function that it wraps.
    """
    if not isinstance(function, FunctionType):
        return False
    found, known = (_essence(f.__code__) for f in (function, reference))
    return found == known and _constants(function) == _constants(reference)


def _essence(code: CodeType) -> tuple[object, ...]:
    arguments = code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return code.co_code, arguments, code.co_flags & _KIND_OF_CALL, names


def _constants(function: FunctionType) -> list[object]:
    return [c for c in function.__code__.co_consts if c is not None and c != function.__doc__]


def why_not_one_x(kind: type[nn.Module], names: Sequence[str]) -> str | None:
    """Return the reason why the forward of a class may not call these layers on one x, or None.

    It has to call each of them once, in every run, on one local variable that it does not assign in
    between. A decorated forward is read under its decorators.
    """
    return _why_not_one_x(inspect.unwrap(kind.forward), tuple(names), kind.__name__)


@functools.cache
def _why_not_one_x(function: object, names: tuple[str, ...], label: str) -> str | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return f"the source of {label}.forward cannot be read"
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        return f"{label}.forward is not a plain method"
    own = tree.args.args[0].arg
    found = [call for statement in tree.body for call in _calls(statement, own, names, False)]
    for name in names:
        calls = [(node, branch) for node, branch in found if node.func.attr == name]
        if len(calls) != 1:
            return f"{label}.forward calls {name} {len(calls)} times, not once"
        if calls[0][1]:
            return f"{label}.forward calls {name} in some cases only"
    inputs = {_input(node) for node, _ in found}
    if len(inputs) != 1 or None in inputs:
        return f"{label}.forward does not call {', '.join(names)} on one input"
    first, last = (at(node.lineno for node, _ in found) for at in (min, max))
    if any(isinstance(node, ast.Return) and node.lineno < last for node in ast.walk(tree)):
        return f"{label}.forward may return before it calls all of {', '.join(names)}"
    if any(first <= line < last for line in _assignments(tree, *inputs)):
        return f"{label}.forward changes the input between {names[0]} and {names[-1]}"
    return None


def _calls(
    node: ast.AST, own: str, names: Sequence[str], branch: bool
) -> Iterator[tuple[ast.Call, bool]]:
    """Yield every call of ``own.name(…)`` in a tree, and whether it lies in a branch."""
    branch = branch or isinstance(node, _BRANCHES)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        target = node.func.value
        if node.func.attr in names and isinstance(target, ast.Name) and target.id == own:
            yield node, branch
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, own, names, branch)


def _input(call: ast.Call) -> str | None:
    """Return the variable that a call takes as its only argument; None if it takes another."""
    plain = len(call.args) == 1 and not call.keywords and isinstance(call.args[0], ast.Name)
    return call.args[0].id if plain else None


def _assignments(tree: ast.AST, name: str) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
            yield node.lineno
