"""Published checkpoints as our networks: recognised by their names, read by their shapes."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dmf.convert import autoencoder, dinov2, dit, inception
from dmf.convert.names import Spelling, Tensors, Unkept, to_ours, to_theirs, unwrapped
from dmf.encoders.autoencoder import Autoencoder
from dmf.encoders.dinov2 import DinoV2
from dmf.encoders.inception import Inception
from dmf.models.dit import DiT
from dmf.typing import InputError, Params

SPELLINGS_OF = {
    DiT: dit.SPELLINGS,
    Autoencoder: autoencoder.SPELLINGS,
    Inception: inception.SPELLINGS,
    DinoV2: dinov2.SPELLINGS,
}
SPELLINGS = tuple(itertools.chain.from_iterable(SPELLINGS_OF.values()))


@dataclasses.dataclass(frozen=True)
class Converted:
    """A checkpoint in our form.

    Attributes:
      network: its architecture.
      params: its parameters, float32.
      spelling: the names it had.
      dropped: tensors that it had and that the network does without.
    """

    network: Any
    params: Params
    spelling: Spelling
    dropped: tuple[str, ...]


def recognise(tensors: Tensors, name: str = "") -> Spelling:
    """The spelling of a checkpoint, by what its tensors are called and how large they are.

    Args:
      tensors: without the prefixes of wrapping modules.
      name: the spelling's name, if it need not be found out.

    Raises:
      InputError: no such spelling, or a checkpoint that has none of the known ones.
    """
    if name:
        named = [spelling for spelling in SPELLINGS if spelling.name == name]
        if not named:
            raise InputError(f"spelling={name}: choose one of "
                             f"{', '.join(spelling.name for spelling in SPELLINGS)}")
        missing = [mark for mark in named[0].marks if mark not in tensors]
        if missing:
            raise InputError(f"spelling={name}: the checkpoint has no tensor {missing[0]!r}")
        return named[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for spelling in SPELLINGS:
        if all(mark in shapes for mark in spelling.marks) and spelling.suits(shapes):
            return spelling
    some = ", ".join(repr(name) for name in sorted(tensors)[:3]) or "none at all"
    raise InputError(f"its tensors ({some}) are those of no network that is known: "
                     f"{', '.join(spelling.name for spelling in SPELLINGS)}")


def convert(tensors: Tensors, given: Mapping[str, Any], *, spelling: str = "") -> Converted:
    """A published checkpoint as parameters of a network.

    Args:
      tensors: by name, in memory or in a file; each is read once.
      given: fields of the network that its shapes do not tell, or that are to be others.
      spelling: the name of the spelling; found out if empty.

    Raises:
      InputError: of no known network, or a tensor is missing, unknown or of another shape.
    """
    tensors = unwrapped(tensors)
    found = recognise(tensors, spelling)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        network = found.read(shapes, given)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"its tensors look like {found.name}, but the shapes are not those of "
                         f"such a network ({error})") from None
    for field, value in given.items():
        if getattr(network, field, None) != value:
            raise InputError(f"{field}={value}: {found.name} has no such field, or its tensors "
                             f"say {getattr(network, field, 'nothing of it')}")
    table = found.table(network)
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    params = to_ours(table, tensors, abstract)
    unused = {name for name, e in table.items() if isinstance(e, Unkept) and e.value is None}
    return Converted(network, params, found, tuple(sorted(unused & tensors.keys())))


def spelling_of(network: Any, name: str = "") -> Spelling:
    """A spelling that a network can be written in, the first one by default.

    Raises:
      InputError: no such spelling, or of another network.
    """
    known = {spelling.name: spelling for spelling in SPELLINGS_OF.get(type(network), ())}
    if not known:
        raise InputError(f"format=safetensors: no project has names for {type(network).__name__}; "
                         "choose orbax or stablehlo")
    if name and name not in known:
        raise InputError(f"spelling={name}: this network can be written as {', '.join(known)}")
    return known[name] if name else next(iter(known.values()))


def spelled(network: Any, params: Params, spelling: Spelling) -> dict[str, np.ndarray]:
    """The parameters under the names of another project, as it lays them out."""
    return to_theirs(spelling.table(network), params)
