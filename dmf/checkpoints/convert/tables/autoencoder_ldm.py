"""Names of `AutoencoderKL` in the code of latent diffusion (arXiv:2112.10752), in which VA-VAE
(arXiv:2501.01423), MAR (arXiv:2406.11838), Stable Diffusion and FLUX published autoencoders.

The network is that of diffusers' names, with other ones: levels of the decoder are numbered from
the finest, and the matrices of attention are convolutions of 1 x 1.
"""

import re
from collections.abc import Mapping
from typing import Any

from dmf.checkpoints.convert import config_files
from dmf.checkpoints.convert.name_tables import CONVOLUTION, Naming, ParamSlice, Shape, Table
from dmf.checkpoints.convert.tables import autoencoder_kl
from dmf.models.encoders.autoencoder_kl import AutoencoderKL

_ATTENTION = dict(zip(autoencoder_kl.ATTENTIONS["diffusers"], ("q", "k", "v", "proj_out"),
                      strict=True))
# Parts of names here, and of the same names in diffusers; the order matters.
_PARTS = (
    ("mid.attn_1.", "mid_block.attentions.0."), ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."), (".down.", ".down_blocks."), (".up.", ".up_blocks."),
    (".block.", ".resnets."), (".attn.", ".attentions."), (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."), (".nin_shortcut.", ".conv_shortcut."),
    ("coder.norm_out.", "coder.conv_norm_out."),
)  # fmt: skip
_IN_ATTENTION = (("norm", "group_norm"), *((ours, name) for name, ours in _ATTENTION.items()))
_ATTENTION_LAYER = re.compile(r"(.*attentions\.\d+\.)(.+)\.(weight|bias)")
_LEVEL = re.compile(r"(decoder\.up_blocks\.)(\d+)(\..*)")
_ALONE = "the {} of an autoencoder without its {}; give the whole autoencoder"


def infer_network(shapes: Mapping[str, Shape], fields: Mapping[str, Any]) -> AutoencoderKL:
    """The network of a checkpoint; see `dmf.checkpoints.convert.tables.autoencoder_kl`.

    Raises:
      InputError: see there.
    """
    up = autoencoder_kl.levels_of(shapes, r"decoder\.up\.(\d+)\.")
    return autoencoder_kl.infer_network(
        {to_diffusers(name, len(up)): shape for name, shape in shapes.items()}, fields
    )


def to_diffusers(name: str, levels: int) -> str:
    """The name of a tensor in diffusers.

    >>> to_diffusers("decoder.up.3.attn.0.proj_out.weight", 5)
    'decoder.up_blocks.1.attentions.0.to_out.0.weight'

    Args:
      name: its name here.
      levels: number of levels of the network.
    """
    for ours, theirs in _PARTS:
        name = name.replace(ours, theirs)
    if match := _ATTENTION_LAYER.fullmatch(name):
        name = f"{match[1]}{dict(_IN_ATTENTION).get(match[2], match[2])}.{match[3]}"
    return _with_level_reversed(name, levels)


def from_diffusers(name: str, levels: int) -> str:
    """The name here of a tensor that diffusers names; the inverse of `to_diffusers`.

    >>> from_diffusers("decoder.up_blocks.1.attentions.0.to_out.0.weight", 5)
    'decoder.up.3.attn.0.proj_out.weight'

    Args:
      name: its name in diffusers.
      levels: number of levels of the network.
    """
    name = _with_level_reversed(name, levels)
    if match := _ATTENTION_LAYER.fullmatch(name):
        ours = {theirs: ours for ours, theirs in _IN_ATTENTION}
        name = f"{match[1]}{ours[match[2]]}.{match[3]}"
    for ours, theirs in _PARTS:
        name = name.replace(theirs, ours)
    return name


def _with_level_reversed(name: str, levels: int) -> str:
    match = _LEVEL.fullmatch(name)
    return f"{match[1]}{levels - 1 - int(match[2])}{match[3]}" if match else name


def table(network: AutoencoderKL) -> Table:
    """The name table of a network."""
    theirs = autoencoder_kl.autoencoder(network, tuple(_ATTENTION))
    entries = {}
    for name, entry in theirs.items():
        if len(entry.shape) == 2:
            entry = ParamSlice(entry.path, CONVOLUTION, (*entry.shape, 1, 1))
        entries[from_diffusers(name, len(network.widths))] = entry
    return entries


NAMINGS = (
    Naming(
        name="ldm",
        network=AutoencoderKL,
        identifying_tensors=("encoder.mid.attn_1.q.weight", "decoder.mid.attn_1.q.weight"),
        infer_network=infer_network,
        table=table,
        read_config=config_files.autoencoder_kl,
        # The loss of the training (LPIPS and a discriminator), and what VA-VAE is aligned with.
        training_only=("loss.", "foundation_model.", "linear_proj.", "model_ema."),
        incomplete={
            "encoder.mid.attn_1.q.weight": _ALONE.format("encoder", "decoder"),
            "decoder.mid.attn_1.q.weight": _ALONE.format("decoder", "encoder"),
        },
    ),
)
