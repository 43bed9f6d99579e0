"""Names of the published weights of the Inception-v3 that measures FID, in PyTorch's layout."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from dmf.checkpoints.convert.name_tables import (
    CONVOLUTION,
    PLAIN,
    TRANSPOSED,
    Entry,
    Layout,
    Naming,
    ParamSlice,
    Shape,
    Table,
    Unused,
    with_given,
)
from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.encoders.inception import Inception

# The end of a tensor name and the layout, by the end of the path in our tree.
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
    """The name table, which follows our tree: Mixed_5b/branch1x1/norm/var has the name
    Mixed_5b.branch1x1.bn.running_var."""
    shapes = flatten_dict(abstract_params(network))
    rows, columns = shapes.pop(("output", "kernel")).shape
    table: dict[str, Entry] = {
        OUTPUT: ParamSlice("output/kernel", TRANSPOSED, (columns, rows)),
        "fc.bias": ParamSlice("output_bias", PLAIN, shapes.pop(("output_bias",)).shape),
    }
    for path, leaf in shapes.items():
        part, layout = PARTS["/".join(path[-2:])]
        unit = ".".join(path[:-2])
        shape = leaf.shape if layout is PLAIN else tuple(leaf.shape[axis] for axis in (3, 2, 0, 1))
        table[f"{unit}.{part}"] = ParamSlice("/".join(path), layout, shape)
        # A count of training steps.
        table[f"{unit}.bn.num_batches_tracked"] = Unused()
    return table


def _infer_network(shapes: Mapping[str, Shape], fields: Mapping[str, Any]) -> Inception:
    """The network of a checkpoint; see `Naming.infer_network`.

    Checkpoints differ in the number of outputs alone.

    Raises:
      InputError: the number of outputs is not that of the published network and was not given, or a
        given field is unknown.
    """
    unknown = fields.keys() - {field.name for field in dataclasses.fields(Inception)}
    if unknown:
        raise InputError(min(unknown), remedy="Inception has no such field")
    rows = shapes[OUTPUT][0] if shapes.get(OUTPUT) else Inception.num_outputs
    if rows != Inception.num_outputs and "num_outputs" not in fields:
        raise InputError(
            f"tensor {OUTPUT!r} has {rows} rows",
            remedy="FID is measured with the Inception-v3 of 2015-12-05, which has "
                   f"{Inception.num_outputs}; give that one, or num_outputs={rows}",
        )
    return Inception(**with_given({"num_outputs": rows}, fields))


NAMINGS = (
    Naming(
        name="fid-inception",
        network=Inception,
        identifying_tensors=(
            "Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight", OUTPUT,
        ),
        infer_network=_infer_network,
        table=_table,
    ),
)
