"""What a run has in common with the checkpoint that it starts from: `config.init.checkpoint`.

The sizes of the network, the latents and the path must be those of the checkpoint. The command line
takes them from there where it does not give them, and `check_same` refuses what contradicts.
"""

from collections.abc import Collection, Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dmf import registry
from dmf.checkpoints import load
from dmf.checkpoints.params import CONFIG_FILE, latest_step
from dmf.data.build import Data
from dmf.errors import InputError

_LATENTS = tuple(f"latents.{name}" for name in ("scale", "shift", "mean", "std"))
_DATA = tuple(f"data.{name}" for name in ("name", "split", "directory", "classes", "mixture"))


def inherit(config: ConfigDict, given: Collection[str]) -> tuple[ConfigDict, list[str]]:
    """A config with what it must share with its initial checkpoint.

    From the workdir of a run, as opposed to an export, which may come from elsewhere, it also takes
    the dataset and the autoencoder, if it has none of its own.

    Args:
      config: all fields of `dmf.default_config.Config`; it is not changed.
      given: dotted names of the fields that keep their values.

    Returns:
      The config; and what it took, as "model.width=384".

    Raises:
      InputError: the config of the checkpoint cannot be read.
    """
    directory = config.init.checkpoint
    if not directory or not (epath.Path(directory) / CONFIG_FILE).exists():
        return config, []
    with registry.at("init"):
        tree, its = config.to_dict(), load.read_config(directory)
    taken = [field for field in _shared(its) if _value(tree, field) != _value(its, field)]
    if latest_step(directory) is not None:
        taken += _own(config, its)
    taken = [field for field in taken
             if not any(f"{name}.".startswith(f"{field}.") for name in given)]
    for field in taken:
        section, _, name = field.partition(".")
        tree[section][name] = _value(its, field)
    return ConfigDict(tree), [f"{field}={_value(its, field)}" for field in taken]


def check_same(config: ConfigDict) -> None:
    """Raises InputError where a config contradicts its initial checkpoint."""
    directory = config.init.checkpoint
    its = load.read_config(directory)
    for field in _shared(its):
        ours, theirs = _value(config, field), _value(its, field)
        if ours != theirs:
            raise InputError(field, ours, f"init.checkpoint={directory} has {theirs}; give the "
                             "same, or leave it out")
    if config.model.get("velocity_head") and its.model.get("velocity_head") is False:
        raise InputError("init.checkpoint", directory, "it has no velocity head, which this run "
                         "trains; give a checkpoint with one, such as a whole train state, or "
                         "leave it out")


def _shared(its: ConfigDict) -> Iterator[str]:
    """The fields that are the same in a run and in its initial checkpoint."""
    network = registry.lookup("model", its.model.name)
    sizes = getattr(network, "sizes", ())
    # A flow model without qk-norm may become a flow map with it, but not the reverse.
    names = ("name", *sizes, *(("qk_norm",) if its.model.get("qk_norm") else ()))
    fields = (*(f"model.{name}" for name in names), *_LATENTS, "objective.interpolant")
    return (field for field in fields if _value(its, field) is not None)


def _own(config: ConfigDict, its: ConfigDict) -> list[str]:
    """The fields of the dataset and of the autoencoder that a config leaves to its checkpoint."""
    default, taken = registry.default_config(Data), []
    if all(_value(config, field) == _plain(default[field.removeprefix("data.")])
           for field in _DATA):
        taken += [field for field in _DATA if _value(its, field) != _value(config, field)]
    elif config.data.name == its.data.get("name") and not config.data.directory:
        taken += ["data.directory"] if its.data.get("directory") else []
    if not config.latents.autoencoder and its.latents.get("autoencoder"):
        taken.append("latents.autoencoder")
    return taken


def _value(config: Any, field: str) -> Any:
    """The value of a field "section.name", None where there is no such field."""
    section, _, name = field.partition(".")
    return _plain(config[section].get(name))


def _plain(value: Any) -> Any:
    """A value as it is compared: lists as tuples, and a name for a component without fields."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, dict) and set(value) == {"name"}:
        return value["name"]
    return tuple(value) if isinstance(value, list) else value
