"""A table of names, and its use in both directions.

A table maps the names of another project's tensors to paths in our tree, each with a layout.
What a table does not hold, or holds and does not find, is an error that names the tensor. A
spelling is all that is known of one published way to name the tensors of a network.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dmf.typing import InputError, Params

Shape = tuple[int, ...]
_WRAPPERS = ("module.", "_orig_mod.")


@runtime_checkable
class Tensor(Protocol):
    """An array, or one that is still in a file and read by `numpy.asarray`."""

    @property
    def shape(self) -> Shape:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """Its type; bfloat16 is that of ml_dtypes."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """Its values."""


Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor lies in the other project: to our shape, and back to theirs."""

    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_theirs: Callable[[np.ndarray, Shape], np.ndarray]


PLAIN = Layout(lambda w, shape: w.reshape(shape), lambda w, shape: w.reshape(shape))
# PyTorch's Linear: (out, in), where ours is (in, out) with either side possibly split in axes.
TRANSPOSED = Layout(
    lambda w, shape: w.T.reshape(shape), lambda w, shape: w.reshape(shape[::-1]).T
)
# PyTorch's convolution: (out, in, row, column), where ours is (row, column, in, out).
CONVOLUTION = Layout(
    lambda w, shape: w.transpose(2, 3, 1, 0).reshape(shape),
    lambda w, shape: w.reshape(shape[2:] + shape[1::-1]).transpose(3, 2, 0, 1),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor goes: our path, its layout, its shape on their side, and the index into the
    leading axes of ours (which block, or which of query, key and value) that it fills."""

    path: str
    layout: Layout
    shape: Shape
    index: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Unkept:
    """A tensor that may be there and that we do without. One that we know (`value`) must hold it,
    and is written back; another is dropped."""

    value: np.ndarray | None = None


Table = Mapping[str, Entry | Unkept]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spelling:
    """One published way to name the tensors of a network.

    Attributes:
      name: what it is called in messages and on the command line.
      marks: names that every checkpoint of this spelling has, and only those do.
      read: the network, from the shapes of the tensors (wrappers' prefixes gone) and the fields
        of the network that were given, which win over what the shapes say.
      table: the table of a network.
      suits: of spellings with the same names, tells by the shapes which it is.
      notes: what a user should know of it.
    """

    name: str
    marks: tuple[str, ...]
    read: Callable[[Mapping[str, Shape], Mapping[str, Any]], Any]
    table: Callable[[Any], Table]
    suits: Callable[[Mapping[str, Shape]], bool] = lambda shapes: True
    notes: str = ""


def unwrapped(tensors: Tensors) -> Tensors:
    """The tensors by their names without the prefixes of wrapping modules.

    Raises:
      InputError: two tensors have the same name then.
    """
    kept = {}
    for name, tensor in tensors.items():
        bare = name
        while bare.startswith(_WRAPPERS):
            bare = bare.partition(".")[2]
        if bare in kept:
            raise InputError(f"tensor {name!r} is there twice, with and without the prefix of a "
                             "wrapping module")
        kept[bare] = tensor
    return kept


def to_ours(table: Table, tensors: Tensors, abstract: Params) -> Params:
    """The other project's tensors as our tree of float32 arrays.

    Tensors are read one at a time, into the place where they belong.

    Args:
      table: one entry for every tensor; its shapes are checked.
      tensors: arrays by name.
      abstract: our tree of shapes, as `jax.eval_shape` gives it.

    Raises:
      InputError: a tensor is missing, unknown, of another shape or not of floating point; the
        message names it.
    """
    wanted = {name: entry for name, entry in table.items() if isinstance(entry, Entry)}
    for problem, names in (
        ("is missing from the checkpoint", wanted.keys() - tensors.keys()),
        ("is not a tensor of this network", tensors.keys() - table.keys()),
    ):
        if names:
            raise InputError(f"tensor {min(names)!r} {problem} ({len(names)} such)")
    for name, entry in table.items():
        if name in tensors:
            _check(name, entry, tensors[name])
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract, sep="/").items()}
    ours = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    left = {path: leaf.size for path, leaf in ours.items()}
    for name, entry in wanted.items():
        place = ours[entry.path][entry.index]
        place[...] = entry.layout.to_ours(np.asarray(tensors[name]), place.shape)
        left[entry.path] -= place.size
    for path, count in left.items():
        if count:
            raise InputError(f"the table leaves {count} values of {path!r} open")
    return unflatten_dict(ours, sep="/")


def _check(name: str, entry: Entry | Unkept, tensor: Tensor) -> None:
    """Raises InputError where a tensor is not what the table says."""
    known = entry.value if isinstance(entry, Unkept) else entry
    if known is None:
        return
    if tuple(tensor.shape) != known.shape:
        raise InputError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}: this network has {known.shape}"
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"tensor {name!r} has dtype {tensor.dtype}: this network has floating "
                         "point numbers there")
    if isinstance(entry, Unkept):
        # Half precision is the coarsest that checkpoints come in.
        worst = np.abs(np.asarray(tensor, np.float32) - known).max(initial=0)
        if not worst <= 1e-2:
            raise InputError(f"tensor {name!r} is fixed in this network, and differs from it by "
                             f"up to {worst:.3g}")


def to_theirs(table: Table, params: Params) -> dict[str, np.ndarray]:
    """Our tree as the other project's tensors, by name; the inverse of `to_ours`."""
    flat = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    theirs = {}
    for name, entry in table.items():
        if isinstance(entry, Entry):
            ours = flat[entry.path][entry.index]
            theirs[name] = np.ascontiguousarray(entry.layout.to_theirs(ours, entry.shape))
        elif entry.value is not None:
            theirs[name] = entry.value
    return theirs
