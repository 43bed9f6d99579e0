"""Which values a config field may have, by the type that it is annotated with.

These types are bool, int, float, str, None, `typing.Literal`, tuples and lists of them, and unions;
a field of another type may have any value.
"""

import collections.abc
import types
import typing
from typing import Any

_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text",
          types.NoneType: "None"}  # fmt: skip
# A whole number is a number too; True is neither.
_CLASSES = {int: (int,), float: (int, float), bool: (bool,), str: (str,),
            types.NoneType: (types.NoneType,)}  # fmt: skip


def has_type(value: Any, annotation: Any) -> bool:
    """Whether a value is one of a type.

    >>> has_type(1, float), has_type("1", int), has_type([1, 2], tuple[int, ...])
    (True, False, True)
    """
    return any(_has_one_type(value, kind) for kind in alternatives(annotation))


def _has_one_type(value: Any, kind: Any) -> bool:
    if kind in _CLASSES:
        return isinstance(value, _CLASSES[kind]) and (kind is bool or not isinstance(value, bool))
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    element, length = element_type(kind)
    if element is None:
        return True
    return (isinstance(value, tuple | list) and length in (None, len(value))
            and all(has_type(part, element) for part in value))


def describe_type(annotation: Any) -> str:
    """Which values a type has, in words.

    >>> describe_type(int | None), describe_type(tuple[float, float])
    ('a whole number or None', '2 numbers, for example (0.5, 1.5)')
    """
    return " or ".join(_described(kind) for kind in alternatives(annotation))


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    element, length = element_type(kind)
    if element is None:
        return _NAMES.get(kind, "it in the config file: no flag can say it")
    noun = {int: "whole numbers", float: "numbers", str: "texts"}.get(element, "values")
    example = {float: "(0.5, 1.5)", str: "('a', 'b')"}.get(element, "(1, 2)")
    return f"{noun if length is None else f'{length} {noun}'}, for example {example}"


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, text last, which every text stands for; or the type itself."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    members = typing.get_args(annotation) if union else (annotation,)
    return sorted(members, key=lambda kind: kind is str)


def element_type(kind: Any) -> tuple[Any, int | None]:
    """The type of the elements of a sequence and their number, None for any number; the type is
    None if `kind` is no sequence."""
    if kind in (tuple, list):
        return Any, None
    if typing.get_origin(kind) not in (tuple, list, collections.abc.Sequence):
        return None, None
    arguments = typing.get_args(kind)
    fixed = typing.get_origin(kind) is tuple and arguments[-1] is not Ellipsis
    return arguments[0], len(arguments) if fixed else None
