"""Arithmetic of formulas and of a model's functions, evaluated and never run."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

LONGEST_SOURCE, LARGEST_POWER = 4000, 16
_LARGEST = 10**30  # of a numerator or denominator: nothing that answers a word problem comes near
_FUNCTION = re.compile(r"^def solution\(.*?(?=^\S|\Z)", re.S | re.M)
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda one, other: Fraction(one // other),
    ast.Mod: operator.mod,
}


class _RefusedError(Exception):
    """What is not plain arithmetic of a sensible size."""


def number_of(text: str) -> Fraction | None:
    """The number that a text is, with commas and a point as English has them; None where it is none."""
    try:
        return Fraction(text.strip().replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def returned(answer: str) -> Fraction | None:
    """What `solution()` of an answer returns, in a fence or bare; None unless it is nothing but arithmetic.

    Assignments to names and a return are all that is understood: no loop, call, attribute or import. What stands
    around the function is not looked at.
    """
    found = _FUNCTION.search(f"{answer}\n")
    if found is None or len(found[0]) > LONGEST_SOURCE:
        return None
    try:
        body = ast.parse(found[0]).body
        return _run(body[0]) if len(body) == 1 else None
    except (_RefusedError, SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def operands_replaced(formula: str, names: Mapping[Fraction | None, str]) -> str | None:
    """A formula as Python writes it, its numbers replaced by the names of their values; None if it is no arithmetic."""
    try:
        tree = ast.parse(formula.strip(), mode="eval").body
        _value(tree, {})
    except (_RefusedError, SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None

    class Named(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.expr:
            name = names.get(_value(node, {}))
            return node if name is None else ast.Name(name, ast.Load())

    return ast.unparse(Named().visit(tree))


def _run(function: ast.stmt) -> Fraction:
    if not isinstance(function, ast.FunctionDef) or ast.unparse(function.args) or function.decorator_list:
        raise _RefusedError
    known: dict[str, Fraction] = {}
    for number, step in enumerate(function.body):
        match step:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                known[name] = _value(value, known)
            case ast.Return(value=ast.expr() as value):
                return _value(value, known)
            case ast.Expr(value=ast.Constant(value=str())) if number == 0:  # a docstring
                continue
            case _:
                raise _RefusedError
    raise _RefusedError


def _value(node: ast.expr, known: Mapping[str, Fraction]) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _sensible(Fraction(repr(value)))
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, known)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, known)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, power = _value(left, known), _value(right, known)
            # Checked before it is worked out: a tower of powers would never end.
            if power.denominator != 1 or abs(power) > LARGEST_POWER:
                raise _RefusedError
            return _sensible(Fraction(base ** int(power)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _sensible(_OPERATORS[type(op)](_value(left, known), _value(right, known)))
    raise _RefusedError


def _sensible(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > _LARGEST:
        raise _RefusedError
    return value
