"""What a run has in common with the checkpoint that it starts from: `config.init.checkpoint`.

The sizes of the network, the latents and the path must be those of the checkpoint. The command line
takes them from there where it does not give them, and `check_same` refuses what contradicts. The
number of classes may differ: the label embedding is then initialised anew, and a line says so.
"""

from collections.abc import Collection, Iterator
from typing import Any

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmf import registry
from dmf.checkpoints import load
from dmf.checkpoints.located import local_directory
from dmf.checkpoints.params import CONFIG_FILE, is_within, latest_step
from dmf.data.build import Data
from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.build import sizes_of_dataset
from dmf.models.simple_network import SimpleNetwork
from dmf.runtime.processes import log
from dmf.training.settings import InitialCheckpoint
from dmf.types import Network, Params

_CLASSES = "model.num_classes"
_LATENTS = tuple(f"latents.{name}" for name in ("scale", "shift", "mean", "std"))
_DATA = tuple(f"data.{name}" for name in
              ("name", "split", "directory", "classes", "mixture", "class_names"))


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
      InputError: the config of the checkpoint cannot be read, or the config takes sizes from it and
        it is not there.
    """
    directory, undecided = config.init.checkpoint, _undecided(config)
    with registry.at("init"):
        is_there = directory and (local_directory(directory) / CONFIG_FILE).exists()
        if not is_there and not (directory and undecided):
            return config, []
        tree, its = config.to_dict(), load.read_config(directory)
    taken = [field for field in _shared(its) if _value(tree, field) != _value(its, field)]
    if latest_step(directory) is not None:
        taken += _own(config, its)
    kept = set(given) - undecided
    taken = [field for field in taken
             if not any(f"{name}.".startswith(f"{field}.") for name in kept)]
    if _CLASSES in undecided and not _is_same_data(config, its, taken):
        taken = [field for field in taken if field != _CLASSES]  # It is that of the dataset.
    for field in taken:
        section, _, name = field.partition(".")
        tree[section][name] = _value(its, field)
    return ConfigDict(tree), [f"{field}={_value(its, field)}" for field in taken]


def _undecided(config: ConfigDict) -> set[str]:
    """The fields whose values stand for those of the dataset."""
    sizes = {f"model.{name}" for name in sizes_of_dataset(config.model)}
    return sizes | ({"data.name"} if not config.data.name else set())


def _is_same_data(config: ConfigDict, its: ConfigDict, taken: Collection[str]) -> bool:
    """Whether a config that takes these fields has the dataset of its checkpoint."""
    return all(field in taken or _value(config, field) == _value(its, field) for field in _DATA)


def pretrained(config: ConfigDict, student: Network, mesh: Mesh) -> Params:
    """The parameters of `config.init.checkpoint`; {} without a checkpoint.

    What a flow model lacks (a log-variance head, a second time embedding, the scales of qk-norm) is
    initialised later, as are the parameters of the labels if the checkpoint has another number of
    classes; a line says which. What only its training used is dropped.

    Args:
      config: all fields of `dmf.default_config.Config`.
      student: the network that is trained.
      mesh: the mesh to shard the parameters over.

    Raises:
      InputError: there is no such checkpoint, or it contradicts the config.
      RunError: the checkpoint is damaged.
    """
    with registry.at("init"):
        chosen = registry.build(InitialCheckpoint, config.init)
    if not chosen.checkpoint:
        return {}
    with registry.at("init"):
        its = load.read_config(chosen.checkpoint)
    check_same(config)
    is_same = _value(its, _CLASSES) == _value(config, _CLASSES)
    anew = () if is_same else _label_parameters(student)
    added = getattr(student, "added_by_training", SimpleNetwork.added_by_training)
    with registry.at("init"):
        params = load.load_params(
            student, chosen.checkpoint, chosen.ema, mesh=mesh, allow_missing=added, left_out=anew
        )
    _report_labels(config, its, anew)
    _report_missing(config, student, params, [folder for folder in added if folder not in anew])
    return params


def _label_parameters(network: Any) -> tuple[str, ...]:
    """The parameters of the labels of a network, or of a class of networks."""
    return getattr(network, "label_parameters", ())


def _report_labels(config: ConfigDict, its: ConfigDict, anew: Collection[str]) -> None:
    """Says what becomes of the parameters of the labels where a run has other classes than its
    initial checkpoint."""
    place = f"init.checkpoint={config.init.checkpoint}"
    ours, theirs = (_value(c, "data.class_names") for c in (config, its))
    if anew:
        log(f"{place} has {its.model.num_classes} classes, and this run {config.model.num_classes}:"
            f" {', '.join(anew)} is initialised anew")
    elif ours and theirs and ours != theirs:
        log(f"{place} has as many classes of other names, whose embeddings these classes start "
            "from")


def _report_missing(
    config: ConfigDict, student: Network, params: Params, added: Collection[str]
) -> None:
    """Says which parameters the initial checkpoint lacks."""
    held, needed = (flatten_dict(tree, sep="/") for tree in (params, abstract_params(student)))
    missing = [folder for folder in added
               if any(is_within(name, (folder,)) for name in needed.keys() - held.keys())]
    if missing:
        log(f"init.checkpoint={config.init.checkpoint} has no {', '.join(missing)}: initialised "
            "anew")


def check_same(config: ConfigDict) -> None:
    """Raises InputError where a config contradicts its initial checkpoint.

    Networks with `label_parameters` may have another number of classes.
    """
    directory = config.init.checkpoint
    its = load.read_config(directory)
    may_differ = (_CLASSES,) if _label_parameters(registry.lookup("model", its.model.name)) else ()
    for field in _shared(its):
        ours, theirs = _value(config, field), _value(its, field)
        if ours != theirs and field not in may_differ:
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
    default, taken, undecided = registry.default_config(Data), [], _undecided(config)
    if all(field in undecided or _value(config, field) == _plain(default[field[len("data."):]])
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
