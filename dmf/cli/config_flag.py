"""The config of a command line: --config=FILE with overrides, or that of a checkpoint."""

import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict

from dmf import registry
from dmf.cli import flags
from dmf.errors import InputError
from dmf.runtime import progress

PREFIX = "--config."
NO_PREFIX = "--noconfig."
_NEGATIVE_NUMBER = re.compile(r"-([\d.]|inf|nan)")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides among some arguments, each as one text, and the other arguments.

    >>> split_overrides(["--workdir=x", "--config.run.steps", "5", "--config.model.scan"])
    (['--config.run.steps=5', '--config.model.scan'], ['--workdir=x'])
    """
    overrides, others, remaining = [], [], list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith((PREFIX, NO_PREFIX)):
            others.append(argument)
            continue
        alone = argument.startswith(PREFIX) and "=" not in argument
        if alone and remaining and _is_value(remaining[0]):
            argument += f"={remaining.pop(0)}"
        overrides.append(argument)
    return overrides, others


def _is_value(argument: str) -> bool:
    return not argument.startswith("-") or bool(_NEGATIVE_NUMBER.match(argument))


def overridden_field(override: str) -> str:
    """The dotted name of the field that an override sets.

    >>> overridden_field("--config.run.steps=5")
    'run.steps'
    """
    return override.removeprefix(NO_PREFIX).removeprefix(PREFIX).partition("=")[0]


def parse_with_config(
    verb: str, arguments: Sequence[str], values: absl_flags.FlagValues, usage: str
) -> ConfigDict:
    """Reads the flags of a verb that takes --config=FILE, and its config with overrides.

    Args:
      verb: name of the verb.
      arguments: of the command line after the verb.
      values: the defined flags, which are set.
      usage: what `--help` prints above the flags.

    Raises:
      InputError: no config file, or one that has no `get_config`; a flag or a field that is unknown
        or has a wrong value.
    """
    absl_flags.DEFINE_string("config", None, "a Python file with get_config(); FILE:ARG calls "
                             "get_config(ARG)", flag_values=values)
    overrides = parse_with_overrides(verb, arguments, values, usage)
    flags.require(values, "config")
    return resolved(values.config, overrides)


def resolved(
    config: ConfigDict | str | os.PathLike, overrides: Sequence[str] = ()
) -> ConfigDict:
    """The config of a run, see `configured`; what it takes from its initial checkpoint is printed.

    Args:
      config: a config, or a file as of `load_config`.
      overrides: as flags.

    Raises:
      InputError: no such file or field, or a value that it cannot have.
    """
    from_file = not isinstance(config, ConfigDict)
    config = load_config(os.fspath(config)) if from_file else complete(config)
    config, taken = configured(config, overrides)
    if taken:
        progress.log(f"from init.checkpoint={config.init.checkpoint}: {', '.join(taken)}")
    return config


def as_flags(overrides: Mapping[str, Any] | None) -> list[str]:
    """Overrides that are given in Python, by dotted field, as flags.

    >>> as_flags({"run.steps": 5, "sampling.steps": (1, 2)})
    ['--config.run.steps=5', '--config.sampling.steps=(1, 2)']
    """
    return [f"{PREFIX}{field}={value}" for field, value in (overrides or {}).items()]


def parse_with_overrides(
    verb: str, arguments: Sequence[str], values: absl_flags.FlagValues, usage: str
) -> list[str]:
    """Reads the flags of a verb that takes a checkpoint; returns the overrides of its config.

    Args:
      verb: name of the verb.
      arguments: of the command line after the verb.
      values: the defined flags, which are set.
      usage: what `--help` prints above the flags.

    Raises:
      InputError: a flag that is unknown or has a wrong value.
    """
    overrides, others = split_overrides(flags.expand_home(arguments))
    flags.define_plugins(values)
    flags.no_arguments(flags.parse(verb, others, values, usage))
    return overrides


def load_config(file: str) -> ConfigDict:
    """The config that a file gives, with the defaults of all fields that it leaves out.

    Args:
      file: path of a Python file with `get_config()`, or PATH:ARG for `get_config(ARG)`;
        dmf:NAME and dmf:NAME:ARG are the configs of the package.

    Raises:
      InputError: there is no such file, it has no `get_config`, or a field is unknown.
    """
    name, colon, argument = flags.shipped_file("--config", file).partition(":")
    module = flags.run_file("--config", pathlib.Path(name))
    if not hasattr(module, "get_config"):
        raise InputError("--config", file, "it has no function get_config(), which returns the "
                         "config; see configs/default.py")
    with flags.errors_of_file("--config", pathlib.Path(name)):
        config = module.get_config(argument) if colon else module.get_config()
    if not isinstance(config, ConfigDict):
        raise InputError("--config", file, "get_config() must return an "
                         "ml_collections.ConfigDict, see configs/default.py; it returned "
                         f"{type(config).__name__}")
    try:
        return complete(config)
    except InputError as error:
        raise error.within(f"--config={file}") from None


def complete(config: ConfigDict | Mapping) -> ConfigDict:
    """A config with the defaults of all fields that it leaves out.

    Raises:
      InputError: a field that is unknown.
    """
    from dmf.default_config import Config

    return ConfigDict(registry.complete(Config, config))


def configured(config: ConfigDict, overrides: Sequence[str]) -> tuple[ConfigDict, list[str]]:
    """The config of a run: that of a file with overrides applied, and with what it takes from its
    initial checkpoint, see `dmf.training.initial_checkpoint`.

    Fields of the command line are never replaced; fields that the file changes are not either,
    unless the command line names another checkpoint than the file. Sizes of the network that are -1
    are those of the checkpoint, or else of the dataset.

    Returns:
      The config; and what it took, as "model.width=384".

    Raises:
      InputError: no such field, or a value that it cannot have.
    """
    from flax.traverse_util import flatten_dict

    from dmf.default_config import get_config
    from dmf.training.initial_checkpoint import inherit

    given = {overridden_field(override) for override in overrides}
    if "init.checkpoint" not in given:
        ours, defaults = (flatten_dict(c.to_dict(), sep=".") for c in (config, get_config()))
        given |= {field for field, value in ours.items() if value != defaults.get(field)}
    config, taken = inherit(overridden(config, overrides), given)
    on_command_line = {overridden_field(override) for override in overrides}
    _name_datasets(config, on_command_line)
    _take_scaling(config, on_command_line)
    _take_sizes(config)
    return config, taken


def _take_sizes(config: ConfigDict) -> None:
    """Replaces each size of the network that is -1 by that of the dataset, in a config whose
    initial checkpoint has given its own.

    Raises:
      InputError: the dataset does not exist, or no network takes its samples.
    """
    from dmf.data.build import data, dataset_sizes
    from dmf.models.build import sizes_of_dataset

    if names := sizes_of_dataset(config.model):
        sizes = dataset_sizes(data(config.data))._asdict()
        config.model.update({name: sizes[name] for name in names})
        found = ", ".join(f"model.{name}={sizes[name]}" for name in names)
        progress.log(f"from data.directory={config.data.directory}: {found}")


def _take_scaling(config: ConfigDict, given: Collection[str]) -> None:
    """Scales cached latents by the statistics that lie beside them, where neither the command line
    nor the config scales them by channel.

    Raises:
      InputError: the file of statistics is damaged.
    """
    from dmf.checkpoints.latent_statistics import STATISTICS_FILE, dataset_statistics
    from dmf.data.datasets import CACHE

    fields = ("scale", "shift", "mean", "std")
    is_scaled = config.latents.mean or any(f"latents.{field}" in given for field in fields)
    if config.data.name != CACHE or is_scaled:
        return
    if scaling := dataset_statistics(config.data.directory):
        config.latents.update({field: getattr(scaling, field) for field in fields})
        progress.log(f"from {STATISTICS_FILE} in data.directory={config.data.directory}: "
                     f"latents.mean and latents.std of {len(scaling.mean)} channels")


def _name_datasets(config: ConfigDict, given: Collection[str]) -> None:
    """Gives a dataset without a name, or whose directory the command line names, the name that is
    stored there.

    Raises:
      InputError: the command line gives another name.
    """
    from dmf.data.datasets import CACHE, stored_name

    parts = {"data": config.data}
    parts |= {f"data.mixture.{name}": part for name, part in config.data.mixture.items()}
    for place, part in parts.items():
        is_new = f"{place}.directory" in given or not part.name
        name = stored_name(part.directory) if part.directory and is_new else ""
        if not name or re.split("[/:]", part.name)[0] == name:
            continue
        if f"{place}.name" not in given:
            part.name = name
        elif name != CACHE:  # A directory of TFDS may look like one of latents.
            raise InputError(f"{place}.name", part.name, f"{place}.directory={part.directory} "
                             f"holds {name}; leave the name out")


def overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A config with overrides applied, see `dmf.cli.overrides`.

    Raises:
      InputError: no such field, or a value that it cannot have.
    """
    from dmf.cli.overrides import apply

    return apply(config, overrides)


def overridden_stored(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The config of a checkpoint, checked, with overrides applied.

    Raises:
      InputError: no such field, or a value that it cannot have.
    """
    from dmf.default_config import Config

    completed = complete(config)
    registry.build(Config, completed)
    return overridden(completed, overrides)
