"""All known namings: they recognise a published checkpoint, and convert it in both directions."""

import dataclasses
import importlib
import itertools
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from dmf.checkpoints.convert import tables
from dmf.checkpoints.convert.name_tables import (
    Naming,
    ParamSlice,
    Shape,
    Tensors,
    Unused,
    check_names,
    shapes_of,
    strip_wrappers,
    to_params,
    to_tensors,
)
from dmf.errors import InputError, brief
from dmf.models.abstract_params import abstract_params
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.types import Params

_TABLES = sorted(module.name for module in pkgutil.iter_modules(tables.__path__))
NAMINGS: tuple[Naming, ...] = tuple(itertools.chain.from_iterable(
    importlib.import_module(f"{tables.__name__}.{name}").NAMINGS for name in _TABLES
))
_LISTED = ", ".join(naming.name for naming in NAMINGS)
# For each network, the names of tensors that tell it.
IDENTIFYING_TENSORS = tuple(naming.identifying_tensors for naming in NAMINGS)


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted checkpoint.

    Attributes:
      network: the network that the checkpoint is of.
      params: parameters of the network, float32.
      naming: the naming of the checkpoint.
      unused: names of tensors of the checkpoint that the network has no use for.
      scaling: the scaling of the latents that `config.json` states, or that networks of this naming
        are trained with; None where neither is.
    """

    network: Any
    params: Params
    naming: Naming
    unused: tuple[str, ...]
    scaling: LatentScaling | None


def detect_naming(tensors: Tensors, name: str = "") -> Naming:
    """The naming of a checkpoint, by the names and the shapes of its tensors.

    Args:
      tensors: tensors by name, without the prefixes of wrapping modules.
      name: name of the naming; empty to detect it.

    Raises:
      InputError: there is no such naming, or the checkpoint has none of the known ones.
    """
    if name:
        return _check_naming(tensors, name)
    shapes = shapes_of(tensors)
    matching = [naming for naming in NAMINGS
                if shapes.keys() >= set(naming.identifying_tensors)
                and naming.matches_shapes(shapes)]
    for naming in matching:
        # Another network may have it as a part: an autoencoder, whose encoder is one by itself.
        told = set(naming.identifying_tensors)
        if not any(told < set(other.identifying_tensors) for other in matching):
            return naming
    for tensor, part in itertools.chain.from_iterable(n.incomplete.items() for n in NAMINGS):
        if tensor in shapes:
            raise InputError("", remedy=f"it holds {part}")
    some = ", ".join(repr(name) for name in sorted(tensors)[:3]) or "none at all"
    raise InputError("", remedy=f"its tensors ({some}) belong to no known network; the known "
                     f"namings are {_LISTED}")


def _check_naming(tensors: Tensors, name: str) -> Naming:
    """The naming of a name, whose tensors the checkpoint must have."""
    by_name = {naming.name: naming for naming in NAMINGS}
    if name not in by_name:
        raise InputError("naming", name, f"choose one of {_LISTED}")
    for tensor in by_name[name].identifying_tensors:
        if tensor not in tensors:
            raise InputError("naming", name, f"the checkpoint has no tensor {tensor!r}")
    return by_name[name]


def from_named_tensors(
    tensors: Tensors, fields: Mapping[str, Any], *, naming: str = "",
    settings: Mapping[str, str] = MappingProxyType({}),
    neighbour: Mapping[str, Any] = MappingProxyType({}),
) -> Converted:
    """A published checkpoint as a network and its parameters.

    Args:
      tensors: tensors by name, in memory or in a file; each is read once.
      fields: fields of the network that the shapes do not tell, or that override them.
      naming: name of the naming; empty to detect it.
      settings: what the training file says of what the network predicts; see `predictions`.
      neighbour: what `config.json` beside the weights says.

    Raises:
      InputError: the checkpoint is of no known network, a tensor is missing, unknown or of another
        shape, or the network predicts something else.
    """
    tensors = strip_wrappers(tensors)
    detected = detect_naming(tensors, naming)
    dropped = {name for name in tensors if name.startswith(detected.training_only)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    stated = detected.read_config(neighbour)
    for field, value in fields.items():
        if stated.fields.get(field, value) != value:
            raise InputError(field, value, f"config.json says {stated.fields[field]}")
    network = _infer_network(detected, shapes_of(tensors), {**stated.fields, **fields})
    with _unfit_refused(detected):
        table = detected.table(network)
        check_names(table, tensors)  # before anything of the claimed size is made
        abstract = abstract_params(network)
    params = to_params(table, tensors, abstract)
    detected.check(tensors, settings, bool(naming))
    unused = {name for name, entry in table.items() if isinstance(entry, Unused)}
    unused = dropped | (unused & tensors.keys())
    return Converted(network, params, detected, tuple(sorted(unused)),
                     stated.scaling or detected.scaling(network))


def _infer_network(
    naming: Naming, shapes: Mapping[str, Shape], fields: Mapping[str, Any]
) -> Any:
    """The network of a checkpoint.

    Raises:
      InputError: the shapes are not those of such a network, or contradict the fields.
    """
    with _unfit_refused(naming):
        network = naming.infer_network(shapes, fields)
    for field, value in fields.items():
        if getattr(network, field, None) != value:
            raise InputError(
                field, value,
                f"{naming.name} has no such field, or its tensors say "
                f"{getattr(network, field, 'nothing of it')}",
            )
    return network


@contextmanager
def _unfit_refused(naming: Naming) -> Iterator[None]:
    """Turns errors about shapes and fields that fit no network into one line.

    Raises:
      InputError: they are not those of such a network.
    """
    try:
        yield
    except InputError:
        raise
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise InputError("", remedy=f"its tensors have the names of {naming.name}, but shapes or "
                         f"fields of no such network ({brief(error)})") from None


def naming_of(network: Any, name: str = "") -> Naming:
    """The naming that a network is written in.

    Args:
      network: a network.
      name: name of the naming; empty for the first one of the network.

    Raises:
      InputError: there is no such naming, or it is of another network.
    """
    known = {naming.name: naming for naming in NAMINGS if naming.network is type(network)}
    if not known:
        raise InputError(
            "format", "safetensors",
            f"no project has names for {type(network).__name__}; choose orbax or stablehlo",
        )
    if name and name not in known:
        raise InputError("naming", name, f"this network can be written as {', '.join(known)}")
    return known[name] if name else next(iter(known.values()))


def to_named_tensors(network: Any, params: Params, naming: Naming) -> dict[str, np.ndarray]:
    """Parameters under the names and in the layouts of another project.

    Raises:
      InputError: the naming has no name for a parameter.
    """
    table = naming.table(network)
    named = {entry.path for entry in table.values() if isinstance(entry, ParamSlice)}
    unnamed = named ^ flatten_dict(params, sep="/").keys()
    if unnamed:
        raise InputError("naming", naming.name, f"it has no name for {min(unnamed)} of this "
                         "network; choose --format=orbax or stablehlo")
    return to_tensors(table, params)
