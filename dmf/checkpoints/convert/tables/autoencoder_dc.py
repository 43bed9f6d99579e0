"""Names of the deep compression autoencoder, those of `AutoencoderDC` in diffusers."""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dmf.checkpoints.convert import config_files
from dmf.checkpoints.convert.config_files import StatedNetwork
from dmf.checkpoints.convert.name_tables import (
    CONVOLUTION,
    PLAIN,
    TRANSPOSED,
    Entry,
    Naming,
    ParamSlice,
    Shape,
    Table,
    Unused,
    with_given,
)
from dmf.errors import InputError
from dmf.models.encoders.autoencoder_dc import AutoencoderDC
from dmf.models.encoders.latent_scaling import LatentScaling

_RESIDUAL, _ATTENTION = "ResBlock", "EfficientViTBlock"
_RENAMED = {
    "in_channels": "channels", "latent_channels": "latent_channels",
    "encoder_block_out_channels": "widths", "decoder_block_out_channels": "widths",
    "encoder_layers_per_block": "encoder_layers", "decoder_layers_per_block": "decoder_layers",
    "attention_head_dim": "head_dim", "encoder_block_types": "attention_from",
    "decoder_block_types": "attention_from", "encoder_qkv_multiscales": "attention_scales",
    "decoder_qkv_multiscales": "attention_scales", "decoder_norm_types": "batch_norm",
    "decoder_act_fns": "batch_norm", "downsample_block_type": "downsample",
    "upsample_block_type": "upsample",
}  # fmt: skip
_FIXED = {"encoder_out_shortcut": True, "decoder_in_shortcut": True, "decoder_conv_act_fn": "relu"}
_RESIZING = {"Conv": "conv", "pixel_unshuffle": "unshuffle", "interpolate": "interpolate",
             "pixel_shuffle": "shuffle"}  # fmt: skip


def read_config(config: Mapping[str, Any]) -> StatedNetwork:
    """The fields and the scaling of an AutoencoderDC that diffusers wrote.

    >>> read_config({"scaling_factor": 0.41407}).fields
    {'default_scaling': LatentScaling(scale=0.41407, shift=0.0, mean=(), std=())}

    Args:
      config: its `config.json`; empty where there is none. The latents of one without a
        `scaling_factor` are not scaled.

    Raises:
      InputError: it is of another class, or has a field or value that no AutoencoderDC here has.
    """
    config = {"scaling_factor": 1.0, **config} if config else {}
    levels = config.get("encoder_block_out_channels")
    count = len(levels) if isinstance(levels, list) else 1
    attention = _attention_from(config.get("encoder_block_types", _RESIDUAL), count)
    ours = {name: _translated(name, value, count, attention) for name, value in config.items()}
    return config_files.diffusers_network(ours, "AutoencoderDC", AutoencoderDC, _RENAMED, _FIXED)


def _translated(name: str, value: Any, count: int, attention: int | None) -> Any:
    """A value of theirs as one of our field; None where no network of ours has it."""
    if name.endswith("block_types"):
        ours = _attention_from(value, count)
    elif name.endswith("qkv_multiscales"):
        scales = value[attention:] if isinstance(value, list) and attention is not None else None
        ours = _only(scales) if scales else []
    elif name in ("decoder_norm_types", "decoder_act_fns"):
        values = value[:attention] if isinstance(value, list) else value
        ours = {"batch_norm": True, "relu": True, "rms_norm": False, "silu": False}.get(
            str(_only(values)))
    elif name.endswith("sample_block_type"):
        ours = _RESIZING.get(str(value))
    else:
        return value
    if ours is None:
        raise InputError(f"config.json: {name}", str(value)[:80], "no autoencoder here has this")
    return ours


def _only(values: Any) -> Any:
    """The value that all of a list are; None where they differ."""
    if not isinstance(values, list):
        return values
    return values[0] if values and values == values[:1] * len(values) else None


def _attention_from(types: Any, count: int) -> int | None:
    """The first level with attention, after which all have it; None where that is not so."""
    types = types if isinstance(types, list) else [types] * count
    first = types.index(_ATTENTION) if _ATTENTION in types else len(types)
    return first if types == [_RESIDUAL] * first + [_ATTENTION] * (len(types) - first) else None


def infer_network(shapes: Mapping[str, Shape], fields: Mapping[str, Any]) -> AutoencoderDC:
    """The network of a checkpoint; see `Naming.infer_network`.

    The shapes do not tell the channels of a head where attention has one scale, nor the width of a
    level without layers, nor the scaling of the latents; these are stated in `config.json`, or else
    32, the width of the next level, and that of SANA, whose networks have no BatchNorm.
    """
    encoder, decoder = (_layers(shapes, part) for part in ("encoder.down", "decoder.up"))
    widths = [_width(shapes, i) for i in range(1, len(encoder))]
    finest = _width(shapes, 0) or (fields.get("widths") or widths)[0]
    scales = _scales(shapes, len(encoder) - 1)
    told = {
        "channels": shapes[_first(shapes, "encoder.conv_in")][1],
        "latent_channels": shapes["encoder.conv_out.weight"][0],
        "widths": (finest, *widths),
        "encoder_layers": encoder,
        "decoder_layers": decoder,
        "attention_from": sum(f"encoder.down_blocks.{i}.0.attn.to_q.weight" not in shapes
                              for i in range(len(encoder))),
        "attention_scales": tuple(shape[-1] for shape in scales),
        "batch_norm": any(name.endswith("norm.running_mean") for name in shapes),
    } | _resizing(shapes, (finest, *widths), encoder[-2])  # fmt: skip
    if scales:
        last = f"encoder.down_blocks.{len(encoder) - 1}.0.attn.to_qkv_multiscale.0.proj_out.weight"
        told["head_dim"] = shapes[last][1]
    unscaled = {"default_scaling": LatentScaling()} if told["batch_norm"] else {}
    return AutoencoderDC(**with_given(told, fields, unscaled))


def _first(shapes: Mapping[str, Shape], layer: str) -> str:
    """The kernel of a layer that may resize."""
    return f"{layer}.weight" if f"{layer}.weight" in shapes else f"{layer}.conv.weight"


def _layers(shapes: Mapping[str, Shape], part: str) -> tuple[int, ...]:
    """The number of blocks of each level of a part."""
    pattern = rf"{part}_blocks\.(\d{{1,4}})\.\d{{1,4}}\.(conv1|attn\.to_q)\.weight"
    levels = [int(match[1]) for match in (re.fullmatch(pattern, name) for name in shapes) if match]
    counts = collections.Counter(levels)
    return tuple(counts[i] for i in range(max(levels, default=0) + 1))


def _width(shapes: Mapping[str, Shape], level: int) -> int:
    """The width of a level of the encoder; 0 if it has no layers."""
    name = f"encoder.down_blocks.{level}.0"
    shape = shapes.get(f"{name}.conv1.weight", shapes.get(f"{name}.attn.to_q.weight", (0,)))
    return shape[0]


def _scales(shapes: Mapping[str, Shape], level: int) -> list[Shape]:
    """The shapes of the convolutions over pixels in the first attention of a level."""
    pattern = rf"encoder\.down_blocks\.{level}\.0\.attn\.to_qkv_multiscale\.\d+\.proj_in\.weight"
    return [shapes[name] for name in sorted(shapes) if re.fullmatch(pattern, name)]


def _resizing(shapes: Mapping[str, Shape], widths: Sequence[int], layers: int) -> dict[str, str]:
    """How the resolution changes between the two coarsest levels, where the encoder has so many
    layers in the finer one of them."""
    level = len(widths) - 2
    down = f"encoder.down_blocks.{level}.{layers}" if layers else "encoder.conv_in"
    up, outputs = f"decoder.up_blocks.{level}.0.conv.weight", widths[level]
    if up not in shapes:
        up, outputs = "decoder.conv_out.conv.weight", shapes[_first(shapes, "encoder.conv_in")][1]
    is_strided = shapes[f"{down}.conv.weight"][0] == widths[-1]
    return {"downsample": "conv" if is_strided else "unshuffle",
            "upsample": "interpolate" if shapes[up][0] == outputs else "shuffle"}


def table(network: AutoencoderDC) -> Table:
    """The name table of a network."""
    return _encoder(network) | _decoder(network)


def _encoder(network: AutoencoderDC) -> dict[str, Entry]:
    widths, layers = network.widths, network.encoder_layers
    shrink = 1 if network.downsample == "conv" else 4
    if layers[0]:
        entries = _convolution("encoder.conv_in", "encoder/in", network.channels, widths[0])
    else:
        entries = _convolution("encoder.conv_in.conv", "encoder/in/conv", network.channels,
                               widths[1] // shrink)
    for i, count in enumerate(layers):
        name, path = f"encoder.down_blocks.{i}", f"encoder/level_{i}"
        for j in range(count):
            entries |= _block(network, i, f"{name}.{j}", f"{path}_block_{j}", batch_norm=False)
        if count and i + 1 < len(widths):
            entries |= _convolution(f"{name}.{count}.conv", f"{path}_resize/conv", widths[i],
                                    widths[i + 1] // shrink)
    return entries | _convolution("encoder.conv_out", "encoder/out", widths[-1],
                                  network.latent_channels)


def _decoder(network: AutoencoderDC) -> dict[str, Entry]:
    widths, layers = network.widths, network.decoder_layers
    grow = 1 if network.upsample == "interpolate" else 4
    entries = _convolution("decoder.conv_in", "decoder/in", network.latent_channels, widths[-1])
    for i, count in enumerate(layers):
        name, path = f"decoder.up_blocks.{i}", f"decoder/level_{i}"
        resizes = bool(count) and i + 1 < len(widths)
        if resizes:
            entries |= _convolution(f"{name}.0.conv", f"{path}_resize/conv", widths[i + 1],
                                    widths[i] * grow)
        for j in range(count):
            entries |= _block(network, i, f"{name}.{j + resizes}", f"{path}_block_{j}",
                              batch_norm=network.batch_norm)
    width = widths[0] if layers[0] else widths[1]
    entries |= _norm("decoder.norm_out", "decoder/norm", width)
    if layers[0]:
        return entries | _convolution("decoder.conv_out", "decoder/out", width, network.channels)
    return entries | _convolution("decoder.conv_out.conv", "decoder/out/conv", width,
                                  network.channels * grow)


def _block(
    network: AutoencoderDC, level: int, name: str, path: str, *, batch_norm: bool
) -> dict[str, Entry]:
    width = network.widths[level]
    if level >= network.attention_from:
        return (_attention(network, width, f"{name}.attn", f"{path}/attention")
                | _gated(width, f"{name}.conv_out", f"{path}/gated"))
    entries = (
        _convolution(f"{name}.conv1", f"{path}/convolution_0", width, width)
        | _convolution(f"{name}.conv2", f"{path}/convolution_1", width, width, bias=False)
        | _norm(f"{name}.norm", f"{path}/norm", width)
    )
    if batch_norm:
        for theirs, ours in (("running_mean", "mean"), ("running_var", "var")):
            entries[f"{name}.norm.{theirs}"] = ParamSlice(f"{path}/norm/{ours}", PLAIN, (width,))
        entries[f"{name}.norm.num_batches_tracked"] = Unused()
    return entries


def _attention(network: AutoencoderDC, width: int, name: str, path: str) -> dict[str, Entry]:
    scales = network.attention_scales
    entries = {
        f"{name}.to_{ours[0]}.weight": ParamSlice(f"{path}/{ours}/kernel", TRANSPOSED,
                                                  (width, width))
        for ours in ("query", "key", "value")
    }  # fmt: skip
    for i, size in enumerate(scales):
        theirs, ours = f"{name}.to_qkv_multiscale.{i}", f"{path}/scale_{i}"
        entries |= _convolution(f"{theirs}.proj_in", f"{ours}_pixels", 1, 3 * width, size,
                                bias=False)
        entries |= _convolution(f"{theirs}.proj_out", f"{ours}_channels", network.head_dim,
                                3 * width, 1, bias=False)
    entries[f"{name}.to_out.weight"] = ParamSlice(f"{path}/out/kernel", TRANSPOSED,
                                                  (width, width * (1 + len(scales))))
    return entries | _norm(f"{name}.norm_out", f"{path}/norm", width)


def _gated(width: int, name: str, path: str) -> dict[str, Entry]:
    return (
        _convolution(f"{name}.conv_inverted", f"{path}/in", width, 8 * width, 1)
        | _convolution(f"{name}.conv_depth", f"{path}/pixels", 1, 8 * width)
        | _convolution(f"{name}.conv_point", f"{path}/out", 4 * width, width, 1, bias=False)
        | _norm(f"{name}.norm", f"{path}/norm", width)
    )


def _convolution(
    name: str, path: str, inputs: int, outputs: int, size: int = 3, *, bias: bool = True
) -> dict[str, Entry]:
    shape = (outputs, inputs, size, size)
    entries: dict[str, Entry] = {
        f"{name}.weight": ParamSlice(f"{path}/kernel", CONVOLUTION, shape)
    }
    if bias:
        entries[f"{name}.bias"] = ParamSlice(f"{path}/bias", PLAIN, (outputs,))
    return entries


def _norm(name: str, path: str, width: int) -> dict[str, Entry]:
    return {f"{name}.weight": ParamSlice(f"{path}/scale", PLAIN, (width,)),
            f"{name}.bias": ParamSlice(f"{path}/bias", PLAIN, (width,))}


_ALONE = "the {} of an autoencoder (DC-AE) without its {}; give the whole autoencoder"
NAMINGS = (
    Naming(
        name="diffusers-dc",
        network=AutoencoderDC,
        identifying_tensors=("encoder.conv_out.weight", "decoder.norm_out.weight",
                             "encoder.down_blocks.1.0.conv1.weight"),
        infer_network=infer_network,
        table=table,
        read_config=read_config,
        incomplete={
            "decoder.up_blocks.1.0.conv.weight": _ALONE.format("decoder", "encoder"),
            "encoder.down_blocks.1.0.conv1.weight": _ALONE.format("encoder", "decoder"),
        },
    ),
)
