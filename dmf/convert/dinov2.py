"""Names of the published DINOv2 checkpoints: the authors' own, and two of transformers."""

import dataclasses
import functools
import math
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
    Unkept,
)
from dmf.encoders.dinov2 import DINOV2_SIZES, DinoV2
from dmf.typing import InputError

# Queries, keys and values in one Linear, (3 * width, width): ours is (3, width, heads, head width).
FUSED = Layout(
    lambda w, shape: w.reshape(3, -1, w.shape[1]).swapaxes(1, 2).reshape(shape),
    lambda w, shape: w.reshape(3, shape[1], -1).swapaxes(1, 2).reshape(shape),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Names:
    """What differs between the spellings; `qkv` is one name, or one for each of the three."""

    class_token: str
    mask_token: str
    positions: str
    patches: str
    block: str
    qkv: tuple[str, ...]
    out: str
    scales: tuple[str, str]
    norm: str

    @property
    def marks(self) -> tuple[str, ...]:
        """The first block tells the spellings from each other, and from wider variants."""
        first = (f"{self.block}0.{name}.weight" for name in (self.qkv[0], "mlp.fc1"))
        return (self.class_token, *first)


_HUB = _Names(
    class_token="cls_token",
    mask_token="mask_token",
    positions="pos_embed",
    patches="patch_embed.proj",
    block="blocks.",
    qkv=("attn.qkv",),
    out="attn.proj",
    scales=("ls1.gamma", "ls2.gamma"),
    norm="norm",
)
_TRANSFORMERS = _Names(
    class_token="embeddings.cls_token",
    mask_token="embeddings.mask_token",
    positions="embeddings.position_embeddings",
    patches="embeddings.patch_embeddings.projection",
    block="encoder.layer.",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    norm="layernorm",
)
_TRANSFORMERS_RELEASED = dataclasses.replace(
    _TRANSFORMERS,
    qkv=tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    out="attention.output.dense",
)


def _table(names: _Names, network: DinoV2) -> Table:
    width, patch = network.width, network.patch_size
    table: dict[str, Entry | Unkept] = {
        names.class_token: Entry("class_token", PLAIN, (1, 1, width)),
        # It stands for masked patches in training.
        names.mask_token: Unkept(),
        names.positions: Entry("positions", PLAIN, (1, 1 + network.table_side**2, width)),
        f"{names.patches}.weight": Entry(
            "patch_embedding/kernel", CONVOLUTION, (width, 3, patch, patch)
        ),
        f"{names.patches}.bias": Entry("patch_embedding/bias", PLAIN, (width,)),
        f"{names.norm}.weight": Entry("norm/scale", PLAIN, (width,)),
        f"{names.norm}.bias": Entry("norm/bias", PLAIN, (width,)),
    }
    for i in range(network.depth):
        for name, entry in _block_table(names, network, i).items():
            table[f"{names.block}{i}.{name}"] = entry
    return table


def _block_table(names: _Names, network: DinoV2, i: int) -> dict[str, Entry]:
    """Of block i, by what follows the block's number."""
    width, hidden = network.width, round(network.width * network.mlp_ratio)
    table = _qkv_table(names, width, i)
    for name, path, inputs, outputs in (
        (names.out, "attention/out", width, width),
        ("mlp.fc1", "mlp/in", width, hidden),
        ("mlp.fc2", "mlp/out", hidden, width),
    ):
        table[f"{name}.weight"] = Entry(
            f"blocks/{path}/kernel", TRANSPOSED, (outputs, inputs), (i,)
        )
        table[f"{name}.bias"] = Entry(f"blocks/{path}/bias", PLAIN, (outputs,), (i,))
    for k, scale in enumerate(names.scales, 1):
        table[scale] = Entry(f"blocks/scale_{k}", PLAIN, (width,), (i,))
        table[f"norm{k}.weight"] = Entry(f"blocks/norm_{k}/scale", PLAIN, (width,), (i,))
        table[f"norm{k}.bias"] = Entry(f"blocks/norm_{k}/bias", PLAIN, (width,), (i,))
    return table


def _qkv_table(names: _Names, width: int, i: int) -> dict[str, Entry]:
    kernel, bias = "blocks/attention/qkv_kernel", "blocks/attention/qkv_bias"
    if len(names.qkv) == 1:
        (name,) = names.qkv
        return {
            f"{name}.weight": Entry(kernel, FUSED, (3 * width, width), (i,)),
            f"{name}.bias": Entry(bias, PLAIN, (3 * width,), (i,)),
        }
    table = {}
    for part, name in enumerate(names.qkv):
        table[f"{name}.weight"] = Entry(kernel, TRANSPOSED, (width, width), (i, part))
        table[f"{name}.bias"] = Entry(bias, PLAIN, (width,), (i, part))
    return table


def _read(names: _Names, shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> DinoV2:
    """Everything but the number of heads is in the shapes; that follows from a published size.

    Raises:
      InputError: a tensor that tells a field is missing or unfit, a given field is unknown, or
        the size is not published.
    """
    unknown = given.keys() - {field.name for field in dataclasses.fields(DinoV2)}
    if unknown:
        raise InputError(f"{min(unknown)}: DINOv2 has no such field")
    width, _, patch, _ = _shape(shapes, f"{names.patches}.weight", 4)
    hidden, _ = _shape(shapes, f"{names.block}0.mlp.fc1.weight", 2)
    _, places, _ = _shape(shapes, names.positions, 3)
    side = math.isqrt(places - 1)
    if side**2 != places - 1:
        raise InputError(f"tensor {names.positions!r} has {places} rows: this network has one for "
                         "the class token and a square")
    numbered = re.compile(re.escape(names.block) + r"(\d+)\.")
    blocks = [int(match[1]) for name in shapes if (match := numbered.match(name))]
    found = {
        "width": width,
        "depth": max(blocks) + 1,
        "patch_size": patch,
        "table_side": side,
        "mlp_ratio": hidden / width,
    } | dict(given)
    return DinoV2(**{"heads": _published_heads(found)} | found)


def _shape(shapes: Mapping[str, Shape], name: str, rank: int) -> Shape:
    if name not in shapes:
        raise InputError(f"tensor {name!r} is missing from the checkpoint")
    if len(shapes[name]) != rank:
        raise InputError(f"tensor {name!r} has shape {shapes[name]}: this network has {rank} axes "
                         "there")
    return shapes[name]


def _published_heads(fields: Mapping[str, Any]) -> int:
    """The heads that are given, or those of the published size of this width and depth."""
    if "heads" in fields:
        return fields["heads"]
    for size in DINOV2_SIZES.values():
        if (size["width"], size["depth"]) == (fields["width"], fields["depth"]):
            return size["heads"]
    raise InputError(f"no published DINOv2 has width={fields['width']} and depth="
                     f"{fields['depth']}, and the tensors do not tell the heads: give --num-heads")


SPELLINGS = tuple(
    Spelling(
        name=name,
        marks=names.marks,
        read=functools.partial(_read, names),
        table=functools.partial(_table, names),
    )
    for name, names in (
        ("dinov2-hub", _HUB),
        ("dinov2-transformers", _TRANSFORMERS),
        ("dinov2-transformers-released", _TRANSFORMERS_RELEASED),
    )
)
