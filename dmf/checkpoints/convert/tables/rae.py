"""Names of the representation autoencoder RAE: `AutoencoderRAE` of diffusers, and the release.

The release has three files, which are given together: the DINOv2 with registers, as transformers
names its tensors; the decoder; and the statistics of the latents.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmf.checkpoints.convert import config_files
from dmf.checkpoints.convert.config_files import StatedNetwork
from dmf.checkpoints.convert.name_tables import (
    PLAIN,
    TRANSPOSED,
    Constant,
    Entry,
    Layout,
    Naming,
    ParamSlice,
    Shape,
    Table,
    Unused,
    with_given,
)
from dmf.checkpoints.convert.tables import dinov2
from dmf.errors import InputError
from dmf.models.encoders.dinov2 import IMAGENET_MEAN, IMAGENET_STD
from dmf.models.encoders.rae import RAE

# Both projects add this before they divide, the release to variances and diffusers to deviations.
_EPSILON = np.float32(1e-5)
_CHANNELS_LAST = Layout(
    lambda w, shape: w.transpose(1, 2, 0), lambda w, shape: w.transpose(2, 0, 1)
)
_VARIANCE = Layout(
    lambda w, shape: np.sqrt(w.astype(np.float32).transpose(1, 2, 0) + _EPSILON),
    lambda w, shape: w.transpose(2, 0, 1) ** 2 - _EPSILON,
)
_DEVIATION = Layout(
    lambda w, shape: w.astype(np.float32).transpose(1, 2, 0) + _EPSILON,
    lambda w, shape: w.transpose(2, 0, 1) - _EPSILON,
)
_HEAD_WIDTH = 64  # of every published DINOv2
_DECODER_HEADS = {768: 12, 1024: 16, 1152: 16}  # of the published decoders, by their width


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """In what the two projects differ.

    Attributes:
      encoder, decoder: what precedes the names of the tensors of the parts.
      qkv, out: names of the layers of the decoder's attention.
      mean, std: names of the statistics of the latents.
      std_layout: how the second of them becomes our standard deviation.
    """

    encoder: str
    decoder: str
    qkv: tuple[str, str, str]
    out: str
    mean: str
    std: str
    std_layout: Layout


_DIFFUSERS = _Form(
    encoder="encoder.", decoder="decoder.", qkv=("to_q", "to_k", "to_v"), out="to_out.0",
    mean="_latents_mean", std="_latents_std", std_layout=_DEVIATION,
)  # fmt: skip
_RELEASE = _Form(
    encoder="", decoder="", out="output.dense",
    qkv=("attention.query", "attention.key", "attention.value"),
    mean="mean", std="var", std_layout=_VARIANCE,
)  # fmt: skip

# Fields of diffusers' network.
_RENAMED = {
    "encoder_hidden_size": "latent_channels", "encoder_patch_size": "encoder_patch_size",
    "encoder_num_hidden_layers": "encoder_depth", "decoder_hidden_size": "decoder_width",
    "decoder_num_hidden_layers": "decoder_depth", "decoder_num_attention_heads": "decoder_heads",
    "decoder_intermediate_size": "decoder_hidden", "patch_size": "patch_size",
    "encoder_input_size": "side", "image_size": "side",
}  # fmt: skip
_FIXED = {"encoder_type": "dinov2", "num_channels": 3, "reshape_to_2d": True,
          "encoder_norm_mean": list(IMAGENET_MEAN),
          "encoder_norm_std": list(IMAGENET_STD)}  # fmt: skip
# Noise and losses of its training; the statistics are among the tensors too.
_WITHOUT_EFFECT = ("noise_tau", "use_encoder_loss")
_STATISTICS = ("latents_mean", "latents_std")


def read_config(config: Mapping[str, Any]) -> StatedNetwork:
    """The fields and the scaling of an AutoencoderRAE that diffusers wrote.

    >>> read_config({"encoder_input_size": 448, "image_size": None}).fields
    {'side': 32}

    Args:
      config: its `config.json`; empty where there is none.

    Raises:
      InputError: it is of another class, or has a field or value that no RAE here has.
    """
    ours = {name: value for name, value in config.items()
            if name not in _STATISTICS and value is not None}
    for name, pixels in (("encoder_input_size", ours.get("encoder_patch_size", 14)),
                         ("image_size", ours.get("patch_size", 16))):
        value = ours.get(name, 0)
        if type(value) is int and type(pixels) is int and pixels > 0 and name in ours:
            if value % pixels:
                raise InputError(f"config.json: {name}", value, f"give a multiple of {pixels}")
            ours[name] = value // pixels
    return config_files.diffusers_network(
        ours, "AutoencoderRAE", RAE, _RENAMED, _FIXED, _WITHOUT_EFFECT)


def read_heads(config: Mapping[str, Any]) -> StatedNetwork:
    """The heads that the files of transformers beside the encoder and the decoder state."""
    names = {"num_attention_heads": "encoder_heads", "decoder_num_attention_heads": "decoder_heads"}
    return StatedNetwork({ours: config[name] for name, ours in names.items() if name in config})


def infer_network(
    names: dinov2.Names, form: _Form, shapes: Mapping[str, Shape], fields: Mapping[str, Any]
) -> RAE:
    """The network of a checkpoint; see `Naming.infer_network`.

    The shapes do not tell the heads, nor always the height and width of the latents: where no
    `config.json` does, these are those of the published networks.

    Raises:
      InputError: there are no statistics of the latents, or the decoder is of no published width.
    """
    if form.std not in shapes:
        raise InputError("", remedy=f"it has no statistics of the latents (tensor {form.std!r}); "
                         "give the file of the statistics too")
    encoder = {name.removeprefix(form.encoder): shape for name, shape in shapes.items()}
    heads = fields.get("encoder_heads", encoder[names.class_token][-1] // _HEAD_WIDTH)
    network = dinov2.infer_network(names, encoder, {"heads": heads})
    told = {
        "latent_channels": network.width, "encoder_depth": network.depth,
        "encoder_patch_size": network.patch_size, "encoder_table_side": network.table_side,
        "registers": network.registers,
    } | _decoder_fields(form, shapes)  # fmt: skip
    for field, name in (("stored_mean", form.mean), ("stored_std", form.std)):
        told[field] = len(shapes.get(name, ())) > 1
        if told[field]:
            told["side"] = shapes[name][-1]
    return RAE(**with_given(told, fields, {
        "side": 16, "encoder_heads": heads,
        "decoder_heads": _published_heads(told["decoder_width"], fields),
    }))  # fmt: skip


def _decoder_fields(form: _Form, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """What the tensors of the decoder tell."""
    block = rf"{re.escape(form.decoder)}decoder_layers\.(\d{{1,4}})\.output\.dense\.weight"
    blocks = [int(match[1]) for match in (re.fullmatch(block, name) for name in shapes) if match]
    return {
        "decoder_width": shapes[f"{form.decoder}decoder_embed.weight"][0],
        "decoder_depth": max(blocks) + 1,
        "decoder_hidden": shapes[f"{form.decoder}decoder_layers.0.output.dense.weight"][1],
        "patch_size": math.isqrt(shapes[f"{form.decoder}decoder_pred.weight"][0] // 3),
    }


def _published_heads(width: int, fields: Mapping[str, Any]) -> int:
    """The number of heads that is given, or that of the published decoder of this width."""
    if "decoder_heads" not in fields and width not in _DECODER_HEADS:
        raise InputError("decoder_heads", remedy=f"no published decoder has width {width}; a "
                         "config.json must state decoder_num_attention_heads")
    return fields.get("decoder_heads", _DECODER_HEADS.get(width, 0))


def table(names: dinov2.Names, form: _Form, network: RAE) -> Table:
    """The name table of a network."""
    return (_encoder(names, form, network) | _decoder(form, network)
            | _statistics(form, network))


def _encoder(names: dinov2.Names, form: _Form, network: RAE) -> dict[str, Entry]:
    """The entries of the DINOv2, whose last norm RAE replaces by one without scale and bias."""
    entries: dict[str, Entry] = {}
    for name, entry in dinov2.table(names, network.vision_transformer).items():
        if isinstance(entry, ParamSlice):
            is_last = entry.path.startswith("norm/")
            entry = Unused() if is_last else dataclasses.replace(
                entry, path=f"encoder/dinov2/{entry.path}")
        entries[f"{form.encoder}{name}"] = entry
    entries[f"{form.encoder}{names.mask_token}"] = Unused((1, network.latent_channels))
    return entries


def _decoder(form: _Form, network: RAE) -> dict[str, Entry]:
    width, first = network.decoder_width, form.decoder
    outputs = network.patch_size**2 * network.channels
    positions = f"{first}decoder_pos_embed"
    entries: dict[str, Entry] = {
        f"{first}trainable_cls_token": ParamSlice("decoder/class_token", PLAIN, (1, 1, width)),
        positions: Constant(network.positions()[None]) if form is _RELEASE else Unused(),
    }
    entries |= _linear(f"{first}decoder_embed", "decoder/in", network.latent_channels, width)
    entries |= _linear(f"{first}decoder_pred", "decoder/out", width, outputs)
    entries |= _norm(f"{first}decoder_norm", "decoder/norm", width)
    for i in range(network.decoder_depth):
        entries |= _block(form, network, f"{first}decoder_layers.{i}.", (i,))
    return entries


def _block(form: _Form, network: RAE, first: str, index: tuple[int, ...]) -> dict[str, Entry]:
    width, hidden, path = network.decoder_width, network.decoder_hidden, "decoder/blocks"
    entries: dict[str, Entry] = {}
    for part, layer in enumerate(form.qkv):
        name, place = f"{first}attention.{layer}", (*index, part)
        entries[f"{name}.weight"] = ParamSlice(f"{path}/attention/qkv_kernel", TRANSPOSED,
                                               (width, width), place)
        entries[f"{name}.bias"] = ParamSlice(f"{path}/attention/qkv_bias", PLAIN, (width,), place)
    entries |= _linear(f"{first}attention.{form.out}", f"{path}/attention/out", width, width, index)
    entries |= _linear(f"{first}intermediate.dense", f"{path}/mlp/in", width, hidden, index)
    entries |= _linear(f"{first}output.dense", f"{path}/mlp/out", hidden, width, index)
    entries |= _norm(f"{first}layernorm_before", f"{path}/norm_1", width, index)
    return entries | _norm(f"{first}layernorm_after", f"{path}/norm_2", width, index)


def _linear(
    name: str, path: str, inputs: int, outputs: int, index: tuple[int, ...] = ()
) -> dict[str, Entry]:
    return {f"{name}.weight": ParamSlice(f"{path}/kernel", TRANSPOSED, (outputs, inputs), index),
            f"{name}.bias": ParamSlice(f"{path}/bias", PLAIN, (outputs,), index)}


def _norm(name: str, path: str, width: int, index: tuple[int, ...] = ()) -> dict[str, Entry]:
    return {f"{name}.weight": ParamSlice(f"{path}/scale", PLAIN, (width,), index),
            f"{name}.bias": ParamSlice(f"{path}/bias", PLAIN, (width,), index)}


def _statistics(form: _Form, network: RAE) -> dict[str, Entry]:
    shape = (network.latent_channels, network.side, network.side)
    entries: dict[str, Entry] = {}
    if network.stored_mean:
        entries[form.mean] = ParamSlice("encoder/mean", _CHANNELS_LAST, shape)
    if network.stored_std:
        entries[form.std] = ParamSlice("encoder/std", form.std_layout, shape)
    if form is _DIFFUSERS:
        for name, value in (("encoder_mean", IMAGENET_MEAN), ("encoder_std", IMAGENET_STD)):
            entries[name] = Constant(np.float32(value).reshape(1, 3, 1, 1))
        entries = {form.mean: Constant(np.zeros(1, np.float32)),
                   form.std: Constant(np.ones(1, np.float32))} | entries
    return entries


_ALONE = ("the {} of a representation autoencoder (RAE) alone; give the files of its encoder (a "
          "DINOv2 with registers), its decoder and its statistics together")
_PARTS = {"decoder_embed.weight": _ALONE.format("decoder"),
          "decoder.decoder_embed.weight": _ALONE.format("decoder"),
          "var": _ALONE.format("statistics")}  # fmt: skip
NAMINGS = tuple(
    Naming(
        name=name,
        network=RAE,
        identifying_tensors=(
            *(f"{form.encoder}{tensor}" for tensor in names.identifying_tensors),
            f"{form.decoder}decoder_embed.weight",
        ),
        infer_network=functools.partial(infer_network, names, form),
        table=functools.partial(table, names, form),
        read_config=read_config if form is _DIFFUSERS else read_heads,
        incomplete=_PARTS,
    )
    for name, names, form in (
        ("diffusers-rae", dinov2.TRANSFORMERS, _DIFFUSERS),
        ("diffusers-rae-old", dinov2.TRANSFORMERS_RELEASED, _DIFFUSERS),
        ("rae", dinov2.TRANSFORMERS, _RELEASE),
        ("rae-released", dinov2.TRANSFORMERS_RELEASED, _RELEASE),
    )
)
