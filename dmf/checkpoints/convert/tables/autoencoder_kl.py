"""Names of the published autoencoders of Stable Diffusion, SDXL, Stable Diffusion 3 and FLUX, those
of `AutoencoderKL` in diffusers.

diffusers renamed the tensors of the attention once; checkpoints come with either names.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from dmf.checkpoints.convert import config_files
from dmf.checkpoints.convert.name_tables import (
    CONVOLUTION,
    PLAIN,
    TRANSPOSED,
    Layout,
    Naming,
    ParamSlice,
    Shape,
    Table,
    with_given,
)
from dmf.errors import InputError
from dmf.models.encoders.autoencoder_kl import AutoencoderKL
from dmf.models.encoders.latent_scaling import LatentScaling

# The names of query, key, value and out.
ATTENTIONS = {
    "diffusers": ("to_q", "to_k", "to_v", "to_out.0"),
    "diffusers-old": ("query", "key", "value", "proj_attn"),
}


def infer_network(shapes: Mapping[str, Shape], fields: Mapping[str, Any]) -> AutoencoderKL:
    """The network of a checkpoint; see `Naming.infer_network`.

    The shapes do not tell the number of groups of the group normalisations: it is given, or stated
    in `config.json`, or else 32 as published. Nor do they tell the scaling of the latents: of four
    channels it is that of Stable Diffusion where none is stated, of others there is none.

    Raises:
      InputError: a tensor that tells a field is missing or of another rank, the decoder is missing,
        or no network has these fields.
    """
    if not any(name.startswith("decoder.") for name in shapes):
        raise InputError("", remedy="it holds the encoder of an autoencoder without its decoder; "
                         "give the whole autoencoder")
    blocks = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.")
    matches = [match for match in map(blocks.match, shapes) if match]
    levels, layers = ({match[i] for match in matches} for i in (1, 2))
    first = (f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(len(levels)))
    down, up = (levels_of(shapes, rf"{part}_blocks\.(\d+)\.attentions\.")
                for part in (r"encoder\.down", r"decoder\.up"))
    told = {
        "channels": _kernel(shapes, "encoder.conv_in.weight")[1],
        "latent_channels": _kernel(shapes, "decoder.conv_in.weight")[1],
        "widths": tuple(_kernel(shapes, name)[0] for name in first),
        "layers_per_block": len(layers),
        "quant_conv": any(name.startswith("quant_conv.") for name in shapes),
        "post_quant_conv": any(name.startswith("post_quant_conv.") for name in shapes),
        "encoder_attention": down,
        "decoder_attention": tuple(len(levels) - 1 - level for level in reversed(up)),
    }
    unscaled = {} if told["latent_channels"] == 4 else {"default_scaling": LatentScaling()}
    return AutoencoderKL(**with_given(told, fields, unscaled))


def levels_of(shapes: Mapping[str, Shape], pattern: str) -> tuple[int, ...]:
    """The numbers of the levels that have tensors of such names, in ascending order.

    Args:
      shapes: shapes of the tensors by name.
      pattern: matches the start of a name; its group is the number of the level.
    """
    matches = (re.match(pattern, name) for name in shapes)
    return tuple(sorted({int(match[1]) for match in matches if match}))


def _kernel(shapes: Mapping[str, Shape], name: str) -> Shape:
    """The shape (out, in, row, column) of the kernel of a convolution."""
    if name not in shapes:
        raise InputError("", remedy=f"tensor {name!r} is missing from the checkpoint")
    if len(shapes[name]) != 4:
        raise InputError(
            f"tensor {name!r} has shape {shapes[name]}",
            remedy="a convolution has four axes",
        )
    return shapes[name]


def autoencoder(network: AutoencoderKL, attention: tuple[str, ...]) -> Table:
    """The name table of a network.

    Args:
      network: the network.
      attention: the names of query, key, value and out.
    """
    return _encoder(network, attention) | _decoder(network, attention)


def _encoder(network: AutoencoderKL, attention: tuple[str, ...]) -> Table:
    widths, outputs = network.widths, 2 * network.latent_channels
    table = _convolution("encoder.conv_in", "encoder/in", network.channels, widths[0])
    for i, width in enumerate(widths):
        name, path = f"encoder.down_blocks.{i}", f"encoder/level_{i}"
        before, count = widths[max(i - 1, 0)], network.layers_per_block
        table |= _resnets(name, f"{path}_resnet", before, width, count)
        if i in network.encoder_attention:
            table |= _attentions(name, f"{path}_attention", width, count, attention)
        if i != len(widths) - 1:
            table |= _convolution(f"{name}.downsamplers.0.conv", f"{path}_resize", width, width)
    table |= (
        _middle("encoder.mid_block", "encoder/middle", widths[-1], attention)
        | _norm("encoder.conv_norm_out", "encoder/norm", widths[-1])
        | _convolution("encoder.conv_out", "encoder/out", widths[-1], outputs)
    )
    if network.quant_conv:
        table |= _convolution("quant_conv", "encoder/moments", outputs, outputs, 1)
    return table


def _decoder(network: AutoencoderKL, attention: tuple[str, ...]) -> Table:
    widths, inputs = network.widths[::-1], network.latent_channels
    table = (
        _convolution("decoder.conv_in", "decoder/in", inputs, widths[0])
        | _middle("decoder.mid_block", "decoder/middle", widths[0], attention)
    )
    if network.post_quant_conv:
        table |= _convolution("post_quant_conv", "decoder/latents", inputs, inputs, 1)
    for i, width in enumerate(widths):
        name, path = f"decoder.up_blocks.{i}", f"decoder/level_{i}"
        before, count = widths[max(i - 1, 0)], network.layers_per_block + 1
        table |= _resnets(name, f"{path}_resnet", before, width, count)
        if len(widths) - 1 - i in network.decoder_attention:
            table |= _attentions(name, f"{path}_attention", width, count, attention)
        if i != len(widths) - 1:
            table |= _convolution(f"{name}.upsamplers.0.conv", f"{path}_resize", width, width)
    return (
        table
        | _norm("decoder.conv_norm_out", "decoder/norm", widths[-1])
        | _convolution("decoder.conv_out", "decoder/out", widths[-1], network.channels)
    )


def _middle(name: str, path: str, width: int, attention: tuple[str, ...]) -> Table:
    return (_attention(f"{name}.attentions.0", f"{path}/attention", width, attention)
            | _resnets(name, f"{path}/resnet", width, width, 2))


def _attentions(
    name: str, path: str, width: int, count: int, attention: tuple[str, ...]
) -> Table:
    """The attention after each residual block of a level."""
    table = {}
    for i in range(count):
        table |= _attention(f"{name}.attentions.{i}", f"{path}_{i}", width, attention)
    return table


def _attention(name: str, path: str, width: int, attention: tuple[str, ...]) -> Table:
    table = _norm(f"{name}.group_norm", f"{path}/norm", width)
    for layer, param in zip(attention, ("query", "key", "value", "out"), strict=True):
        table |= _linear(f"{name}.{layer}", f"{path}/{param}", width)
    return table


def _resnets(name: str, path: str, inputs: int, width: int, count: int) -> Table:
    """A chain of residual blocks, of which the first goes from `inputs` to `width` channels."""
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
    """A weight with this path and shape, and the bias of the same layer."""
    bias = f"{path.rpartition('/')[0]}/bias"
    return {
        f"{name}.weight": ParamSlice(path, layout, shape),
        f"{name}.bias": ParamSlice(bias, PLAIN, shape[:1]),
    }


NAMINGS = tuple(
    Naming(
        name=name,
        network=AutoencoderKL,
        identifying_tensors=(f"encoder.mid_block.attentions.0.{attention[0]}.weight",),
        incomplete={
            f"decoder.mid_block.attentions.0.{attention[0]}.weight":
                "the decoder of an autoencoder without its encoder; give the whole autoencoder",
        },
        infer_network=infer_network,
        table=functools.partial(autoencoder, attention=attention),
        read_config=config_files.autoencoder_kl,
    )
    for name, attention in ATTENTIONS.items()
)
