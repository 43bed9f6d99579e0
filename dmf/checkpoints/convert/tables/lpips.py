"""Names of LPIPS: those of the authors' module, and those of its two published files, torchvision's
classifier and the heads of the release."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmf.checkpoints.convert.name_tables import (
    CONVOLUTION,
    PLAIN,
    Constant,
    Entry,
    Naming,
    ParamSlice,
    Shape,
    Table,
    Unused,
    with_given,
)
from dmf.errors import InputError
from dmf.models.encoders.lpips import LPIPS, SCALE, SHIFT, TRUNKS

HEAD = "lin{}.model.1.weight"
# The layers of torchvision's classifiers after their convolutions.
_CLASSIFIERS = {"vgg16": (0, 3, 6), "alexnet": (1, 4, 6)}


def _infer_network(
    first: str, shapes: Mapping[str, Shape], fields: Mapping[str, Any]
) -> LPIPS:
    """The network of a checkpoint, by the kernel of its first convolution.

    Raises:
      InputError: it is that of no known classifier, or a given field is unknown.
    """
    unknown = fields.keys() - {field.name for field in dataclasses.fields(LPIPS)}
    if unknown:
        raise InputError(min(unknown), remedy="LPIPS has no such field")
    for trunk, (stage, *_) in TRUNKS.items():
        layer = stage.convolutions[0]
        if shapes[first] == (layer.features, 3, layer.size, layer.size):
            return LPIPS(**with_given({"trunk": trunk}, fields))
    raise InputError(f"tensor {first!r} has shape {shapes[first]}",
                     remedy=f"it is that of none of {', '.join(TRUNKS)}")


def _table(layer: str, network: LPIPS) -> dict[str, Entry]:
    """The entries of convolutions and heads.

    Args:
      layer: names of the convolutions, with the number of the stage and of the layer to fill in.
      network: the network.
    """
    table: dict[str, Entry] = {}
    inputs = 3
    for i, stage in enumerate(TRUNKS[network.trunk]):
        for c in stage.convolutions:
            name, path = layer.format(i + 1, c.number), f"convolution_{c.number}"
            shape = (c.features, inputs, c.size, c.size)
            table[f"{name}.weight"] = ParamSlice(f"{path}/kernel", CONVOLUTION, shape)
            table[f"{name}.bias"] = ParamSlice(f"{path}/bias", PLAIN, (c.features,))
            inputs = c.features
        table[HEAD.format(i)] = ParamSlice(f"head_{i}", PLAIN, (1, inputs, 1, 1))
    return table


def _module_table(network: LPIPS) -> Table:
    """The name table of the authors' module, which lists its heads twice."""
    scaling = {f"scaling_layer.{name}": Constant(np.array(value, "f").reshape(1, 3, 1, 1))
               for name, value in (("shift", SHIFT), ("scale", SCALE))}
    again = {f"lins.{i}.model.1.weight": Unused() for i in range(len(TRUNKS[network.trunk]))}
    return _table("net.slice{}.{}", network) | scaling | again


def _files_table(network: LPIPS) -> Table:
    """The name table of the tensors of the two published files."""
    unused = {f"classifier.{number}.{part}": Unused()
              for number in _CLASSIFIERS[network.trunk] for part in ("weight", "bias")}
    return _table("features.{1}", network) | unused


_WITHOUT_HEADS = ("the convolutions of VGG16 or AlexNet without the heads of LPIPS; give these "
                  "as a second source")
NAMINGS = (
    Naming(
        name="lpips",
        network=LPIPS,
        identifying_tensors=("net.slice1.0.weight", HEAD.format(0)),
        infer_network=functools.partial(_infer_network, "net.slice1.0.weight"),
        table=_module_table,
    ),
    Naming(
        name="lpips-files",
        network=LPIPS,
        identifying_tensors=("features.0.weight", HEAD.format(0)),
        infer_network=functools.partial(_infer_network, "features.0.weight"),
        table=_files_table,
        incomplete={
            "features.10.weight": _WITHOUT_HEADS,
            HEAD.format(0): "the heads of LPIPS alone; give torchvision's VGG16 or AlexNet, and "
                            "these as a second source",
        },
    ),
)
