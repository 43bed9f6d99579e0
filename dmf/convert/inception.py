"""Names of the published weights of the Inception-v3 that measures FID, in PyTorch's layout."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from dmf.convert.names import (
    CONVOLUTION,
    PLAIN,
    TRANSPOSED,
    Entry,
    Layout,
    Shape,
    Spelling,
    Table,
    Unkept,
)
from dmf.encoders.inception import Inception
from dmf.typing import InputError

# What follows the name of a convolution, by what follows its path in our tree.
PARTS: dict[str, tuple[str, Layout]] = {
    "convolution/kernel": ("conv.weight", CONVOLUTION),
    "norm/scale": ("bn.weight", PLAIN),
    "norm/bias": ("bn.bias", PLAIN),
    "norm/mean": ("bn.running_mean", PLAIN),
    "norm/var": ("bn.running_var", PLAIN),
}
OUTPUT = "fc.weight"


@functools.cache
def _table(network: Inception) -> Table:
    """Names follow the tree: Mixed_5b/branch1x1/norm/var is Mixed_5b.branch1x1.bn.running_var."""
    shapes = flatten_dict(jax.eval_shape(network.init, jax.random.key(0)))
    rows, columns = shapes.pop(("output", "kernel")).shape
    table: dict[str, Entry | Unkept] = {
        OUTPUT: Entry("output/kernel", TRANSPOSED, (columns, rows)),
        "fc.bias": Entry("output_bias", PLAIN, shapes.pop(("output_bias",)).shape),
    }
    for path, leaf in shapes.items():
        part, layout = PARTS["/".join(path[-2:])]
        unit = ".".join(path[:-2])
        shape = leaf.shape if layout is PLAIN else tuple(leaf.shape[axis] for axis in (3, 2, 0, 1))
        table[f"{unit}.{part}"] = Entry("/".join(path), layout, shape)
        # A count of training steps.
        table[f"{unit}.bn.num_batches_tracked"] = Unkept()
    return table


def _read(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> Inception:
    """The number of outputs is all that a checkpoint can differ in.

    Raises:
      InputError: it is not that of the published network, and not given; or a field is unknown.
    """
    unknown = given.keys() - {field.name for field in dataclasses.fields(Inception)}
    if unknown:
        raise InputError(f"{min(unknown)}: Inception has no such field")
    rows = shapes[OUTPUT][0] if shapes.get(OUTPUT) else Inception.num_outputs
    if rows != Inception.num_outputs and "num_outputs" not in given:
        raise InputError(
            f"tensor {OUTPUT!r} has {rows} rows: FID is measured with the Inception-v3 of "
            f"2015-12-05, which has {Inception.num_outputs}; give that one, or num_outputs={rows}"
        )
    return Inception(**{"num_outputs": rows} | dict(given))


SPELLINGS = (
    Spelling(
        name="fid-inception",
        marks=("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight", OUTPUT),
        read=_read,
        table=_table,
    ),
)
