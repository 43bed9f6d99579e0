"""From the text of a flag to a value of the type that a config field is annotated with."""

import ast
import collections.abc
import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

_BOOLEANS = {"true": True, "t": True, "yes": True, "1": True,
             "false": False, "f": False, "no": False, "0": False}  # fmt: skip
_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text",
          types.NoneType: "None"}  # fmt: skip
_BRACKETS = re.compile(r"[(\[]([^()\[\]]*)[)\]]")


def parse_value(text: str | bool, annotation: Any) -> Any:
    """The value that a text stands for.

    >>> parse_value("1e3", int), parse_value("1,2", tuple[int, ...])
    (1000, (1, 2))

    Args:
      text: what stands behind the "=" of a flag; a bool for a flag that stands alone.
      annotation: type of the field: bool, int, float, str, a tuple or list of such, a union, a
        `typing.Literal`, or Any for any literal of Python.

    Raises:
      ValueError: the text stands for no value of this type.
    """
    for kind in _alternatives(annotation):
        try:
            return _parse(text, kind)
        except ValueError:
            continue
    raise ValueError(text)


def describe_type(annotation: Any) -> str:
    """Which values a type has, in words.

    >>> describe_type(int | None), describe_type(tuple[float, float])
    ('a whole number or None', '2 numbers, for example (0.5, 1.5)')
    """
    return " or ".join(_described(kind) for kind in _alternatives(annotation))


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, text last, which every text stands for; or the type itself."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    members = typing.get_args(annotation) if union else (annotation,)
    return sorted(members, key=lambda kind: kind is str)


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
    except (ValueError, SyntaxError):
        return text


def _parse_tuple(text: str, kind: Any) -> tuple[Any, ...]:
    element, length = _element(kind)
    if element is None:
        raise ValueError(text)
    values = tuple(parse_value(part, element) for part in _parts(text))
    if length is not None and len(values) != length:
        raise ValueError(text)
    return values


def _element(kind: Any) -> tuple[Any, int | None]:
    """The type of the elements of a sequence and their number, None for any number; the type is
    None if `kind` is no sequence."""
    if kind in (tuple, list):
        return Any, None
    if typing.get_origin(kind) not in (tuple, list, collections.abc.Sequence):
        return None, None
    arguments = typing.get_args(kind)
    fixed = typing.get_origin(kind) is tuple and arguments[-1] is not Ellipsis
    return arguments[0], len(arguments) if fixed else None


def _parts(text: str) -> Sequence[str]:
    """The texts of the elements of "(1, 2)", "[1, 2]", "1,2" or "('a', 'b')"."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # text without quotes
        inner = _BRACKETS.fullmatch(text)
        return [part.strip() for part in (inner[1] if inner else text).split(",") if part.strip()]
    return [str(value) for value in (values if isinstance(values, tuple | list) else [values])]


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    element, length = _element(kind)
    if element is None:
        return _NAMES.get(kind, "it in the config file: no flag can say it")
    noun = {int: "whole numbers", float: "numbers", str: "texts"}.get(element, "values")
    example = {float: "(0.5, 1.5)", str: "a,b"}.get(element, "(1, 2)")
    return f"{noun if length is None else f'{length} {noun}'}, for example {example}"
