"""Name tables: the tensors of another project and their places in our parameter tree.

A table has one entry for every tensor name of the other project: the slice of our parameter tree
that the tensor fills (`ParamSlice`), a value that is known in advance (`Constant`), or nothing that
we use (`Unused`). The same table converts in both directions. A tensor that is missing or unknown
is an error that names it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dmf.checkpoints.convert.config_files import StatedNetwork
from dmf.errors import InputError
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.types import Params

Shape = tuple[int, ...]
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# Half precision is the coarsest that checkpoints come in.
_CONSTANT_TOLERANCE = 1e-2


@runtime_checkable
class Tensor(Protocol):
    """An array, or a tensor that is still in a file and is read by `numpy.asarray`."""

    @property
    def shape(self) -> Shape:
        """The shape of the tensor."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the tensor; bfloat16 is that of ml_dtypes."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """The values of the tensor."""


Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The memory layout of a tensor in the other project.

    Attributes:
      to_param: (tensor, shape of our parameter) -> our parameter.
      to_tensor: (our parameter, shape of the tensor) -> the tensor; the inverse of `to_param`.
    """

    to_param: Callable[[np.ndarray, Shape], np.ndarray]
    to_tensor: Callable[[np.ndarray, Shape], np.ndarray]


PLAIN = Layout(lambda w, shape: w.reshape(shape), lambda w, shape: w.reshape(shape))
# PyTorch's Linear is (out, in); ours is (in, out), with either side possibly split in axes.
TRANSPOSED = Layout(
    lambda w, shape: w.T.reshape(shape), lambda w, shape: w.reshape(shape[::-1]).T
)
# PyTorch's convolution is (out, in, row, column); ours is (row, column, in, out).
CONVOLUTION = Layout(
    lambda w, shape: w.transpose(2, 3, 1, 0).reshape(shape),
    lambda w, shape: w.reshape(shape[2:] + shape[1::-1]).transpose(3, 2, 0, 1),
)


@dataclasses.dataclass(frozen=True)
class ParamSlice:
    """The slice of our parameter tree that a tensor fills.

    Attributes:
      path: path of the parameter, for example "blocks/mlp/in/kernel".
      layout: layout of the tensor.
      shape: shape of the tensor in the other project.
      index: index into the leading axes of the parameter: which block, or which of query, key and
        value; with a slice for an axis between them.
    """

    path: str
    layout: Layout
    shape: Shape
    index: tuple[int | slice, ...] = ()


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tensor whose value the network computes by itself, for example a fixed position table.

    A checkpoint may lack it; one that has it must hold this value. It is written back.
    """

    value: np.ndarray


@dataclasses.dataclass(frozen=True)
class Unused:
    """A tensor that a checkpoint may have and that our network has no use for; it is dropped.

    Attributes:
      shape: shape of the zeros that are written in its place, where the other project wants the
        tensor to be there; None to write nothing.
    """

    shape: Shape | None = None


Entry = ParamSlice | Constant | Unused
Table = Mapping[str, Entry]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """One published way to name the tensors of a network.

    Attributes:
      name: name of the naming in messages and on the command line.
      network: the class of the network.
      identifying_tensors: names of tensors that every checkpoint of this naming has, and no
        checkpoint of another one.
      incomplete: what a checkpoint holds that has one of these tensors, and not the identifying
        ones: a part of the network, with the remedy.
      infer_network: (shapes of the tensors by name, without the prefixes of wrapping modules;
        fields of the network that the user gave, which override what the shapes say) -> the
        network.
      table: network -> its name table.
      matches_shapes: tells namings with the same names from each other by the shapes.
      check: (tensors, settings of the training file, whether the user named the naming) -> None;
        it raises InputError where the network is of another kind, or cannot be told from one.
      read_config: what `config.json` beside the weights says -> the fields that it states.
      scaling: network -> the scaling of the latents that published networks of this naming are
        trained with; None where it is that of the autoencoder, or there are no latents.
      notes: what a user should know of the conversion.
      training_only: starts of the names of tensors that only training uses; they are dropped.
    """

    name: str
    network: type
    identifying_tensors: tuple[str, ...]
    infer_network: Callable[[Mapping[str, Shape], Mapping[str, Any]], Any]
    table: Callable[[Any], Table]
    matches_shapes: Callable[[Mapping[str, Shape]], bool] = lambda shapes: True
    check: Callable[[Tensors, Mapping[str, str], bool], None] = lambda *arguments: None
    read_config: Callable[[Mapping[str, Any]], StatedNetwork] = lambda config: StatedNetwork({})
    scaling: Callable[[Any], LatentScaling | None] = lambda network: None
    notes: str = ""
    incomplete: Mapping[str, str] = dataclasses.field(default_factory=dict)
    training_only: tuple[str, ...] = ()


def with_given(
    told: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of a network: what its tensors tell, what is given, and else the defaults.

    >>> with_given({"depth": 2}, {"heads": 3}, {"heads": 1, "patch_size": 2})
    {'heads': 3, 'patch_size': 2, 'depth': 2}

    Args:
      told: fields that the shapes of the tensors tell.
      given: fields that the user gave, or the file states.
      defaults: fields that the shapes do not tell.

    Raises:
      InputError: a given field contradicts the tensors.
    """
    for field in given.keys() & told.keys():
        if given[field] != told[field]:
            raise InputError(field, str(given[field])[:40], f"its tensors say {told[field]}")
    return {**(defaults or {}), **given, **told}


def shapes_of(tensors: Tensors) -> dict[str, Shape]:
    """The shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def strip_wrappers(tensors: Tensors) -> Tensors:
    """The tensors under their names without the prefixes of wrapping modules.

    >>> sorted(strip_wrappers({"module._orig_mod.fc.bias": np.zeros(3)}))
    ['fc.bias']

    Raises:
      InputError: two tensors have the same name without the prefixes.
    """
    stripped = {}
    for name, tensor in tensors.items():
        bare = name
        while bare.startswith(_WRAPPER_PREFIXES):
            bare = bare.partition(".")[2]
        if bare in stripped:
            raise InputError("", remedy=f"tensor {name!r} is there twice, with and without the "
                             "prefix of a wrapping module")
        stripped[bare] = tensor
    return stripped


def to_params(table: Table, tensors: Tensors, abstract: Params) -> Params:
    """The tensors of another project as our parameter tree.

    Tensors are read one at a time, into the place where they belong.

    Args:
      table: one entry for every tensor; the shapes are checked.
      tensors: arrays by name.
      abstract: our tree of shapes, as `jax.eval_shape` returns it.

    Returns:
      A tree of float32 arrays of numpy.

    Raises:
      InputError: a tensor is missing, unknown, of another shape or not of floating point; the
        message names it.
    """
    check_names(table, tensors)
    slices = {name: entry for name, entry in table.items() if isinstance(entry, ParamSlice)}
    for name, entry in table.items():
        if name in tensors:
            _check_tensor(name, entry, tensors[name])
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract, sep="/").items()}
    params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    unfilled = {path: leaf.size for path, leaf in params.items()}
    for name, entry in slices.items():
        target = params[entry.path][entry.index]
        target[...] = entry.layout.to_param(np.asarray(tensors[name]), target.shape)
        unfilled[entry.path] -= target.size
    for path, count in unfilled.items():
        if count:
            raise InputError("", remedy=f"the name table leaves {count} values of {path!r} unset")
    return unflatten_dict(params, sep="/")


def check_names(table: Table, tensors: Tensors) -> None:
    """Raises InputError where a tensor is missing or unknown."""
    slices = {name for name, entry in table.items() if isinstance(entry, ParamSlice)}
    for problem, names in (
        ("is missing from the checkpoint", slices - tensors.keys()),
        ("is not a tensor of this network", tensors.keys() - table.keys()),
    ):
        if names:
            raise InputError("", remedy=f"tensor {min(names)!r} {problem} ({len(names)} such)")


def _check_tensor(name: str, entry: Entry, tensor: Tensor) -> None:
    """Raises InputError where a tensor is not what the table says."""
    if isinstance(entry, Unused):
        return
    expected = entry.value.shape if isinstance(entry, Constant) else entry.shape
    if tuple(tensor.shape) != expected:
        raise InputError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}",
            remedy=f"this network has {expected}",
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(
            f"tensor {name!r} has dtype {tensor.dtype}",
            remedy="this network has floating point numbers there",
        )
    if isinstance(entry, Constant):
        error = np.abs(np.asarray(tensor, np.float32) - entry.value).max(initial=0)
        if not error <= _CONSTANT_TOLERANCE:
            raise InputError("", remedy=f"tensor {name!r} is fixed in this network, and differs "
                             f"from it by up to {error:.3g}")


def to_tensors(table: Table, params: Params) -> dict[str, np.ndarray]:
    """Our parameter tree as the tensors of another project, by name; the inverse of `to_params`."""
    flat = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    tensors = {}
    for name, entry in table.items():
        if isinstance(entry, ParamSlice):
            param = flat[entry.path][entry.index]
            tensors[name] = np.ascontiguousarray(entry.layout.to_tensor(param, entry.shape))
        elif isinstance(entry, Constant):
            tensors[name] = entry.value
        elif entry.shape is not None:
            tensors[name] = np.zeros(entry.shape, np.float32)
    return tensors
