"""The runs of a sweep: one config with different overrides, and a directory name for each run.

A sweep file has a function `get_sweep()` that returns a dictionary of overrides for each run, by
dotted field: `{"model.split_depth": 3, "seed": 0}`. The name of a run depends on its own overrides
alone, `model.split_depth=3,seed=0`, so that a run keeps its directory when the sweep grows or its
order changes.
"""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import runpy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from dmf.errors import InputError
from dmf.runtime.paths import user_path

# Characters of a directory name. File systems take 255 bytes.
MAX_NAME_LENGTH = 200
# The name of the run without overrides.
BASE_NAME = "base"
_FIELD = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_UNSAFE = re.compile(r"[^A-Za-z0-9_=,.+-]+")
_VALUE_TYPES = (bool, int, float, str)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A run of a sweep.

    Attributes:
      overrides: values by dotted field, sorted by field.
      name: name of its directory.
    """

    overrides: Mapping[str, Any]
    name: str

    def __post_init__(self):
        for field, value in self.overrides.items():
            if not _FIELD.fullmatch(str(field)):
                raise InputError(field, value, "give fields by dotted name, as model.split_depth")
            elements = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(element, _VALUE_TYPES) for element in elements):
                raise InputError(field, f"{value!r}", "a sweep sets numbers, text, True, False, "
                                 "and tuples of them; name the fields of a component one by one")

    @property
    def flags(self) -> list[str]:
        """The overrides as flags of `dmf train`."""
        return [f"--config.{field}={value}" for field, value in self.overrides.items()]


def grid(fields: Mapping[str, Iterable[Any]]) -> Iterator[dict[str, Any]]:
    """Yields every combination of values of some fields; the last field changes fastest.

    >>> list(grid({"seed": (0, 1), "model.depth": (2,)}))
    [{'seed': 0, 'model.depth': 2}, {'seed': 1, 'model.depth': 2}]

    Args:
      fields: values by dotted field.
    """
    for values in itertools.product(*fields.values()):
        yield dict(zip(fields, values, strict=True))


def read_sweep(path: str) -> list[Mapping[str, Any]]:
    """Reads the overrides of every run from a sweep file.

    Args:
      path: path of a Python file with `get_sweep()`.

    Raises:
      InputError: there is no such file, it raises an error, or it returns something else.
    """
    path = os.fspath(user_path(path))
    if not pathlib.Path(path).is_file():
        raise InputError("--sweep", path, "no such file")
    try:
        sweep = list(runpy.run_path(path)["get_sweep"]())
    except InputError:
        raise
    except Exception as error:  # A sweep file may raise anything.
        reason = f"{type(error).__name__}: {error}"
        raise InputError("--sweep", path, "it must have a function get_sweep() that returns "
                         f"dictionaries of overrides ({reason})") from error
    for overrides in sweep:
        if not isinstance(overrides, Mapping):
            raise InputError("--sweep", path, "get_sweep() must return dictionaries of overrides, "
                             f"and not {overrides!r}")
    if not sweep:
        raise InputError("--sweep", path, "get_sweep() returns no run")
    return sweep


def variants(sweep: Sequence[Mapping[str, Any]]) -> tuple[Variant, ...]:
    """The runs of a sweep with their names.

    >>> [variant.name for variant in variants([{"seed": 0, "model.depth": 2}, {}])]
    ['model.depth=2,seed=0', 'base']

    Args:
      sweep: overrides of each run by dotted field.

    Raises:
      InputError: a field or a value that no run can have, or two runs with the same overrides.
    """
    named = tuple(Variant(overrides=o, name=_name(o)) for o in map(_canonical, sweep))
    check_distinct([(variant, variant.name) for variant in named])
    return named


def check_distinct(keyed: Iterable[tuple[Variant, str]]) -> None:
    """Raises InputError if two variants have the same key."""
    by_key: dict[str, Variant] = {}
    for variant, key in keyed:
        if key in by_key:
            both = f"{_describe(by_key[key])} and {_describe(variant)}"
            raise InputError(both, remedy="the sweep has the same run twice; leave one out")
        by_key[key] = variant


def _describe(variant: Variant) -> str:
    pairs = [f"{field}={value}" for field, value in variant.overrides.items()]
    return ", ".join(pairs) or "{} (nothing set)"


def _canonical(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides sorted by field, with values of Python's own types and lists as tuples."""
    pairs = sorted(overrides.items(), key=lambda item: str(item[0]))
    return {field: _plain_value(value) for field, value in pairs}


def _plain_value(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain_value, value))
    # float and str have subclasses in NumPy, whose representation differs.
    return next((kind(value) for kind in (float, str) if isinstance(value, kind)), value)


def _name(overrides: Mapping[str, Any]) -> str:
    """The overrides as a name that file systems take; with a digest if the overrides cannot be read
    from the name again."""
    text = ",".join(f"{f}={_value_text(v)}" for f, v in overrides.items()) or BASE_NAME
    safe = _UNSAFE.sub("-", text)
    if len(safe) <= MAX_NAME_LENGTH and repr(_parse_name(safe)) == repr(dict(overrides)):
        return safe
    digest = hashlib.sha256(repr(dict(overrides)).encode()).hexdigest()[:8]
    return f"{safe[: MAX_NAME_LENGTH - len(digest) - 1]}-{digest}"


def _value_text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parse_name(name: str) -> dict[str, Any]:
    """The overrides that a reader takes a name for."""
    pairs = [part.partition("=") for part in name.split(",") if name != BASE_NAME]
    return {field: _parse_value(text) for field, _, text in pairs}


def _parse_value(text: str) -> Any:
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    if text in ("True", "False"):
        return text == "True"
    return tuple(map(_parse_value, text.split("+"))) if "+" in text else text
