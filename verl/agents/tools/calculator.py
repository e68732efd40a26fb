"""Built-in tool `calculator`: arithmetic, parsed and computed within bounds, without running any code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

Number = int | float
MAX_CHARS = 1000
# Bits of an integer: results stay short, and every operation takes microseconds.
_MAX_BITS = 4096
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_OF_MATH = (
    *("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan", "atan2"),
    *(
        "sinh",
        "cosh",
        "tanh",
        "degrees",
        "radians",
        "floor",
        "ceil",
        "factorial",
        "comb",
        "gcd",
        "lcm",
        "hypot",
    ),
)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "round": round,
    "min": min,
    "max": max,
    **{name: getattr(math, name) for name in _OF_MATH},
}
_CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}
# Their results have more digits than their arguments.
_GROWING = {"factorial": 500, "comb": 2000}


def calculator(expression: str) -> str:
    """Compute an arithmetic expression, such as "(3 + 4) * 2 ** 5 / 7" or "sqrt(2) * pi".

    Args:
        expression: Numbers, + - * / // % **, parentheses, and the functions of a scientific calculator.
    """
    if len(expression) > MAX_CHARS:
        raise ValueError(f"need an expression of at most {MAX_CHARS} characters, got {len(expression)}")
    # As it is written by hand.
    source = expression.replace("^", "**").replace("×", "*").replace("÷", "/").replace("−", "-").strip()
    try:
        tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression[:100]!r} is no arithmetic expression") from error
    try:
        return formatted(value_of(tree.body))
    except RecursionError as error:
        raise ValueError("the expression is nested too deeply") from error


def value_of(node: ast.expr) -> Number:
    """Value of an expression.

    Raises:
        ValueError: it has something else than arithmetic, or a number that is too large.
        ArithmeticError: it has no value.
    """
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return bounded(value)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return bounded(_UNARY[type(op)](value_of(operand)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = value_of(left), value_of(right)
            if isinstance(op, ast.Pow):
                check_power(a, b)
            return bounded(_BINARY[type(op)](a, b))
        case ast.Call(func=ast.Name(id=name), args=given, keywords=[]) if name in _FUNCTIONS:
            numbers = [value_of(each) for each in given]
            if name in _GROWING and any(abs(number) > _GROWING[name] for number in numbers):
                raise ValueError(f"need arguments of {name} of at most {_GROWING[name]}")
            try:
                return bounded(_FUNCTIONS[name](*numbers))
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from error
    raise ValueError(
        f"need numbers, + - * / // % **, parentheses and functions ({', '.join(_FUNCTIONS)}), got "
        f"{ast.unparse(node)[:80]!r}"
    )


def check_power(base: Number, exponent: Number) -> None:
    """Raise ValueError for a power of whole numbers that is too large."""
    is_whole = isinstance(base, int) and isinstance(exponent, int) and exponent > 0
    if is_whole and int(base).bit_length() * int(exponent) > _MAX_BITS:
        raise ValueError(f"{base} ** {exponent} is too large")


def bounded(value: Any) -> Number:
    """A real number that is not too large.

    Raises:
        ValueError: it is another one.
    """
    if isinstance(value, complex):
        raise ValueError("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError("a number is too large")
    number: Number = value
    return number


def formatted(value: Number) -> str:
    """A number as people write it: 0.1 + 0.2 is 0.3, and 6 / 2 is 3."""
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        return f"{value:.12g}"
    return str(value)
