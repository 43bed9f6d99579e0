"""What a sweep is: runs of one config that differ in some fields, and what each is called.

A sweep file has a function `get_sweep()` that gives a dictionary of overrides for each run, by
dotted names: `{"model.split_depth": 3, "seed": 0}`. A run is called after its own overrides alone,
`model.split_depth=3,seed=0`, so that its directory stays its own when the sweep grows or is put in
another order.
"""

import dataclasses
import hashlib
import itertools
import pathlib
import re
import runpy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from dmf.typing import InputError

# Of a name; file systems take 255 bytes, and there are files below it.
LONGEST = 200
# The run that overrides nothing.
BASE = "base"
_FIELD = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_UNSAFE = re.compile(r"[^A-Za-z0-9_=,.+-]+")
_PLAIN = (bool, int, float, str)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A run of a sweep.

    Attributes:
      overrides: values by dotted field, in the order of the fields' names.
      name: of its directory.
    """

    overrides: Mapping[str, Any]
    name: str

    def __post_init__(self):
        for field, value in self.overrides.items():
            if not _FIELD.fullmatch(str(field)):
                raise InputError(f"{field}={value}: give fields by dotted name, as "
                                 "model.split_depth")
            each = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(part, _PLAIN) for part in each):
                raise InputError(f"{field}={value!r}: a sweep sets numbers, text, True, False, and "
                                 "tuples of them; name the fields of a component one by one")

    @property
    def flags(self) -> list[str]:
        """The overrides as `dmf train` takes them."""
        return [f"--config.{field}={value}" for field, value in self.overrides.items()]


def grid(fields: Mapping[str, Iterable[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of some values of each field, the last field changing fastest."""
    for values in itertools.product(*fields.values()):
        yield dict(zip(fields, values, strict=True))


def read(path: str) -> list[Mapping[str, Any]]:
    """The overrides that a sweep file gives, one dictionary a run.

    Raises:
      InputError: there is no such file, it cannot be run, or it gives something else.
    """
    if not pathlib.Path(path).is_file():
        raise InputError(f"--sweep={path}: no such file")
    try:
        given = list(runpy.run_path(path)["get_sweep"]())
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"--sweep={path}: it must have a function get_sweep() that gives "
                         f"dictionaries of overrides ({reason})") from error
    for overrides in given:
        if not isinstance(overrides, Mapping):
            raise InputError(f"--sweep={path}: get_sweep() gives dictionaries of overrides, and "
                             f"not {overrides!r}")
    if not given:
        raise InputError(f"--sweep={path}: get_sweep() gives no run")
    return given


def _ordered(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """In the order of the names, with values of Python's own types, lists as tuples."""
    ordered = sorted(overrides.items(), key=lambda item: str(item[0]))
    return {field: _own(value) for field, value in ordered}


def _own(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_own, value))
    # Those of NumPy are of their own types too.
    return next((kind(value) for kind in (float, str) if isinstance(value, kind)), value)


def variants(sweep: Sequence[Mapping[str, Any]]) -> tuple[Variant, ...]:
    """The runs of a sweep under their names.

    Raises:
      InputError: a field or a value that cannot be, or two runs with the same overrides.
    """
    made = tuple(Variant(overrides=o, name=_name(o)) for o in map(_ordered, sweep))
    same([(variant, variant.name) for variant in made])
    return made


def same(keyed: Iterable[tuple[Variant, str]]) -> None:
    """Raises InputError where two variants have the same key."""
    seen: dict[str, Variant] = {}
    for variant, key in keyed:
        if key in seen:
            both = f"{_shown(seen[key])} and {_shown(variant)}"
            raise InputError(f"{both}: the sweep has the same run twice; leave one out")
        seen[key] = variant


def _shown(variant: Variant) -> str:
    pairs = [f"{field}={value}" for field, value in variant.overrides.items()]
    return ", ".join(pairs) or "{} (nothing set)"


def _name(overrides: Mapping[str, Any]) -> str:
    """All of the overrides, as a file system takes it; with a digest where they are not to be read
    from it again."""
    told = ",".join(f"{field}={_text(value)}" for field, value in overrides.items()) or BASE
    safe = _UNSAFE.sub("-", told)
    if len(safe) <= LONGEST and repr(_told(safe)) == repr(dict(overrides)):
        return safe
    digest = _digest(overrides)
    return f"{safe[: LONGEST - len(digest) - 1]}-{digest}"


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _told(name: str) -> dict[str, Any]:
    """The overrides that a name tells at first sight."""
    pairs = [part.partition("=") for part in name.split(",") if name != BASE]
    return {field: _value(text) for field, _, text in pairs}


def _value(text: str) -> Any:
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    if text in ("True", "False"):
        return text == "True"
    return tuple(map(_value, text.split("+"))) if "+" in text else text


def _digest(overrides: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(dict(overrides)).encode()).hexdigest()[:8]
