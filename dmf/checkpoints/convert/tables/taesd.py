"""Names of TAESD, those of `AutoencoderTiny` in diffusers: encoder and decoder in one checkpoint.

Their layers are numbered from the first on; layers without parameters count too.
"""

import bisect
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dmf.checkpoints.convert import config_files
from dmf.checkpoints.convert.config_files import StatedNetwork
from dmf.checkpoints.convert.name_tables import (
    CONVOLUTION,
    PLAIN,
    Naming,
    ParamSlice,
    Shape,
    Table,
    with_given,
)
from dmf.errors import InputError
from dmf.models.encoders.taesd import TAESD

_WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels", "block_out_channels")
_RENAMED = {
    "in_channels": "channels", "out_channels": "channels", "latent_channels": "latent_channels",
    "num_encoder_blocks": "encoder_blocks", "num_decoder_blocks": "decoder_blocks",
    **dict.fromkeys(_WIDTHS, "width"),
}  # fmt: skip
_FIXED = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
# They serve diffusers to store latents in 8 bits.
_WITHOUT_EFFECT = ("latent_magnitude", "latent_shift")


def read_config(config: Mapping[str, Any]) -> StatedNetwork:
    """The fields and the scaling of an AutoencoderTiny that diffusers wrote.

    >>> read_config({"encoder_block_out_channels": [8, 8], "num_encoder_blocks": [1, 3]}).fields
    {'width': 8, 'encoder_blocks': (1, 3)}

    Args:
      config: its `config.json`; empty where there is none.

    Raises:
      InputError: it is of another class, or has a field or value that no TAESD here has.
    """
    config = dict(config)
    for name in _WIDTHS:
        widths = config.get(name)
        if isinstance(widths, list) and widths:
            if widths != widths[:1] * len(widths):
                raise InputError(f"config.json: {name}", str(widths)[:80],
                                 "only one width of all levels is known")
            config[name] = widths[0]
    return config_files.diffusers_network(
        config, "AutoencoderTiny", TAESD, _RENAMED, _FIXED, _WITHOUT_EFFECT)


def infer_network(shapes: Mapping[str, Shape], fields: Mapping[str, Any]) -> TAESD:
    """The network of a checkpoint; see `Naming.infer_network`."""
    first, last = (_kernels(shapes, part) for part in ("encoder", "decoder"))
    told = {
        "channels": shapes[first[0]][1],
        "latent_channels": shapes[last[0]][1],
        "width": shapes[first[0]][0],
        "encoder_blocks": _blocks(shapes, "encoder"),
        "decoder_blocks": _blocks(shapes, "decoder"),
    }
    return TAESD(**with_given(told, fields))


def _places(shapes: Mapping[str, Shape], part: str, layer: str) -> list[int]:
    """The numbers of the layers of a part that have such a tensor."""
    matches = (re.fullmatch(rf"{part}\.layers\.(\d{{1,9}})\.{layer}", name) for name in shapes)
    return sorted(int(match[1]) for match in matches if match)


def _kernels(shapes: Mapping[str, Shape], part: str) -> list[str]:
    """The kernels of the convolutions of a part outside of its blocks."""
    return [f"{part}.layers.{place}.weight" for place in _places(shapes, part, "weight")]


def _blocks(shapes: Mapping[str, Shape], part: str) -> tuple[int, ...]:
    """The number of blocks between each two of these convolutions."""
    edges = _places(shapes, part, "weight")
    blocks = _places(shapes, part, r"conv\.0\.weight")
    before = [bisect.bisect(blocks, edge) for edge in edges]
    return tuple(end - start for start, end in itertools.pairwise(before))


def table(network: TAESD) -> Table:
    """The name table of a network."""
    encoder = ["in"]
    for i, blocks in enumerate(network.encoder_blocks):
        encoder += [f"level_{i}_resize"] * bool(i) + _named(i, blocks)
    decoder, last = ["in", ""], len(network.decoder_blocks) - 1
    for i, blocks in enumerate(network.decoder_blocks):
        decoder += _named(i, blocks) + ["", f"level_{i}_resize"] * (i != last)
    return (_part("encoder", [*encoder, "out"], network, network.channels, network.latent_channels)
            | _part("decoder", [*decoder, "out"], network, network.latent_channels,
                    network.channels))


def _named(level: int, blocks: int) -> list[str]:
    return [f"level_{level}_block_{j}" for j in range(blocks)]


def _part(
    part: str, layers: Sequence[str], network: TAESD, inputs: int, outputs: int
) -> Table:
    """The name table of the encoder or the decoder.

    Args:
      part: "encoder" or "decoder".
      layers: names of its layers in our tree, in their order; empty for one without parameters.
      network: the network.
      inputs: channels of the first layer.
      outputs: channels of the last layer.
    """
    table: dict[str, ParamSlice] = {}
    for place, layer in enumerate(layers):
        name, path, width = f"{part}.layers.{place}", f"{part}/{layer}", network.width
        if layer == "in":
            table |= _convolution(name, path, inputs, width)
        elif layer == "out":
            table |= _convolution(name, path, width, outputs)
        elif layer.endswith("resize"):
            table |= _convolution(name, path, width, width, bias=False)
        elif layer:
            for i in range(3):
                table |= _convolution(f"{name}.conv.{2 * i}", f"{path}/convolution_{i}", width,
                                      width)
    return table


def _convolution(
    name: str, path: str, inputs: int, outputs: int, *, bias: bool = True
) -> dict[str, ParamSlice]:
    table = {f"{name}.weight": ParamSlice(f"{path}/kernel", CONVOLUTION, (outputs, inputs, 3, 3))}
    if bias:
        table[f"{name}.bias"] = ParamSlice(f"{path}/bias", PLAIN, (outputs,))
    return table


_ALONE = "the {} of an autoencoder (TAESD) without its {}; give both in one file, as diffusers does"
NAMINGS = (
    Naming(
        name="diffusers-tiny",
        network=TAESD,
        identifying_tensors=("encoder.layers.0.weight", "decoder.layers.0.weight"),
        infer_network=infer_network,
        table=table,
        read_config=read_config,
        # The files of the first release have one part each, without the prefix of the part.
        incomplete={
            "encoder.layers.0.weight": _ALONE.format("encoder", "decoder"),
            "decoder.layers.0.weight": _ALONE.format("decoder", "encoder"),
            "1.conv.0.weight": _ALONE.format("encoder", "decoder"),
            "3.conv.0.weight": _ALONE.format("decoder", "encoder"),
        },
    ),
)
