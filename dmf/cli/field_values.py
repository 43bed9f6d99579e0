"""From the text of a flag to a value of the type that a config field is annotated with."""

import ast
import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from dmf.types import alternatives, element_type, element_types

_BOOLEANS = {"true": True, "t": True, "yes": True, "1": True,
             "false": False, "f": False, "no": False, "0": False}  # fmt: skip
# What literal_eval raises of a text that is no literal, or one that is too deep or too long.
_NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
# Among several numbers, 1e1 is sooner a slip than ten.
_DIGITS = re.compile(r"[-+]?\d+")
# Two numbers, for example the ends of an interval, also as START:END.
_PAIR = re.compile(r"([^:]+):([^:]+)")
_BRACKETS = re.compile(r"[(\[]([^()\[\]]*)[)\]]")


def parse_value(text: str | bool, annotation: Any) -> Any:
    """The value that a text stands for.

    >>> parse_value("1e3", int), parse_value("1,2", tuple[int, ...])
    (1000, (1, 2))
    >>> parse_value("0.4:0.65,0.3:0.7", tuple[tuple[float, float], ...])
    ((0.4, 0.65), (0.3, 0.7))

    Args:
      text: what stands behind the "=" of a flag; a bool for a flag that stands alone.
      annotation: type of the field: bool, int, float, str, a tuple or list of such, a union, a
        `typing.Literal`, or Any for any literal of Python.

    Raises:
      ValueError: the text stands for no value of this type.
    """
    for kind in alternatives(annotation):
        try:
            return _parse(text, kind)
        except ValueError:
            continue
    raise ValueError(text)


def _parse(text: str | bool, kind: Any) -> Any:
    if kind is bool:
        return text if isinstance(text, bool) else _choice(text.lower(), _BOOLEANS)
    if isinstance(text, bool):
        raise ValueError(text)
    if kind is types.NoneType:
        return _choice(text.lower(), {"none": None})
    if kind is int:
        return _whole_number(text)
    if kind is float or kind is str:
        return kind(text)
    if kind is Any:
        return _literal(text)
    if typing.get_origin(kind) is typing.Literal:
        return _choice(text, {str(value): value for value in typing.get_args(kind)})
    return _parse_tuple(text, kind)


def _choice(text: str, values: dict[str, Any]) -> Any:
    if text not in values:
        raise ValueError(text)
    return values[text]


def _whole_number(text: str) -> int:
    """A whole number, also as 1e3 or 2.0."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not math.isfinite(number) or number != int(number):
        raise ValueError(text)
    return int(number)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except _NO_LITERAL:
        return text


def _parse_tuple(text: str, kind: Any) -> tuple[Any, ...]:
    element, length = element_type(kind)
    if element is None:
        raise ValueError(text)
    pair = _PAIR.fullmatch(text) if (element, length) == (float, 2) else None
    parts = pair.groups() if pair else _parts(text)
    kinds = element_types(kind, len(parts))
    if kinds is None or any(each is int and not _DIGITS.fullmatch(part)
                            for part, each in zip(parts, kinds, strict=True)):
        raise ValueError(text)
    return tuple(map(parse_value, parts, kinds))


def _parts(text: str) -> Sequence[str]:
    """The texts of the elements of "(1, 2)", "[1, 2]", "1,2" or "('a', 'b')"."""
    try:
        values = ast.literal_eval(text)
    except _NO_LITERAL:  # text without quotes
        inner = _BRACKETS.fullmatch(text)
        return [part.strip() for part in (inner[1] if inner else text).split(",") if part.strip()]
    return [str(value) for value in (values if isinstance(values, tuple | list) else [values])]
