"""dmf components [--plugins=FILE,...] [KIND ...]

Lists the components that a config may choose by name, kind by kind, each with its fields, their
defaults and their meanings. Components that --plugins registers are listed too.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from dmf import registry
from dmf.cli import flags
from dmf.errors import InputError


def main(verb: str, arguments: Sequence[str]) -> None:
    """Prints the registered components."""
    values = absl_flags.FlagValues()
    flags.define_plugins(values)
    chosen = flags.parse(verb, arguments, values, __doc__)
    import dmf.default_config  # noqa: F401 - every room registers its components

    kinds = registry.kinds()
    for kind in chosen:
        if kind not in kinds:
            raise InputError(kind, remedy=f"no such kind; choose one of {', '.join(kinds)}")
    print("\n\n".join("\n".join(lines(kind)) for kind in chosen or kinds))


def lines(kind: str) -> Iterator[str]:
    """The lines about a kind of component: its description, its components, and their fields."""
    yield f"{kind}: {registry.kinds()[kind]}"
    components = registry.components(kind)
    if not components:
        yield "  none is registered"
    for name, component in sorted(components.items()):
        summary = registry.summary(component)
        yield f"  {name}: {summary}" if summary else f"  {name}"
        yield from _fields(kind, name) if isinstance(component, type) else _values(component)


def _fields(kind: str, name: str) -> Iterator[str]:
    """A line for each field that a config may give."""
    cls = registry.lookup(kind, name)
    meanings, defaults = registry.field_docs(cls), registry.default_config(kind, name)
    for field in registry.config_fields(cls):
        default = f" = {_shown(defaults[field])}" if field in defaults else ""
        meaning = f"  # {meanings[field]}" if field in meanings else ""
        yield f"    {field}{default}{meaning}"


def _values(component: Any) -> Iterator[str]:
    """A line for each value of a component whose fields no config can give."""
    for field in dataclasses.fields(component) if dataclasses.is_dataclass(component) else ():
        value = getattr(component, field.name)
        if not callable(value):
            yield f"    {field.name}: {_shown(value)}"


def _shown(value: Any) -> str:
    """A default value: a component as NAME(FIELD=VALUE, ...)."""
    if not isinstance(value, Mapping):
        return repr(value)
    fields = ", ".join(f"{key}={_shown(part)}" for key, part in value.items() if key != "name")
    return f"{value['name']}({fields})" if "name" in value else f"({fields})"
