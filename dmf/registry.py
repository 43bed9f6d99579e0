"""Components by kind and name, and the way from a config to a component and back.

A kind is what a component is for: "objective", "sampler", "metric". Each room defines its kinds and
registers its own components in its `__init__`; this module knows none of them. A config file may
register components of its own, see docs/extending.md.

A component is a frozen, keyword-only dataclass. A config holds it as a dictionary of its `name` and
its fields, for example {"name": "logit_normal", "mean": 0.4, "std": 1.0}; the name alone stands for
a component with its defaults. The defaults are those of the dataclass, written once. A field that
holds another component says of which kind, with `component_field`; a field whose default is a
plain dataclass is a group of fields without a name.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dmf.errors import InputError
from dmf.types import describe_type, has_type

_COMPONENTS: dict[str, dict[str, Any]] = {}
_DESCRIPTIONS: dict[str, str] = {}
_BASES: dict[str, type | None] = {}
# Whole numbers are int32 in compiled programs.
_LARGEST = 2**31
# Numbers that float32 holds as what they are, not as 0 or infinity.
_SMALLEST, _HUGEST = 1.2e-38, 3.4e38


def define_kind(kind: str, description: str, base: Any = None, /, **components: Any) -> None:
    """Defines a kind of component, and registers the first components of it.

    Args:
      kind: its name, for example "sampler".
      description: one line that says what a component of this kind does.
      base: the class that all components of this kind are derived from; None for any class.
      components: dataclasses (or objects of one, without fields to choose) by name.
    """
    _DESCRIPTIONS[kind] = description
    _BASES[kind] = base
    _COMPONENTS.setdefault(kind, {}).update(components)


def register(kind: str, **components: Any) -> None:
    """Registers components, which configs then choose by name.

    For example, `register("time_sampler", powers=Powers)` lets a config say
    `--config.objective.time_sampler.name=powers --config.objective.time_sampler.power=2`.

    Args:
      kind: one of `kinds()`.
      components: dataclasses (or objects of one, without fields to choose) by name; for the kind
        "dataset", functions.

    Raises:
      InputError: there is no such kind, or a class is not derived from the base class of the kind.
    """
    if kind not in _COMPONENTS:
        raise InputError("kind", kind, f"choose one of {', '.join(kinds())}")
    for name, component in components.items():
        base, cls = _BASES[kind], component if isinstance(component, type) else type(component)
        if base is not None and base not in cls.__mro__:
            raise InputError(f"{kind}.{name}", cls.__name__, "derive the class from "
                             f"{base.__module__}.{base.__name__}")
    _COMPONENTS[kind].update(components)


def kinds() -> dict[str, str]:
    """The description of every kind, by its name."""
    return dict(sorted(_DESCRIPTIONS.items()))


def components(kind: str) -> Mapping[str, Any]:
    """The registered components of a kind by name."""
    return types.MappingProxyType(_COMPONENTS[kind])


def lookup(kind: str, name: Any) -> Any:
    """The component that is registered under a name.

    Raises:
      InputError: there is none; its field is "name".
    """
    if not isinstance(name, str) or name not in _COMPONENTS[kind]:
        names = ", ".join(sorted(_COMPONENTS[kind]))
        choice = f"choose one of {names}; or " if names else ""
        raise InputError("name", name, f"{choice}give the file that registers it, --plugins=FILE")
    return _COMPONENTS[kind][name]


def component_field(
    kind: str | type, default: Any = dataclasses.MISSING, *, by_name: bool = False
) -> Any:
    """A dataclass field that holds a component.

    Args:
      kind: the kind of the component; or the dataclass of a group of fields.
      default: the component by default; none if the field must be given.
      by_name: whether the field holds a dictionary of components by a name that users choose.
    """
    metadata = {"kind": kind, "by_name": by_name}
    if by_name:
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def runtime_field(default: Any = None) -> Any:
    """A dataclass field that no config holds: the program fills it in."""
    return dataclasses.field(default=default, metadata={"runtime": True})


def config_fields(cls: type) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass that a config may give, by name; none for another class."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return {field.name: field for field in fields
            if field.init and not field.metadata.get("runtime")}


def field_default(field: dataclasses.Field) -> Any:
    """The default of a field; `dataclasses.MISSING` if it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def field_kind(field: dataclasses.Field) -> str | type | None:
    """The kind of component that a field holds, or the dataclass of a group of fields, or None."""
    if "kind" in field.metadata:
        return field.metadata["kind"]
    default = field_default(field)
    return type(default) if _is_component(default) else None


def holds_by_name(field: dataclasses.Field) -> bool:
    """Whether a field holds a dictionary of components by a name that users choose."""
    return bool(field.metadata.get("by_name"))


def build(kind: str | type, config: Any, **given: Any) -> Any:
    """The component that a part of a config describes, its inner components first.

    Args:
      kind: of the component; or the dataclass of a group of fields.
      config: a mapping of `name` and fields; or the name alone.
      given: fields that do not come from the config.

    Raises:
      InputError: an unknown name or field; a value of another type than the field's; a number that
        is NaN, infinite, or too large for int32; or a value that the component refuses. The error
        names the field relative to this part of the config.
    """
    values = _named_values(config)
    if isinstance(kind, type):
        cls, name = kind, kind.__name__
    else:
        name = values.pop("name", None)
        cls = lookup(kind, name)
    if not _is_component(cls) and not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise InputError("name", name, f"{cls!r} is no dataclass, whose fields a config could "
                         "give; make it one, frozen and keyword-only")
    if not isinstance(cls, type):
        _refuse_unknown(name, values, {})
        return cls
    fields = config_fields(cls)
    _refuse_unknown(name, values, fields)
    check_types(cls, values)
    values = {key: _field_value(fields[key], value) for key, value in values.items()}
    for key, field in fields.items():
        if key not in values | given and field_default(field) is dataclasses.MISSING:
            raise InputError(key, remedy=f"{name} has no default for it; give one")
    return cls(**values, **given)


@contextmanager
def at(place: str) -> Iterator[None]:
    """Adds the place of a part of the config to the errors about it.

    Raises:
      InputError: whatever was raised within, its field named from the top of the config.
    """
    try:
        yield
    except InputError as error:
        raise error.at(place) from None


def to_config(component: Any, kind: str | None = None) -> Any:
    """A component as a config holds it: its name and its fields, or its name alone.

    >>> from dmf.objectives import LogitNormal
    >>> to_config(LogitNormal(mean=0.4))
    {'name': 'logit_normal', 'mean': 0.4, 'std': 1.0}

    Args:
      component: a dataclass object that is registered, or a group of fields.
      kind: of the component; found from its class by default.

    Raises:
      InputError: the class of the component is not registered under that kind.
    """
    kind = kind or next((kind for kind, table in _COMPONENTS.items()
                         if type(component) in table.values()), None)
    named = {} if kind is None else _named(component, kind)
    if isinstance(named, str):
        return named
    return named | {
        name: _plain(getattr(component, name), field)
        for name, field in config_fields(type(component)).items()
    }


def default_config(kind: str | type, name: str = "") -> Any:
    """The defaults of a component as a config holds them; fields that have none are left out."""
    cls = kind if isinstance(kind, type) else lookup(kind, name)
    if not isinstance(cls, type):
        return name
    defaults = {key: (field, field_default(field)) for key, field in config_fields(cls).items()}
    values = {key: _plain(value, field) for key, (field, value) in defaults.items()
              if value is not dataclasses.MISSING}
    return values if isinstance(kind, type) else {"name": name, **values}


def complete(kind: str | type, config: Any) -> Any:
    """A part of a config with the defaults of all fields that it leaves out.

    Args:
      kind: of the component; or the dataclass of a group of fields.
      config: a mapping of `name` and fields; or the name alone.

    Raises:
      InputError: an unknown name or field, or a value of another type than the field's. The error
        names the field relative to this part of the config.
    """
    values = _named_values(config)
    name = "" if isinstance(kind, type) else values.get("name")
    cls = kind if isinstance(kind, type) else lookup(kind, name)
    if not isinstance(cls, type):
        return name
    fields = config_fields(cls)
    given = {key: value for key, value in values.items() if isinstance(kind, type) or key != "name"}
    _refuse_unknown(name or cls.__name__, given, fields)
    check_types(cls, given)
    full = default_config(kind, name)
    for key, value in given.items():
        with at(key):
            full[key] = _complete_field(fields[key], value)
    return full


def _complete_field(field: dataclasses.Field, value: Any) -> Any:
    kind = field_kind(field)
    if kind is None:
        return value
    if not holds_by_name(field):
        return complete(kind, value)
    return {name: _at(name, complete, kind, part) for name, part in _named_values(value).items()}


def field_type(cls: type, name: str) -> Any:
    """The annotated type of a field of a dataclass; the type of its default where the annotation
    cannot be resolved."""
    hints = _type_hints(cls)
    return hints[name] if name in hints else type(field_default(config_fields(cls)[name]))


@functools.cache
def _type_hints(cls: type) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):
        return {}


def check_types(cls: type, values: Mapping[str, Any]) -> None:
    """Checks that fields of a dataclass which hold no component have values of their types.

    Args:
      cls: the dataclass.
      values: by the name of the field; other names are ignored.

    Raises:
      InputError: a value is of another type, and not the default either.
    """
    for name, field in config_fields(cls).items():
        if name not in values or field_kind(field) is not None:
            continue
        value, annotation = values[name], field_type(cls, name)
        if value is not field_default(field) and not has_type(value, annotation):
            raise InputError(name, repr(value), f"give {describe_type(annotation)}")


def field_docs(cls: type) -> dict[str, str]:
    """What each field of a dataclass means: its entry under "Attributes:" in the docstring of the
    class, or of a class that it is derived from."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, _, attributes = text.partition("Attributes:\n")
        entries = re.findall(r"^  (\w[\w, ]*): ((?:.*)(?:\n   +.*)*)", attributes, re.M)
        for names, meaning in entries:
            docs |= dict.fromkeys(re.split(r", ", names), " ".join(meaning.split()))
    return docs


def summary(cls: Any) -> str:
    """One sentence about a component: the `description` of an object that has one, or else the
    first paragraph of the docstring of its class."""
    if not isinstance(cls, type) and getattr(cls, "description", ""):
        return cls.description
    text = inspect.cleandoc((cls if isinstance(cls, type) else type(cls)).__doc__ or "")
    return " ".join(text.split("\n\n")[0].split())


def _named_values(config: Any) -> dict[str, Any]:
    """A part of a config as a dictionary of its fields; of its `name` alone for a text."""
    if isinstance(config, str):
        return {"name": config}
    if not hasattr(config, "keys"):
        raise InputError("", config, "give a dictionary of its fields, or the name of a component")
    return dict(config)


def _is_component(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _named(component: Any, kind: str) -> Any:
    for name, registered in _COMPONENTS[kind].items():
        if registered is component:
            return name
        if registered is type(component):
            return {"name": name}
    raise InputError("kind", kind, f"no component of this kind is a {type(component).__name__}")


def _plain(value: Any, field: dataclasses.Field) -> Any:
    """The value of a field as a config holds it."""
    kind = field_kind(field)
    if holds_by_name(field):
        return {name: to_config(part, kind if isinstance(kind, str) else None)
                for name, part in value.items()}
    if _is_component(value):
        return to_config(value, kind if isinstance(kind, str) else None)
    return list(value) if isinstance(value, list) else value


def _field_value(field: dataclasses.Field, value: Any) -> Any:
    """The value of a field from its part of a config."""
    kind = field_kind(field)
    with at(field.name):
        if kind is None:
            for number in value if isinstance(value, list | tuple) else (value,):
                _check_number(value, number)
            return _as_tuples(value)
        if holds_by_name(field):
            return {name: _at(name, build, kind, part)
                    for name, part in _named_values(value).items()}
        return value if _is_component(value) else build(kind, value)


def _as_tuples(value: Any) -> Any:
    """A value with tuples in place of lists."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _check_number(value: Any, number: Any) -> None:
    """Raises InputError for a number that no field takes; `value` is the number, or holds it."""
    if isinstance(number, float) and not math.isfinite(number):
        raise InputError("", value, "give a finite number")
    if isinstance(number, float) and number and not _SMALLEST <= abs(number) <= _HUGEST:
        raise InputError("", value, f"float32 holds numbers from {_SMALLEST} to {_HUGEST}, and 0")
    if isinstance(number, int) and abs(number) >= _LARGEST:
        raise InputError("", value, f"give a whole number below 2^31 = {_LARGEST}")


def _at(place: str, make: Callable[[str | type, Any], Any], kind: str | type, part: Any) -> Any:
    with at(place):
        return make(kind, part)


def _refuse_unknown(name: Any, values: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key not in fields:
            guess = difflib.get_close_matches(key, fields, 1)
            known = f"it has {', '.join(sorted(fields)) or 'none'}"
            raise InputError(key, value, f"{name} has no such field; "
                             + (f"did you mean {guess[0]}?" if guess else known))
