"""Names of the published DINOv2 checkpoints: the authors' own, and two of transformers."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from dmf.checkpoints.convert import config_files
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
from dmf.models.encoders.dinov2 import DINOV2_SIZES, DinoV2

# Queries, keys and values are one Linear, (3 * width, width); ours: (3, width, heads, head width).
FUSED = Layout(
    lambda w, shape: w.reshape(3, -1, w.shape[1]).swapaxes(1, 2).reshape(shape),
    lambda w, shape: w.reshape(3, shape[1], -1).swapaxes(1, 2).reshape(shape),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """The tensor names in which the namings differ.

    Attributes:
      class_token, mask_token, registers, positions: names of whole tensors.
      patches, out, norm: names of layers.
      block: what precedes the number of a block.
      qkv: the one name of queries, keys and values, or a name for each.
      scales: names of the two layer scales of a block.
    """

    class_token: str
    mask_token: str
    registers: str
    positions: str
    patches: str
    block: str
    qkv: tuple[str, ...]
    out: str
    scales: tuple[str, str]
    norm: str

    @property
    def identifying_tensors(self) -> tuple[str, ...]:
        """Names in the first block tell the namings from each other, and from wider variants."""
        first = (f"{self.block}0.{name}.weight" for name in (self.qkv[0], "mlp.fc1"))
        return (self.class_token, *first)


_HUB = Names(
    class_token="cls_token",
    mask_token="mask_token",
    registers="register_tokens",
    positions="pos_embed",
    patches="patch_embed.proj",
    block="blocks.",
    qkv=("attn.qkv",),
    out="attn.proj",
    scales=("ls1.gamma", "ls2.gamma"),
    norm="norm",
)
TRANSFORMERS = Names(
    class_token="embeddings.cls_token",
    mask_token="embeddings.mask_token",
    registers="embeddings.register_tokens",
    positions="embeddings.position_embeddings",
    patches="embeddings.patch_embeddings.projection",
    block="encoder.layer.",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    norm="layernorm",
)
TRANSFORMERS_RELEASED = dataclasses.replace(
    TRANSFORMERS,
    qkv=tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    out="attention.output.dense",
)


def table(names: Names, network: DinoV2) -> Table:
    """The name table of a network."""
    width, patch = network.width, network.patch_size
    entries: dict[str, Entry] = {
        names.class_token: ParamSlice("class_token", PLAIN, (1, 1, width)),
        # Masked patches of its training have this token.
        names.mask_token: Unused(),
        names.positions: ParamSlice("positions", PLAIN, (1, 1 + network.table_side**2, width)),
        f"{names.patches}.weight": ParamSlice(
            "patch_embedding/kernel", CONVOLUTION, (width, 3, patch, patch)
        ),
        f"{names.patches}.bias": ParamSlice("patch_embedding/bias", PLAIN, (width,)),
        f"{names.norm}.weight": ParamSlice("norm/scale", PLAIN, (width,)),
        f"{names.norm}.bias": ParamSlice("norm/bias", PLAIN, (width,)),
    }
    if network.registers:
        entries[names.registers] = ParamSlice("registers", PLAIN, (1, network.registers, width))
    for i in range(network.depth):
        for name, entry in _block_table(names, network, i).items():
            entries[f"{names.block}{i}.{name}"] = entry
    return entries


def _block_table(names: Names, network: DinoV2, i: int) -> dict[str, ParamSlice]:
    """The entries of block i, by what follows the number of the block in the name."""
    width, hidden = network.width, round(network.width * network.mlp_ratio)
    table = _qkv_table(names, width, i)
    for name, path, inputs, outputs in (
        (names.out, "attention/out", width, width),
        ("mlp.fc1", "mlp/in", width, hidden),
        ("mlp.fc2", "mlp/out", hidden, width),
    ):
        table[f"{name}.weight"] = ParamSlice(
            f"blocks/{path}/kernel", TRANSPOSED, (outputs, inputs), (i,)
        )
        table[f"{name}.bias"] = ParamSlice(f"blocks/{path}/bias", PLAIN, (outputs,), (i,))
    for k, scale in enumerate(names.scales, 1):
        table[scale] = ParamSlice(f"blocks/scale_{k}", PLAIN, (width,), (i,))
        table[f"norm{k}.weight"] = ParamSlice(f"blocks/norm_{k}/scale", PLAIN, (width,), (i,))
        table[f"norm{k}.bias"] = ParamSlice(f"blocks/norm_{k}/bias", PLAIN, (width,), (i,))
    return table


def _qkv_table(names: Names, width: int, i: int) -> dict[str, ParamSlice]:
    kernel, bias = "blocks/attention/qkv_kernel", "blocks/attention/qkv_bias"
    if len(names.qkv) == 1:
        (name,) = names.qkv
        return {
            f"{name}.weight": ParamSlice(kernel, FUSED, (3 * width, width), (i,)),
            f"{name}.bias": ParamSlice(bias, PLAIN, (3 * width,), (i,)),
        }
    table = {}
    for part, name in enumerate(names.qkv):
        table[f"{name}.weight"] = ParamSlice(kernel, TRANSPOSED, (width, width), (i, part))
        table[f"{name}.bias"] = ParamSlice(bias, PLAIN, (width,), (i, part))
    return table


def infer_network(
    names: Names, shapes: Mapping[str, Shape], fields: Mapping[str, Any]
) -> DinoV2:
    """The network of a checkpoint; see `Naming.infer_network`.

    The shapes tell everything but the number of heads, which is that of the published size.

    Raises:
      InputError: a tensor that tells a field is missing or has an unfit shape, a given field is
        unknown, or the size is not published.
    """
    unknown = fields.keys() - {field.name for field in dataclasses.fields(DinoV2)}
    if unknown:
        raise InputError(min(unknown), remedy="DINOv2 has no such field")
    width, _, patch, _ = _shape_of_rank(shapes, f"{names.patches}.weight", 4)
    hidden, _ = _shape_of_rank(shapes, f"{names.block}0.mlp.fc1.weight", 2)
    _, rows, _ = _shape_of_rank(shapes, names.positions, 3)
    side = math.isqrt(rows - 1)
    if side**2 != rows - 1:
        raise InputError(
            f"tensor {names.positions!r} has {rows} rows",
            remedy="this network has one for the class token and a square number of others",
        )
    numbered = re.compile(re.escape(names.block) + r"(\d+)\.")
    blocks = [int(match[1]) for name in shapes if (match := numbered.match(name))]
    ratio = float(fields.get("mlp_ratio", 0))
    told = {
        "width": width,
        "depth": max(blocks) + 1,
        "patch_size": patch,
        "table_side": side,
        "registers": shapes.get(names.registers, (1, 0, width))[1],
        "mlp_ratio": ratio if round(width * ratio) == hidden else hidden / width,
    }
    known = with_given(told, fields)
    return DinoV2(**{"heads": _published_heads(known)} | known)


def _shape_of_rank(shapes: Mapping[str, Shape], name: str, rank: int) -> Shape:
    """The shape of a tensor, which must have `rank` axes."""
    if name not in shapes:
        raise InputError("", remedy=f"tensor {name!r} is missing from the checkpoint")
    if len(shapes[name]) != rank:
        raise InputError(
            f"tensor {name!r} has shape {shapes[name]}",
            remedy=f"this network has {rank} axes there",
        )
    return shapes[name]


def _published_heads(fields: Mapping[str, Any]) -> int:
    """The number of heads that is given, or that of the published size of this width and depth."""
    if "heads" in fields:
        return fields["heads"]
    for size in DINOV2_SIZES.values():
        if (size["width"], size["depth"]) == (fields["width"], fields["depth"]):
            return size["heads"]
    raise InputError("heads", remedy=f"no published DINOv2 has {fields['depth']} blocks of width "
                     f"{fields['width']}; give --num-heads")


NAMINGS = tuple(
    Naming(
        name=name,
        network=DinoV2,
        identifying_tensors=names.identifying_tensors,
        infer_network=functools.partial(infer_network, names),
        table=functools.partial(table, names),
        read_config=config_files.dinov2,
    )
    for name, names in (
        ("dinov2-hub", _HUB),
        ("dinov2-transformers", TRANSFORMERS),
        ("dinov2-transformers-released", TRANSFORMERS_RELEASED),
    )
)
