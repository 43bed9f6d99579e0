"""What the `config.json` of another project says of its network, as fields of ours.

A field that is unknown here may change what the network computes, and is refused, as is a value
that no network of ours has.
"""

import math
import typing
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from dmf.errors import InputError, brief
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.types import describe_type, has_type


class StatedNetwork(NamedTuple):
    """What a config says of a network.

    Attributes:
      fields: fields of the network.
      scaling: the scaling of its latents; None where the config says none.
    """

    fields: dict[str, Any]
    scaling: LatentScaling | None = None


# transformers' DINOv2, which has many fields of other purposes.
_OF_DINOV2 = {
    "hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "heads",
    "patch_size": "patch_size", "mlp_ratio": "mlp_ratio", "num_register_tokens": "registers",
}  # fmt: skip
_FIXED_IN_DINOV2 = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
                    "use_swiglu_ffn": False, "num_channels": 3}  # fmt: skip
# diffusers' AutoencoderKL: its fields that are fields of ours, those that have only one value here,
# and those that change nothing.
_RENAMED = {
    "in_channels": "channels", "out_channels": "channels", "latent_channels": "latent_channels",
    "block_out_channels": "widths", "layers_per_block": "layers_per_block",
    "norm_num_groups": "groups", "use_quant_conv": "quant_conv",
    "use_post_quant_conv": "post_quant_conv",
}  # fmt: skip
_SWITCHES = ("use_quant_conv", "use_post_quant_conv")
_FIXED = {"act_fn": "silu", "mid_block_add_attention": True}
# The kinds of levels without and with attention, and our field of the latter.
_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "encoder_attention"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "decoder_attention"),
}  # fmt: skip
# What states the scaling of the latents of an autoencoder.
SCALING_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_WITHOUT_EFFECT = ("sample_size", "force_upcast", "architectures", "model_type", "torch_dtype",
                   "dtype", "transformers_version")  # fmt: skip


def autoencoder_kl(config: Mapping[str, Any]) -> StatedNetwork:
    """The fields and the scaling of an autoencoder that diffusers wrote.

    >>> stated = autoencoder_kl({"norm_num_groups": 8, "scaling_factor": 0.5})
    >>> stated.fields["groups"], stated.scaling == stated.fields["default_scaling"]
    (8, True)

    Args:
      config: its `config.json`; empty where there is none.

    Raises:
      InputError: it is of another class, or has a field or value that no autoencoder here has.
    """
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise _unfit("_class_name", config["_class_name"], "only AutoencoderKL is known")
    fields: dict[str, Any] = {}
    widths = config.get("block_out_channels", config.get("down_block_types"))
    levels = len(widths) if isinstance(widths, list) else 0
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        if name in _RENAMED:
            if {type(number) for number in values} != {bool if name in _SWITCHES else int}:
                raise _unfit(name, value, "give true or false" if name in _SWITCHES
                             else "give whole numbers")
            field, ours = _RENAMED[name], tuple(value) if isinstance(value, list) else value
            if fields.setdefault(field, ours) != ours:
                raise _unfit(name, value, f"another field says {fields[field]}")
        elif name in _FIXED and value != _FIXED[name]:
            raise _unfit(name, value, f"only {_FIXED[name]} is known")
        elif name in _BLOCKS:
            fields |= _attention_levels(name, value, levels)
        elif name not in (*_FIXED, *SCALING_FIELDS, *_WITHOUT_EFFECT) and name[:1] != "_":
            raise _unfit(name, value, "the field is not known, and may change the network")
    return _with_scaling(fields, config)


def _attention_levels(name: str, value: Any, levels: int) -> dict[str, tuple[int, ...]]:
    """The levels with attention, finest first, by our field; those of a decoder are listed from the
    coarsest."""
    plain, attending, field = _BLOCKS[name]
    is_known = isinstance(value, list) and all(kind in (plain, attending) for kind in value)
    if not is_known or len(value) != levels:
        raise _unfit(name, value, f"only {plain} and {attending} for each width are known")
    finest_first = value if field == "encoder_attention" else value[::-1]
    return {field: tuple(i for i, kind in enumerate(finest_first) if kind == attending)}


def dinov2(config: Mapping[str, Any]) -> StatedNetwork:
    """The fields of a DINOv2 that transformers wrote; others are for other purposes.

    >>> dinov2({"num_attention_heads": 6, "image_size": 518})
    StatedNetwork(fields={'heads': 6}, scaling=None)

    Args:
      config: its `config.json`; empty where there is none.

    Raises:
      InputError: it has a value that no DINOv2 here has.
    """
    for name, value in _FIXED_IN_DINOV2.items():
        if config.get(name, value) != value:
            raise _unfit(name, config[name], f"only {value} is known")
    return StatedNetwork({ours: config[name] for name, ours in _OF_DINOV2.items()
                          if name in config})


def _with_scaling(fields: dict[str, Any], config: Mapping[str, Any]) -> StatedNetwork:
    """The fields and the scaling of an autoencoder, whose own scaling is the stated one."""
    scaling = _scaling(config)
    return StatedNetwork(fields | ({"default_scaling": scaling} if scaling else {}), scaling)


def _scaling(config: Mapping[str, Any]) -> LatentScaling | None:
    """The scaling of the latents; None where the config says none."""
    factor, shift, mean, std = (config.get(name) for name in SCALING_FIELDS)
    if factor is None and shift is None and mean is None:
        return None
    try:
        if isinstance(factor, bool) or isinstance(shift, bool):
            raise TypeError("it is no number")
        factor = 1.0 if factor is None else float(factor)
        if mean is None:
            scaling = LatentScaling(scale=factor, shift=float(shift or 0))
        else:
            scaling = LatentScaling(mean=tuple(map(float, mean)),
                                    std=tuple(float(value) / factor for value in std))
        numbers = (scaling.scale, scaling.shift, *scaling.mean, *scaling.std)
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a number is not finite")
    except (TypeError, ValueError, ArithmeticError) as error:
        stated = {name: config[name] for name in SCALING_FIELDS if name in config}
        raise _unfit("scaling", stated, f"it is no scaling of latents ({brief(error)})") from None
    return scaling


def _unfit(name: str, value: Any, remedy: str) -> InputError:
    return InputError(f"config.json: {name}", str(value)[:80], remedy)


def diffusers_network(
    config: Mapping[str, Any], class_name: str, network: type, renamed: Mapping[str, str],
    fixed: Mapping[str, Any], without_effect: Collection[str] = (),
) -> StatedNetwork:
    """The fields and the scaling of a network of diffusers.

    Args:
      config: its `config.json`; empty where there is none.
      class_name: its class in diffusers.
      network: our class, with a field `default_scaling`; the types of its fields are checked.
      renamed: the fields of ours by the names of theirs.
      fixed: the only value that is known here, for their other fields.
      without_effect: fields of theirs that change nothing here.

    Raises:
      InputError: it is of another class, or has a field or value that no network here has.
    """
    if config.get("_class_name", class_name) != class_name:
        raise _unfit("_class_name", config["_class_name"], f"only {class_name} is known")
    ignored = (*SCALING_FIELDS, *_WITHOUT_EFFECT, *without_effect)
    types, fields = typing.get_type_hints(network), {}
    for name, value in config.items():
        if name in renamed:
            field = renamed[name]
            if not has_type(value, types[field]):
                raise _unfit(name, value, f"give {describe_type(types[field])}")
            if fields.setdefault(field, _as_tuples(value)) != _as_tuples(value):
                raise _unfit(name, value, f"another field says {fields[field]}")
        elif name in fixed:
            if value != fixed[name]:
                raise _unfit(name, value, f"only {fixed[name]} is known")
        elif name not in ignored and name[:1] != "_":
            raise _unfit(name, value, "the field is not known, and may change the network")
    return _with_scaling(fields, config)


def _as_tuples(value: Any) -> Any:
    """A value of JSON with tuples for its lists."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
