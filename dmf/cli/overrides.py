"""Overrides of a config from the command line, as --config.a.b=value.

Every field can be overridden. An override of a `name` chooses another component, which begins with
its own defaults, for example

    --config.sampling.sampler.name=ctm --config.sampling.sampler.gamma=0.3

The flags may stand in any order: names are applied first, the outermost first, then other fields.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dmf import registry
from dmf.cli.config_flag import NO_PREFIX, PREFIX
from dmf.cli.field_values import parse_value
from dmf.default_config import Config
from dmf.errors import NO_VALUE, InputError
from dmf.types import describe_type


def apply(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """A config with overrides applied.

    >>> from dmf.default_config import get_config
    >>> apply(get_config(), ["--config.optimizer.learning_rate=1e-3"]).optimizer.learning_rate
    0.001

    Args:
      config: a config with all fields; it is not changed.
      overrides: as "--config.a.b=value"; "--config.a.b" and "--noconfig.a.b" for booleans.

    Raises:
      InputError: no such field, or a value that it cannot have.
    """
    tree = config.to_dict()
    parsed = [_parse(override) for override in overrides]
    for override in sorted(parsed, key=lambda o: len(o.path)):
        if _chooses_by_name(tree, override):
            _choose(_find(tree, override, override.path[:-1]), override)
    for override in parsed:
        _set(tree, override)
    return ConfigDict(tree)


class _Override(NamedTuple):
    """An override, taken apart.

    Attributes:
      flag: for messages, as "--config.a.b".
      path: names from the top of the config.
      value: text behind the "="; True or False for a flag that stands alone.
    """

    flag: str
    path: tuple[str, ...]
    value: str | bool

    def error(self, remedy: str) -> InputError:
        """What is wrong with this override."""
        alone = isinstance(self.value, bool)
        return InputError(self.flag, NO_VALUE if alone else self.value, remedy)


def _parse(override: str) -> _Override:
    off = override.startswith(NO_PREFIX)
    name, equals, text = override.removeprefix(NO_PREFIX if off else PREFIX).partition("=")
    if off and equals:
        raise InputError(override, remedy="--noconfig.a.b takes no value")
    return _Override(f"{PREFIX}{name}", tuple(name.split(".")), text if equals else not off)


class _Slot(NamedTuple):
    """The place of a value in a config.

    Attributes:
      parent: the part of the config that holds the value.
      key: name of the value in `parent`.
      kind: kind of the component there; or the dataclass of a group of fields; None for one value.
      annotation: type of one value; None for a component or a group.
    """

    parent: dict[str, Any]
    key: str
    kind: str | type | None
    annotation: Any = None


def _chooses_by_name(tree: dict[str, Any], override: _Override) -> bool:
    """Whether an override is of the `name` of a component, and not of a field with that name. A new
    name in a dictionary of components gets an empty entry."""
    if override.path[-1] != "name" or len(override.path) == 1:
        return False
    return isinstance(_find(tree, override, override.path[:-1], may_create=True).kind, str)


def _choose(slot: _Slot, override: _Override) -> None:
    """Puts another component in a place, with its defaults; the same one keeps its fields."""
    try:
        chosen = registry.default_config(slot.kind, str(override.value))
    except InputError as error:
        raise override.error(error.remedy) from None
    if _name_of(slot.parent.get(slot.key)) != override.value:
        slot.parent[slot.key] = chosen


def _set(tree: dict[str, Any], override: _Override) -> None:
    """Applies an override that does not choose a component by its `name`."""
    if _chooses_by_name(tree, override):
        return
    slot = _find(tree, override, override.path)
    if isinstance(slot.kind, str):
        _choose(slot, override)
    elif slot.kind is not None:
        raise override.error(f"set its fields one by one: {_listed(_fields(slot.kind, None))}")
    else:
        try:
            slot.parent[slot.key] = parse_value(override.value, slot.annotation)
        except ValueError:
            raise override.error(f"give {describe_type(slot.annotation)}") from None


def _find(
    tree: dict[str, Any], override: _Override, path: Sequence[str], *, may_create: bool = False
) -> _Slot:
    """Where a path leads in a config.

    Args:
      tree: the config.
      override: for messages.
      path: names from the top.
      may_create: whether the last name may be a new one of components by name (`emas.NAME`).

    Raises:
      InputError: there is no such field.
    """
    part, kind, names = tree, Config, list(path)
    while True:
        fields, name = _fields(kind, part), names.pop(0)
        if name not in fields:
            raise override.error(_unknown(name, kind, part))
        slot = _Slot(part, name, registry.field_kind(fields[name]))
        if registry.holds_by_name(fields[name]):
            slot = _named_slot(slot, override, names, may_create=may_create)
        if slot.kind is None:
            annotation = registry.field_type(_class(kind, part), name)
            slot = slot._replace(annotation=annotation)
        if not names:
            return slot
        if slot.kind is None:
            raise override.error(f"no such field; {slot.key} is one value")
        part, kind = slot.parent[slot.key], slot.kind


def _named_slot(
    slot: _Slot, override: _Override, names: list[str], *, may_create: bool
) -> _Slot:
    """The place of a component in a dictionary of them; its name is taken from `names`."""
    parts = slot.parent[slot.key]
    if not names:
        raise override.error(f"name one of its parts, for example {override.flag}.NAME.name; there "
                             f"are {_listed(parts) or 'none yet'}")
    name = names.pop(0)
    if name not in parts:
        if names or not may_create:
            raise override.error(f"there is no {slot.key}.{name}; there are {_listed(parts)}; "
                                 f"{PREFIX}{slot.key}.{name}.name=... makes a new one")
        parts[name] = registry.default_config(slot.kind) if isinstance(slot.kind, type) else {}
    return _Slot(parts, name, slot.kind)


def _name_of(part: Any) -> Any:
    """The name of the component that a part of a config describes."""
    return part.get("name") if isinstance(part, Mapping) else part


def _class(kind: str | type, part: Any) -> Any:
    return kind if isinstance(kind, type) else registry.lookup(kind, _name_of(part))


def _fields(kind: str | type, part: Any) -> dict[str, Any]:
    """The fields of a part of a config; none for a component without fields to choose."""
    cls = _class(kind, part)
    return registry.config_fields(cls) if isinstance(cls, type) else {}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _unknown(name: str, kind: str | type, part: Any) -> str:
    """What could be meant by the name of a field that there is not."""
    fields = _fields(kind, part)
    guess = difflib.get_close_matches(name, fields, 1)
    if guess:
        return f"no such field; did you mean {guess[0]}?"
    if isinstance(kind, str):
        others = [other for other in registry.components(kind) if name in _fields(kind, other)]
        if others:
            return (f"{_name_of(part)} has no such field; choose a {kind} that has, by its name: "
                    f"{_listed(others)}")
    return f"no such field; there are {_listed(fields) or 'none'}"
