"""Names of the published diffusion transformers: SiT and DMF in PyTorch, MeanFlow in JAX.

- "dmf": the PyTorch names of DMF, of the SiT it starts from and of REPA's training.
- "sit": the same names in the checkpoints of SiT's first authors, whose time runs from noise (0) to
  data (1) and whose last half of the output channels is not used. The conversion
  u_ours(x, t) = -v_sit(x, 1 - t) is folded into the weights.
- "meanflow": the JAX names of MeanFlow, paths below `params/`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dmf.checkpoints.convert import predictions
from dmf.checkpoints.convert.name_tables import (
    CONVOLUTION,
    PLAIN,
    TRANSPOSED,
    Constant,
    Layout,
    Naming,
    ParamSlice,
    Shape,
    Table,
    Tensors,
    strip_wrappers,
    to_params,
    to_tensors,
    with_given,
)
from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.dit import SIZES, DiT, repa_depth
from dmf.models.layers import position_table
from dmf.types import Params

POSITIONS = "pos_embed"
# The split depth of the published DMF checkpoints with a log-variance head, by depth.
_PUBLISHED_SPLIT = {28: 20, 24: 18}
# Number of latents along a side in the published JAX checkpoints, which hold no position table.
_JAX_INPUT_SIZE = 32
# Largest input of a checkpoint without a position table, which is computed from it.
_MAX_INPUT_SIZE = 4096
_TIME_FEATURES = 256


def pytorch_table(model: DiT) -> Table:
    """The name table of the PyTorch checkpoints of SiT, SiT with REPA, and DMF."""
    side = model.input_size // model.patch_size
    positions = position_table(side, model.width)[None]
    return {POSITIONS: Constant(positions)} | _param_table(model)


def _param_table(model: DiT) -> dict[str, ParamSlice]:
    """The PyTorch names of all parameters."""
    table = _embedder_table(model)
    for i in range(model.depth):
        table |= _block_table(model, i)
    return table | _head_table(model)


def _linear(
    name: str, path: str, inputs: int, outputs: int, *index: int
) -> dict[str, ParamSlice]:
    """A Linear of PyTorch."""
    return {
        f"{name}.weight": ParamSlice(f"{path}/kernel", TRANSPOSED, (outputs, inputs), index),
        f"{name}.bias": ParamSlice(f"{path}/bias", PLAIN, (outputs,), index),
    }


def _embedder_table(model: DiT) -> dict[str, ParamSlice]:
    patch, channels, width = model.patch_size, model.channels, model.width
    table = {
        "x_embedder.proj.weight": ParamSlice(
            "patch_embedding/kernel", CONVOLUTION, (width, channels, patch, patch)
        ),
        "x_embedder.proj.bias": ParamSlice("patch_embedding/bias", PLAIN, (width,)),
        "y_embedder.embedding_table.weight": ParamSlice(
            "label_embedding/embedding", PLAIN, (model.num_classes + 1, width)
        ),
    }
    times = {"t_embedder": "time_embedding"}
    if model.conditioning == "meanflow":
        times["h_embedder"] = "interval_embedding"
    for name, path in times.items():
        table |= _linear(f"{name}.mlp.0", f"{path}/in", _TIME_FEATURES, width)
        table |= _linear(f"{name}.mlp.2", f"{path}/out", width, width)
    return table


def _block_table(model: DiT, i: int) -> dict[str, ParamSlice]:
    """The names of block i."""
    width, hidden, name = model.width, int(model.width * model.mlp_ratio), f"blocks.{i}"
    table = (
        _linear(f"{name}.attn.qkv", "blocks/attention/qkv", width, 3 * width, i)
        | _linear(f"{name}.attn.proj", "blocks/attention/out", width, width, i)
        | _linear(f"{name}.mlp.fc1", "blocks/mlp/in", width, hidden, i)
        | _linear(f"{name}.mlp.fc2", "blocks/mlp/out", hidden, width, i)
        | _linear(f"{name}.adaLN_modulation.1", "blocks/modulation/linear", width, 6 * width, i)
    )
    for norm in ("q_norm", "k_norm") if model.qk_norm else ():
        table[f"{name}.attn.{norm}.scale"] = ParamSlice(
            f"blocks/attention/{norm}/scale", PLAIN, (width // model.heads,), (i,)
        )
    return table


def _head_table(model: DiT) -> dict[str, ParamSlice]:
    """The names of the last layer, the log-variance head and the projector."""
    width = model.width
    outputs = model.patch_size**2 * model.channels
    table = _linear("final_layer.linear", "final/linear", width, outputs)
    table |= _linear("final_layer.adaLN_modulation.1", "final/modulation/linear", width, 2 * width)
    if model.learned_variance:
        table |= _linear("logvar_linear", "log_variance/linear", _TIME_FEATURES, 1)
    if model.alignment_depth:
        sizes = (width, model.alignment_hidden, model.alignment_hidden, model.alignment_width)
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            table |= _linear(f"projectors.0.{2 * i}", f"projector/linear_{i}", inputs, outputs)
    return table


def sit_table(model: DiT) -> Table:
    """As `pytorch_table`, with the sign and the time of SiT's first authors folded in.

    The unused output channels are zero in the tensors that are written with it.
    """
    table = dict(pytorch_table(model))
    time = table["t_embedder.mlp.0.weight"]
    table["t_embedder.mlp.0.weight"] = dataclasses.replace(time, layout=_REVERSED_TIME)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        entry = table[name]
        layout = _negated_half(entry.layout, model.channels)
        shape = (2 * entry.shape[0], *entry.shape[1:])
        table[name] = dataclasses.replace(entry, layout=layout, shape=shape)
    return table


def _reverse_time(weights: np.ndarray) -> np.ndarray:
    """Weights (out, 256) for the features of t, from those for the features of 1 - t; its own
    inverse.

    cos(w (1 - t)) = cos w cos wt + sin w sin wt and sin(w (1 - t)) = sin w cos wt - cos w sin wt.
    """
    half = weights.shape[1] // 2
    frequencies = 10000.0 ** (-np.arange(half) / half)
    for_cosine, for_sine = np.split(weights.astype(np.float64), 2, axis=1)
    cosine, sine = np.cos(frequencies), np.sin(frequencies)
    return np.concatenate(
        [for_cosine * cosine + for_sine * sine, for_cosine * sine - for_sine * cosine], axis=1
    ).astype(weights.dtype)


_REVERSED_TIME = Layout(
    lambda w, shape: TRANSPOSED.to_param(_reverse_time(w), shape),
    lambda w, shape: _reverse_time(TRANSPOSED.to_tensor(w, shape)),
)


def _negated_half(layout: Layout, channels: int) -> Layout:
    """The layout of a last layer that outputs 2 * channels a pixel, of which half is used."""

    def to_param(w: np.ndarray, shape: Shape) -> np.ndarray:
        used = -w.reshape(-1, 2, channels, *w.shape[1:])[:, 0]
        return layout.to_param(used.reshape(-1, *w.shape[1:]), shape)

    def to_tensor(w: np.ndarray, shape: Shape) -> np.ndarray:
        used = -layout.to_tensor(w, (shape[0] // 2, *shape[1:]))
        pixels = used.reshape(-1, channels, *shape[1:])
        return np.stack([pixels, np.zeros_like(pixels)], axis=1).reshape(shape)

    return Layout(to_param, to_tensor)


_JAX_NAMES = {
    "x_embedder.proj.weight": "net/x_embedder/proj/kernel",
    "x_embedder.proj.bias": "net/x_embedder/proj/bias",
    "y_embedder.embedding_table.weight":
        "net/y_embedder/embedding_table/_flax_embedding/embedding",
}


def jax_table(model: DiT) -> Table:
    """The name table of the JAX checkpoints of MeanFlow, paths below `params/`."""
    return {_jax_name(name): _jax_slice(entry) for name, entry in _param_table(model).items()}


def _jax_name(name: str) -> str:
    """blocks.0.mlp.fc1.weight -> net/blocks/layers_0/mlp/fc1/_flax_linear/kernel."""
    if name in _JAX_NAMES:
        return _JAX_NAMES[name]
    *parts, leaf = name.split(".")
    parts = [f"layers_{part}" if part.isdecimal() else part for part in parts]
    return "/".join(["net", *parts, "_flax_linear", "kernel" if leaf == "weight" else leaf])


def _jax_slice(entry: ParamSlice) -> ParamSlice:
    """The slice of a tensor of JAX, whose axes are in the order of ours."""
    shape = entry.shape
    if entry.layout is CONVOLUTION:
        outputs, inputs, rows, columns = shape
        shape = (rows, columns, inputs, outputs)
    elif entry.layout is TRANSPOSED:
        shape = shape[::-1]
    return dataclasses.replace(entry, layout=PLAIN, shape=shape)


def infer_pytorch_network(shapes: Mapping[str, Shape], fields: Mapping[str, Any]) -> DiT:
    """The network of a PyTorch checkpoint.

    The shapes do not tell the number of heads (known for the published sizes, and with qk-norm),
    the split depth, and the depth of the projector.

    Args:
      shapes: shapes of the tensors by name.
      fields: fields of the network that the user gave.

    Raises:
      InputError: a field that the shapes do not tell was not given.
    """
    width, channels, _, patch = shapes["x_embedder.proj.weight"]
    told = _told_fields(shapes, fields, lambda name: name)
    told |= {"channels": channels, "patch_size": patch, "width": width}
    defaults = {}
    if POSITIONS in shapes:
        told["input_size"] = math.isqrt(shapes[POSITIONS][1]) * patch
    if "projectors.0.0.bias" in shapes:
        (hidden,), (outputs,) = shapes["projectors.0.0.bias"], shapes["projectors.0.4.bias"]
        told |= {"alignment_hidden": hidden, "alignment_width": outputs}
        defaults["alignment_depth"] = repa_depth(told["depth"])
    return _complete(told, fields, defaults)


def infer_jax_network(shapes: Mapping[str, Shape], fields: Mapping[str, Any]) -> DiT:
    """The network of a JAX checkpoint of MeanFlow, whose latents are 32 x 32 unless given.

    Args:
      shapes: shapes of the tensors by name.
      fields: fields of the network that the user gave.

    Raises:
      InputError: a field that the shapes do not tell was not given.
    """
    patch, _, channels, width = shapes[_jax_name("x_embedder.proj.weight")]
    told = _told_fields(shapes, fields, _jax_name)
    told |= {"channels": channels, "patch_size": patch, "width": width}
    return _complete(told, fields, {"input_size": _JAX_INPUT_SIZE})


def _told_fields(
    shapes: Mapping[str, Shape], fields: Mapping[str, Any], rename: Callable[[str], str]
) -> dict[str, Any]:
    """The fields that the shapes tell alike in both projects; `rename` takes a PyTorch name.

    Of the ratios with the width of the MLP, it is the one that is given, if it is one of them.
    """
    (width,) = shapes[rename("x_embedder.proj.bias")]
    (hidden,) = shapes[rename("blocks.0.mlp.fc1.bias")]
    ratio = float(fields.get("mlp_ratio", 0))
    told = {
        "depth": _count_blocks(shapes, rename),
        "mlp_ratio": ratio if int(width * ratio) == hidden else hidden / width,
        "num_classes": shapes[rename("y_embedder.embedding_table.weight")][0] - 1,
        "learned_variance": rename("logvar_linear.weight") in shapes,
    }
    if rename("h_embedder.mlp.0.bias") in shapes:
        told["conditioning"] = "meanflow"
    head_norm = shapes.get(rename("blocks.0.attn.q_norm.scale"))
    if head_norm:
        told |= {"qk_norm": True, "heads": width // head_norm[0]}
    return told


def _count_blocks(shapes: Mapping[str, Shape], rename: Callable[[str], str]) -> int:
    numbers = itertools.count()
    return next(i for i in numbers if rename(f"blocks.{i}.attn.qkv.bias") not in shapes)


def _complete(
    told: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> DiT:
    """The network of the known fields; what they leave open is as published.

    Args:
      told: fields that the shapes tell.
      given: fields that the user gave, or the file states.
      defaults: published fields that the shapes do not tell.

    Raises:
      InputError: a field is unknown, contradicts the tensors, or nothing tells it.
    """
    unknown = given.keys() - {field.name for field in dataclasses.fields(DiT)}
    if unknown:
        raise InputError(min(unknown), remedy="a diffusion transformer has no such field")
    fields = with_given(told, given, {"conditioning": "flow", **defaults})
    if "heads" not in fields:
        fields["heads"] = _published_heads(fields["depth"], fields["width"])
    if "input_size" not in fields:
        raise InputError(
            "input_size", remedy="the checkpoint has no pos_embed to tell it; give --input-size"
        )
    if not ("input_size" in told or 1 <= fields["input_size"] <= _MAX_INPUT_SIZE):
        raise InputError("input_size", fields["input_size"],
                         f"give a whole number from 1 to {_MAX_INPUT_SIZE}")
    if fields.get("split_depth") is None and fields.get("learned_variance"):
        fields["split_depth"] = _published_split(fields["depth"])
    if fields.get("split_depth") is not None:
        fields["conditioning"] = "decoupled"
    return DiT(**fields)


def _published_heads(depth: int, width: int) -> int:
    """The number of heads of the published size of this depth and width."""
    for size in SIZES.values():
        if (size["depth"], size["width"]) == (depth, width):
            return size["heads"]
    raise InputError("heads", remedy=f"no published size has {depth} blocks of width {width}; give "
                     "--num-heads")


def _published_split(depth: int) -> int:
    """The split depth of the published flow map of this depth."""
    if depth not in _PUBLISHED_SPLIT:
        raise InputError("split_depth", remedy="logvar_linear tells that this is a flow map; give "
                         f"--split-depth, from 0 to {depth}")
    return _PUBLISHED_SPLIT[depth]


_IDENTIFYING = ("x_embedder.proj.weight", "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.bias",
                "y_embedder.embedding_table.weight", "final_layer.linear.bias")  # fmt: skip
NAMINGS = (
    Naming(
        name="dmf",
        network=DiT,
        identifying_tensors=_IDENTIFYING,
        infer_network=infer_pytorch_network,
        table=pytorch_table,
        matches_shapes=lambda shapes: not predictions.has_unused_half(shapes),
        check=predictions.check_dmf,
        notes="taken to predict the velocity, from data at t = 0 to noise at t = 1",
    ),
    Naming(
        name="sit",
        network=DiT,
        identifying_tensors=_IDENTIFYING,
        infer_network=infer_pytorch_network,
        table=sit_table,
        matches_shapes=predictions.has_unused_half,
        check=predictions.check_sit,
        notes="time and sign folded into the weights; unused output channels dropped",
    ),
    Naming(
        name="meanflow",
        network=DiT,
        identifying_tensors=("net/x_embedder/proj/kernel",
                             "net/blocks/layers_0/mlp/fc1/_flax_linear/bias"),
        infer_network=infer_jax_network,
        table=jax_table,
    ),
)


def from_pytorch(model: DiT, tensors: Tensors) -> Params:
    """A PyTorch state dict as our parameters.

    Args:
      model: the network.
      tensors: arrays by name; prefixes of wrapping modules are allowed.

    Raises:
      InputError: a tensor is missing, unknown or of another shape.
    """
    return to_params(pytorch_table(model), strip_wrappers(tensors), _abstract(model))


def to_pytorch(model: DiT, params: Params) -> dict[str, np.ndarray]:
    """Our parameters as a PyTorch state dict of arrays, including the fixed position table."""
    return to_tensors(pytorch_table(model), params)


def from_jax(model: DiT, tensors: Tensors) -> Params:
    """Parameters of the JAX MeanFlow release, flattened by "/", as ours."""
    return to_params(jax_table(model), tensors, _abstract(model))


def to_jax(model: DiT, params: Params) -> dict[str, np.ndarray]:
    """Our parameters under the names of the JAX MeanFlow release, flattened by "/"."""
    return to_tensors(jax_table(model), params)


def _abstract(model: DiT) -> Params:
    return abstract_params(model)
