"""Names of the published autoencoders of Stable Diffusion: those of diffusers' `AutoencoderKL`.

Its attention was renamed once, and checkpoints come with both names.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from dmf.convert.names import (
    CONVOLUTION,
    PLAIN,
    TRANSPOSED,
    Entry,
    Layout,
    Shape,
    Spelling,
    Table,
)
from dmf.encoders.autoencoder import Autoencoder
from dmf.typing import InputError

# Their names of query, key, value and out.
_ATTENTIONS = {
    "diffusers": ("to_q", "to_k", "to_v", "to_out.0"),
    "diffusers-old": ("query", "key", "value", "proj_attn"),
}


def read(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> Autoencoder:
    """The network of a checkpoint; see `Spelling.read`.

    The groups of its normalisations leave no trace in the shapes: the published 32 where they are
    not given.

    Raises:
      InputError: a tensor that tells a field is missing or of another rank, or no network has
        these fields.
    """
    places = [re.match(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", name) for name in shapes]
    levels, layers = ({place[i] for place in places if place} for i in (1, 2))
    first = (f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(len(levels)))
    found = {
        "channels": _kernel(shapes, "encoder.conv_in.weight")[1],
        "latent_channels": _kernel(shapes, "decoder.conv_in.weight")[1],
        "widths": tuple(_kernel(shapes, name)[0] for name in first),
        "layers_per_block": len(layers),
    }
    return Autoencoder(**found | dict(given))


def _kernel(shapes: Mapping[str, Shape], name: str) -> Shape:
    """(out, in, row, column) of a convolution."""
    if name not in shapes:
        raise InputError(f"tensor {name!r} is missing from the checkpoint")
    if len(shapes[name]) != 4:
        raise InputError(f"tensor {name!r} has shape {shapes[name]}: a convolution has four axes")
    return shapes[name]


def _autoencoder(network: Autoencoder, attention: tuple[str, ...]) -> Table:
    """The table of a network whose attention is named so."""
    return _encoder(network, attention) | _decoder(network, attention)


def _encoder(network: Autoencoder, attention: tuple[str, ...]) -> Table:
    widths, outputs = network.widths, 2 * network.latent_channels
    table = _convolution("encoder.conv_in", "encoder/in", network.channels, widths[0])
    for i, width in enumerate(widths):
        name, path = f"encoder.down_blocks.{i}", f"encoder/level_{i}"
        before, count = widths[max(i - 1, 0)], network.layers_per_block
        table |= _resnets(name, f"{path}_resnet", before, width, count)
        if i != len(widths) - 1:
            table |= _convolution(f"{name}.downsamplers.0.conv", f"{path}_resize", width, width)
    return (
        table
        | _middle("encoder.mid_block", "encoder/middle", widths[-1], attention)
        | _norm("encoder.conv_norm_out", "encoder/norm", widths[-1])
        | _convolution("encoder.conv_out", "encoder/out", widths[-1], outputs)
        | _convolution("quant_conv", "encoder/moments", outputs, outputs, 1)
    )


def _decoder(network: Autoencoder, attention: tuple[str, ...]) -> Table:
    widths, inputs = network.widths[::-1], network.latent_channels
    table = (
        _convolution("post_quant_conv", "decoder/latents", inputs, inputs, 1)
        | _convolution("decoder.conv_in", "decoder/in", inputs, widths[0])
        | _middle("decoder.mid_block", "decoder/middle", widths[0], attention)
    )
    for i, width in enumerate(widths):
        name, path = f"decoder.up_blocks.{i}", f"decoder/level_{i}"
        before, count = widths[max(i - 1, 0)], network.layers_per_block + 1
        table |= _resnets(name, f"{path}_resnet", before, width, count)
        if i != len(widths) - 1:
            table |= _convolution(f"{name}.upsamplers.0.conv", f"{path}_resize", width, width)
    return (
        table
        | _norm("decoder.conv_norm_out", "decoder/norm", widths[-1])
        | _convolution("decoder.conv_out", "decoder/out", widths[-1], network.channels)
    )


def _middle(name: str, path: str, width: int, attention: tuple[str, ...]) -> Table:
    table = _norm(f"{name}.attentions.0.group_norm", f"{path}/attention/norm", width)
    for theirs, ours in zip(attention, ("query", "key", "value", "out"), strict=True):
        table |= _linear(f"{name}.attentions.0.{theirs}", f"{path}/attention/{ours}", width)
    return table | _resnets(name, f"{path}/resnet", width, width, 2)


def _resnets(name: str, path: str, inputs: int, width: int, count: int) -> Table:
    """Residual blocks one after the other, the first from `inputs` to `width` channels."""
    table = {}
    for i in range(count):
        table |= _resnet(f"{name}.resnets.{i}", f"{path}_{i}", width if i else inputs, width)
    return table


def _resnet(name: str, path: str, inputs: int, width: int) -> Table:
    table = (
        _norm(f"{name}.norm1", f"{path}/norm_0", inputs)
        | _convolution(f"{name}.conv1", f"{path}/convolution_0", inputs, width)
        | _norm(f"{name}.norm2", f"{path}/norm_1", width)
        | _convolution(f"{name}.conv2", f"{path}/convolution_1", width, width)
    )
    if inputs != width:
        table |= _convolution(f"{name}.conv_shortcut", f"{path}/skip", inputs, width, 1)
    return table


def _convolution(name: str, path: str, inputs: int, outputs: int, size: int = 3) -> Table:
    return _weighted(name, f"{path}/kernel", CONVOLUTION, (outputs, inputs, size, size))


def _linear(name: str, path: str, width: int) -> Table:
    return _weighted(name, f"{path}/kernel", TRANSPOSED, (width, width))


def _norm(name: str, path: str, width: int) -> Table:
    return _weighted(name, f"{path}/scale", PLAIN, (width,))


def _weighted(name: str, path: str, layout: Layout, shape: Shape) -> Table:
    """A weight, whose path and shape are given, and the bias beside it."""
    bias = f"{path.rpartition('/')[0]}/bias"
    return {
        f"{name}.weight": Entry(path, layout, shape),
        f"{name}.bias": Entry(bias, PLAIN, shape[:1]),
    }


SPELLINGS = tuple(
    Spelling(
        name=name,
        marks=(f"encoder.mid_block.attentions.0.{attention[0]}.weight",),
        read=read,
        table=functools.partial(_autoencoder, attention=attention),
    )
    for name, attention in _ATTENTIONS.items()
)
