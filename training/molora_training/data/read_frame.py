"""Reads a pandas table out of a pickle stream without unpickling it.

A pickle is a program for a stack machine. Here its opcodes are walked as data: a name of a function or class stays a
name, and a call stays a record of what would have been called with what. Nothing is imported and nothing is run, so a
hostile stream can do no more than be refused. Only what pandas 2 writes for numbers and strings is understood.
"""

import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from molora.errors import DataError

_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS = (
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8", "BININT",
    "BININT1", "BININT2", "LONG1", "BINFLOAT",
)  # fmt: skip


@dataclass
class _Made:
    """What the stream would have made: the name that is called, its arguments, and the state that is put in after."""

    name: str
    arguments: Any
    state: Any = None


def read_frame(stream: bytes, where: str) -> dict[str, list[Any]]:
    """The columns of a pickled DataFrame by their names, in order: numbers, or strings (and NaN where one is missing).

    Raises DataError naming the stream (`where`) when it is no such table.
    """
    try:
        frame = _walk(stream)
        blocks, axes = frame.state["_mgr"].arguments[:2]
        names = _array(axes[0].arguments[1]["data"])
        columns: dict[int, list[Any]] = {}
        for block in blocks:
            values, placement = block.arguments[:2]
            for place, row in zip(_places(placement), _array(values), strict=True):
                columns[place] = row.tolist()
        return {str(name): columns[place] for place, name in enumerate(names)}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        raise DataError(f"{where}: not a table as pandas pickles it ({error})") from error


def _walk(stream: bytes) -> _Made:
    """The record that the stream leaves on its stack."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in _STEPS:
            _STEPS[name](stack)
        elif name == "STOP":
            break
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the opcode {name} is not understood")
    if len(stack) != 1 or not isinstance(stack[0], _Made):
        raise ValueError("it is no single object")
    return stack[0]


def _above_mark(stack: list[Any]) -> list[Any]:
    """Takes what lies above the last mark off the stack, and the mark."""
    place = next(place for place in reversed(range(len(stack))) if stack[place] is _MARK)
    found = stack[place + 1 :]
    del stack[place:]
    return found


def _name(stack: list[Any]) -> None:
    module, name = stack[-2:]
    stack[-2:] = [f"{module}.{name}"]


def _call(stack: list[Any]) -> None:
    name, arguments = stack[-2:]
    stack[-2:] = [_Made(name, arguments)]


def _put_in(stack: list[Any]) -> None:
    state = stack.pop()
    stack[-1].state = state


def _set_item(stack: list[Any]) -> None:
    key, value = stack[-2:]
    del stack[-2:]
    stack[-1][key] = value


def _set_items(stack: list[Any]) -> None:
    found = _above_mark(stack)
    stack[-1].update(zip(found[::2], found[1::2], strict=True))


def _append(stack: list[Any]) -> None:
    value = stack.pop()
    stack[-1].append(value)


def _appends(stack: list[Any]) -> None:
    found = _above_mark(stack)
    stack[-1].extend(found)


_STEPS: dict[str, Callable[[list[Any]], None]] = {
    "STACK_GLOBAL": _name,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "BUILD": _put_in,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "APPEND": _append,
    "APPENDS": _appends,
    "TUPLE": lambda stack: stack.append(tuple(_above_mark(stack))),
}


def _array(made: _Made) -> np.ndarray:
    """An array of numbers out of bytes, in either of the ways that numpy pickles it, or of objects out of a list."""
    if made.name.endswith("._frombuffer"):
        data, dtype, shape, order = made.arguments
        return np.frombuffer(data, _dtype(dtype)).reshape(shape, order=order)
    _, shape, dtype, by_columns, values = made.state
    if isinstance(values, bytes):
        found = np.frombuffer(values, _dtype(dtype))
    else:
        found = np.empty(len(values), dtype=object)
        found[:] = values
    return found.reshape(shape, order="F" if by_columns else "C")


def _dtype(made: _Made) -> np.dtype:
    found = np.dtype(made.arguments[0]).newbyteorder(made.state[1])
    if found.hasobject:  # its bytes would be addresses
        raise ValueError("an array of objects as bytes")
    return found


def _places(made: _Made) -> Sequence[int]:
    """The columns that a block's rows are."""
    if made.name == "builtins.slice":
        return range(*made.arguments)
    return [int(place) for place in _array(made)]
