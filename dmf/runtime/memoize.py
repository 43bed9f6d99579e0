"""Memoisation of compiled functions: two runs of one process that compute the same share a program.

A program is traced and compiled once for the components it depends on, for example once for all
runs of a sweep that differ in the seed alone.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_P, _T = ParamSpec("_P"), TypeVar("_T")
# Number of results that a function remembers. Compiled programs take memory.
REMEMBERED = 16


def memoized(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The same function, which remembers the results of its last calls with equal arguments.

    Components are frozen dataclasses, which are equal if their class and all fields are. With an
    argument that cannot be hashed, for example a component of a plugin that holds an array, the
    function computes its result anew.

    >>> calls = []
    >>> square = memoized(lambda x: calls.append(x) or x)
    >>> [square(3), square(3), square([]), square([])]
    [3, 3, [], []]
    >>> calls
    [3, [], []]
    """
    remembering = functools.lru_cache(maxsize=REMEMBERED, typed=True)(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        hashable = all(map(_is_hashable, (*args, *kwargs.values())))
        return (remembering if hashable else function)(*args, **kwargs)

    return call


def _is_hashable(value: Any) -> bool:
    """Whether a value can be hashed: a tuple or a dataclass may hold what cannot."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
