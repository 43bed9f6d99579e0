"""Names of the published in-context transformers: improved MeanFlow and pixel MeanFlow.

- "imf": the JAX names of both, paths below `params/`.
- "imf-pytorch": their PyTorch names.

Pixel MeanFlow has a position table, a bottleneck, and an axis of length 1 in front of its learned
tokens. Files for sampling have no blocks of the v head; those of improved MeanFlow still have its
last layer, which nothing uses.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from dmf.checkpoints.convert.name_tables import (
    CONVOLUTION,
    PLAIN,
    TRANSPOSED,
    Naming,
    ParamSlice,
    Shape,
    Table,
    Unused,
    with_given,
)
from dmf.errors import InputError
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.in_context_dit import InContextDiT
from dmf.models.in_context_transformer import PREFIX, PREFIX_TOKENS, mlp_width

# The latents of improved MeanFlow, by channel (arXiv:2512.02012).
SCALING = LatentScaling(
    mean=(0.86488, -0.27787343, 0.21616915, 0.3738409),
    std=(4.85503674, 5.31922414, 3.93725398, 3.9870003),
)
# Number of latents along a side where no position table tells it.
_PUBLISHED_INPUT_SIZE = 32
_MAX_INPUT_SIZE = 4096
_TIME_FEATURES = 256
# The learned tokens in front of the patches, and ours.
_PREFIX = {"class_tokens": "label", "omega_tokens": "scale", "t_min_tokens": "low",
           "t_max_tokens": "high", "time_tokens": "interval"}  # fmt: skip
_EMBEDDINGS = {
    "h_embedder": "interval_embedding", "omega_embedder": "guidance_embedding/scale",
    "cfg_t_start_embedder": "guidance_embedding/low",
    "cfg_t_end_embedder": "guidance_embedding/high",
}  # fmt: skip
_LABELS = "y_embedder.embedding_table._flax_embedding.weight"
_PATCHES = ("x_embedder.proj", "x_embedder.proj1", "x_embedder.proj2")
_MLP = {"w1": "gate", "w2": "out", "w3": "in"}


def pytorch_table(model: InContextDiT) -> Table:
    """The name table of the PyTorch checkpoints."""
    table = {f"net.{name}": entry for name, entry in _table(model).items()}
    # Pixel MeanFlow stores its rotary positions, which the network computes.
    return table | ({"net.rope_freqs": Unused()} if model.positions == "rotary_2d" else {})


def jax_table(model: InContextDiT) -> Table:
    """The name table of the JAX checkpoints, paths below `params/`."""
    pixels = model.positions == "rotary_2d"
    return {_jax_name(name, pixels): _jax_entry(name, entry, pixels)
            for name, entry in _table(model).items()}


def _table(model: InContextDiT) -> Table:
    """The PyTorch names of all parameters, without "net."."""
    table: dict[str, Any] = {**_prefix_table(model), **_patch_table(model)}
    trunk = model.depth - model.head_depth
    for i in range(trunk):
        table |= _block_table(model, f"shared_blocks.{i}", "blocks", i)
    for head in ("u", "v") if model.velocity_head else ("u",):
        for i in range(model.head_depth):
            table |= _block_table(model, f"{head}_heads.{i}", f"{head}_head/blocks", i)
        table |= _head_table(model, head)
    if not model.velocity_head:
        table |= {name: Unused(entry.shape) for name, entry in _head_table(model, "v").items()}
    return table


def _prefix_table(model: InContextDiT) -> dict[str, ParamSlice]:
    """The names of the learned tokens and of the embeddings of what they are told."""
    width, axes = model.width, (1,) if model.positions == "rotary_2d" else ()
    table = {name: ParamSlice(f"prefix/{path}", PLAIN, (*axes, PREFIX[path], width))
             for name, path in _PREFIX.items()}
    table[_LABELS] = ParamSlice("label_embedding/embedding", PLAIN, (model.num_classes + 1, width))
    for name, path in _EMBEDDINGS.items():
        for layer, part, inputs in ((0, "in", _TIME_FEATURES), (2, "out", width)):
            table |= _linear(f"{name}.mlp.{layer}", f"{path}/{part}", inputs, width)
    return table


def _patch_table(model: InContextDiT) -> dict[str, ParamSlice]:
    """The names of the patch embedding, of its bottleneck, and of the position table."""
    width, patch, channels = model.width, model.patch_size, model.channels
    shape = (model.patch_bottleneck or width, channels, patch, patch)
    if not model.patch_bottleneck:
        table = _convolution(_PATCHES[0], "patch_embedding", shape)
    else:
        table = _convolution(_PATCHES[1], "patch_reduction", shape)
        table |= _convolution(_PATCHES[2], "patch_embedding", (width, shape[0], 1, 1))
    if model.positions == "rotary_2d":
        table["pos_embed"] = ParamSlice("position_embedding", PLAIN, (1, model.tokens, width))
    return table


def _block_table(
    model: InContextDiT, name: str, path: str, i: int
) -> dict[str, ParamSlice]:
    """The names of block i of the trunk or of a head."""
    width, hidden = model.width, mlp_width(model.width)
    head_width = width // model.heads
    vectors = {"attn_scale": ("attention_gate", width), "mlp_scale": ("mlp_gate", width),
               "norm1.weight": ("attention_norm/scale", width),
               "norm2.weight": ("mlp_norm/scale", width),
               "attn.q_norm.weight": ("attention/q_norm/scale", head_width),
               "attn.k_norm.weight": ("attention/k_norm/scale", head_width)}  # fmt: skip
    table = {f"{name}.{vector}": ParamSlice(f"{path}/{part}", PLAIN, (size,), (i,))
             for vector, (part, size) in vectors.items()}
    # Query, key and value are one kernel [depth, width, 3, heads, width / heads].
    for j, part in enumerate("qkv"):
        table[f"{name}.attn.{part}_proj._flax_linear.weight"] = ParamSlice(
            f"{path}/attention/qkv/kernel", TRANSPOSED, (width, width), (i, slice(None), j)
        )
    table[f"{name}.attn.out_proj._flax_linear.weight"] = ParamSlice(
        f"{path}/attention/out/kernel", TRANSPOSED, (width, width), (i,)
    )
    for layer, part in _MLP.items():
        shape = (width, hidden) if part == "out" else (hidden, width)
        table[f"{name}.mlp.{layer}._flax_linear.weight"] = ParamSlice(
            f"{path}/mlp/{part}/kernel", TRANSPOSED, shape, (i,)
        )
    return table


def _head_table(model: InContextDiT, head: str) -> dict[str, ParamSlice]:
    """The names of the last layer of a head."""
    name, path = f"{head}_final_layer", f"{head}_head"
    norm = ParamSlice(f"{path}/norm/scale", PLAIN, (model.width,))
    outputs = model.patch_size**2 * model.channels
    return {f"{name}.norm.weight": norm,
            **_linear(f"{name}.linear", f"{path}/linear", model.width, outputs)}


def _linear(name: str, path: str, inputs: int, outputs: int) -> dict[str, ParamSlice]:
    """A Linear of PyTorch."""
    return {
        f"{name}._flax_linear.weight": ParamSlice(f"{path}/kernel", TRANSPOSED, (outputs, inputs)),
        f"{name}._flax_linear.bias": ParamSlice(f"{path}/bias", PLAIN, (outputs,)),
    }


def _convolution(name: str, path: str, shape: Shape) -> dict[str, ParamSlice]:
    """A convolution of PyTorch."""
    return {f"{name}.weight": ParamSlice(f"{path}/kernel", CONVOLUTION, shape),
            f"{name}.bias": ParamSlice(f"{path}/bias", PLAIN, shape[:1])}


def _jax_name(name: str, pixels: bool) -> str:
    """shared_blocks.0.mlp.w1._flax_linear.weight ->
    net/shared_blocks_0/mlp/w1/_flax_linear/kernel."""
    if name == _LABELS:
        inner = "" if pixels else "_flax_embedding/"
        return f"net/y_embedder/embedding_table/{inner}embedding"
    parts = name.split(".")
    if parts[1:2] == ["mlp"] and parts[2].isdecimal():  # a sequence of layers
        parts[2] = f"layers_{parts[2]}"
    elif parts[1:] and parts[1].isdecimal():  # a list of blocks
        parts[:2] = [f"{parts[0]}_{parts[1]}"]
    return "/".join(["net", *parts[:-1], "kernel" if parts[-1] == "weight" else parts[-1]])


def _jax_entry(name: str, entry: ParamSlice | Unused, pixels: bool) -> ParamSlice | Unused:
    """The entry of a tensor of JAX, whose axes are in the order of ours."""
    shape = entry.shape
    if len(shape) == 4:
        outputs, inputs, rows, columns = shape
        shape = (rows, columns, inputs, outputs)
    elif name.endswith("_linear.weight"):
        shape = shape[::-1]
    elif pixels and name == _LABELS:
        shape = (1, *shape)
    if isinstance(entry, Unused):
        return Unused(shape)
    return dataclasses.replace(entry, layout=PLAIN, shape=shape)


def infer_pytorch_network(shapes: Mapping[str, Shape], fields: Mapping[str, Any]) -> InContextDiT:
    """The network of a PyTorch checkpoint; see `Naming.infer_network`.

    Raises:
      InputError: a field is unknown, or contradicts the tensors.
    """
    return _complete(_told_fields(shapes, lambda name: f"net.{name}", (0, 1, 2, 3)), fields)


def infer_jax_network(shapes: Mapping[str, Shape], fields: Mapping[str, Any]) -> InContextDiT:
    """The network of a JAX checkpoint; see `Naming.infer_network`.

    Raises:
      InputError: a field is unknown, or contradicts the tensors.
    """
    pixels = "net/pos_embed" in shapes
    return _complete(_told_fields(shapes, lambda name: _jax_name(name, pixels), (3, 2, 0, 1)),
                     fields)


def _told_fields(
    shapes: Mapping[str, Shape], rename: Callable[[str], str], axes: tuple[int, ...]
) -> dict[str, Any]:
    """The fields that the shapes tell.

    Args:
      shapes: shapes of the tensors by name.
      rename: PyTorch name without "net." -> name in this project.
      axes: where a convolution has outputs, inputs, rows and columns in this project.
    """
    plain, reduction = (shapes.get(rename(f"{name}.weight")) for name in _PATCHES[:2])
    outputs, channels, patch, _ = ((plain or reduction)[axis] for axis in axes)
    head_depth = _count_blocks(shapes, rename, "u_heads")
    classes, width = shapes[rename(_LABELS)][-2:]
    (head_width,) = shapes[rename("u_heads.0.attn.q_norm.weight")]
    told = {
        "channels": channels,
        "patch_size": patch,
        "patch_bottleneck": 0 if plain else outputs,
        "depth": _count_blocks(shapes, rename, "shared_blocks") + head_depth,
        "head_depth": head_depth,
        "width": width,
        "heads": width // head_width,
        "num_classes": classes - 1,
        "positions": "rotary",
        "velocity_head": rename("v_heads.0.attn_scale") in shapes,
    }
    if positions := shapes.get(rename("pos_embed")):
        side = math.isqrt(positions[1] - PREFIX_TOKENS)
        told |= {"positions": "rotary_2d", "input_size": side * patch}
    return told


def _count_blocks(
    shapes: Mapping[str, Shape], rename: Callable[[str], str], name: str
) -> int:
    numbers = itertools.count()
    return next(i for i in numbers if rename(f"{name}.{i}.attn_scale") not in shapes)


def _complete(told: Mapping[str, Any], given: Mapping[str, Any]) -> InContextDiT:
    """The network of the known fields; what they leave open is as published.

    Args:
      told: fields that the shapes tell.
      given: fields that the user gave, or the file states.

    Raises:
      InputError: a field is unknown, or contradicts the tensors.
    """
    unknown = given.keys() - {field.name for field in dataclasses.fields(InContextDiT)}
    if unknown:
        raise InputError(min(unknown), remedy="an in-context transformer has no such field")
    pixels = told["positions"] == "rotary_2d" and told["patch_bottleneck"]
    fields = with_given(told, given, {
        "input_size": _PUBLISHED_INPUT_SIZE,
        "prediction": "data" if pixels else "velocity",
        "conditioning": "meanflow" if given.get("split_depth") is None else "decoupled",
    })
    if not ("input_size" in told or 1 <= fields["input_size"] <= _MAX_INPUT_SIZE):
        raise InputError("input_size", fields["input_size"],
                         f"give a whole number from 1 to {_MAX_INPUT_SIZE}")
    return InContextDiT(**fields)


def _published_scaling(model: InContextDiT) -> LatentScaling | None:
    """The scaling of the latents; None for pixels."""
    return SCALING if model.channels == len(SCALING.mean) else None


NAMINGS = (
    Naming(
        name="imf",
        network=InContextDiT,
        identifying_tensors=("net/class_tokens", "net/u_heads_0/attn_scale",
                             "net/u_final_layer/norm/kernel"),
        infer_network=infer_jax_network,
        table=jax_table,
        scaling=_published_scaling,
    ),
    Naming(
        name="imf-pytorch",
        network=InContextDiT,
        identifying_tensors=("net.class_tokens", "net.u_heads.0.attn_scale",
                             "net.u_final_layer.norm.weight"),
        infer_network=infer_pytorch_network,
        table=pytorch_table,
        scaling=_published_scaling,
    ),
)
