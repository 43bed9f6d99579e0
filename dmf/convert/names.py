"""A table of names, and its use in both directions.

A table maps the names of another project's tensors to paths in our tree, each with a layout.
What a table does not hold, or holds and does not find, is an error that names the tensor.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dmf.typing import InputError, Params

Shape = tuple[int, ...]


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
# PyTorch's convolution whose stride is its size: (out, in, row, column), where ours is a matrix
# from flattened (row, column, in).
PATCHES = Layout(
    lambda w, shape: w.transpose(2, 3, 1, 0).reshape(shape),
    lambda w, shape: w.reshape(shape[2], shape[3], shape[1], shape[0]).transpose(3, 2, 0, 1),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor goes: our path, its layout, its shape on their side, and which block it
    belongs to, whose index is the leading axis of ours."""

    path: str
    layout: Layout
    shape: Shape
    block: int | None = None


Table = Mapping[str, Entry]


def to_ours(table: Table, tensors: Mapping[str, np.ndarray], abstract: Params) -> Params:
    """The other project's tensors as our tree.

    Args:
      table: one entry for every tensor; its shapes are checked.
      tensors: arrays by name.
      abstract: our tree of shapes, as `jax.eval_shape` gives it.

    Raises:
      InputError: a tensor is missing, unknown or of another shape; the message names it.
    """
    for problem, names in (
        ("is missing from the checkpoint", table.keys() - tensors.keys()),
        ("is not a tensor of this network", tensors.keys() - table.keys()),
    ):
        if names:
            raise InputError(f"tensor {min(names)!r} {problem} ({len(names)} such)")
    ours = {}
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract, sep="/").items()}
    blocks: dict[str, dict[int, np.ndarray]] = {}
    for name, entry in table.items():
        tensor = np.asarray(tensors[name])
        if tensor.shape != entry.shape:
            raise InputError(
                f"tensor {name!r} has shape {tensor.shape}: this network has {entry.shape}"
            )
        if entry.block is None:
            ours[entry.path] = entry.layout.to_ours(tensor, shapes[entry.path])
        else:
            block = entry.layout.to_ours(tensor, shapes[entry.path][1:])
            blocks.setdefault(entry.path, {})[entry.block] = block
    for path, parts in blocks.items():
        ours[path] = np.stack([parts[i] for i in range(len(parts))])
    if ours.keys() != shapes.keys():
        raise InputError(f"the table gives no {min(shapes.keys() - ours.keys())!r}")
    return unflatten_dict(ours, sep="/")


def to_theirs(table: Table, params: Params) -> dict[str, np.ndarray]:
    """Our tree as the other project's tensors, by name; the inverse of `to_ours`."""
    flat = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    theirs = {}
    for name, entry in table.items():
        ours = flat[entry.path] if entry.block is None else flat[entry.path][entry.block]
        theirs[name] = np.ascontiguousarray(entry.layout.to_theirs(ours, entry.shape))
    return theirs
