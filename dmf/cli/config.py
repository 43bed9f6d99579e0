"""dmf config --config=FILE [--config.a.b=value ...]

Prints the config that a run would have: a line for each field, with its value and its meaning; for
a field that names a component, also the names that it may take. Nothing is computed.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict

from dmf import registry
from dmf.cli import config_flag

# The column of the meanings, unless a setting is longer.
_WIDTH = 48


def config(
    config: ConfigDict | str | os.PathLike, overrides: Mapping[str, Any] | None = None
) -> ConfigDict:
    """The config of a run: all fields, as `dmf train` would have them.

    >>> made = dmf.config("dmf:digits_sit", {"run.steps": 100, "optimizer.learning_rate": 1e-3})
    >>> made.run.steps, made.model.depth
    (100, 6)

    Args:
      config: a Python file with `get_config()`, FILE:ARG for `get_config(ARG)`, dmf:NAME for a
        config of the package, or a config.
      overrides: values by dotted field, as --config.FIELD=VALUE on the command line; `dmf config`
        prints the fields with their meanings.

    Returns:
      A new config. It has taken the fields of its initial checkpoint, if it names one.

    Raises:
      InputError: no such file or field, or a value that it cannot have.
    """
    from dmf.checkpoints.located import look_again

    look_again()
    return config_flag.resolved(config, config_flag.as_flags(overrides))


def main(verb: str, arguments: Sequence[str]) -> None:
    """Prints a config with the meaning of every field."""
    values = absl_flags.FlagValues()
    resolved = config_flag.parse_with_config(verb, arguments, values, __doc__)
    from dmf.default_config import Config

    lines = list(settings(Config, resolved.to_dict()))
    width = min(_WIDTH, max(len(setting) for setting, _ in lines))
    for setting, meaning in lines:
        print(f"{setting:<{width}}  # {meaning}" if meaning else setting)


def settings(
    kind: str | type, part: Any, place: str = "", meaning: str = ""
) -> Iterator[tuple[str, str]]:
    """(setting, meaning) of every field of a part of a config, in the order of its class.

    Args:
      kind: kind of the component, or the dataclass of a group of fields.
      part: the part of the config.
      place: dotted name of the part.
      meaning: meaning of the part.
    """
    cls = kind
    if isinstance(kind, str):
        name = part["name"] if isinstance(part, Mapping) else part
        field = f"{place}.name" if isinstance(part, Mapping) else place
        choices = f"one of {', '.join(sorted(registry.components(kind)))}"
        yield f"{field} = {name!r}", "; ".join(filter(None, (meaning.removesuffix("."), choices)))
        cls = registry.lookup(kind, name)
    if isinstance(cls, type) and isinstance(part, Mapping):
        meanings = registry.field_docs(cls)
        for name, field in registry.config_fields(cls).items():
            if name in part:
                at = f"{place}.{name}" if place else name
                yield from _field_settings(field, part[name], at, meanings.get(name, ""))


def _field_settings(
    field: Any, value: Any, place: str, meaning: str
) -> Iterator[tuple[str, str]]:
    kind = registry.field_kind(field)
    if kind is None or (registry.holds_by_name(field) and not value):
        yield f"{place} = {value!r}", meaning
    elif registry.holds_by_name(field):
        for name, part in value.items():
            yield from settings(kind, part, f"{place}.{name}", meaning)
    else:
        yield from settings(kind, value, place, meaning)
