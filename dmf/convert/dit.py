"""Names of the published diffusion transformers: SiT and DMF in PyTorch, MeanFlow in JAX.

- "dmf": the PyTorch names of DMF, of the SiT it starts from and of REPA's training.
- "sit": the same names as SiT's first authors write them, whose time runs from noise (0) to data
  (1) and whose last half of the output channels is not used. With
  u_ours(x, t) = -v_theirs(x, 1 - t) both fold into the weights.
- "meanflow": the JAX names of MeanFlow, paths below `params/`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dmf.convert.names import (
    CONVOLUTION,
    PLAIN,
    TRANSPOSED,
    Entry,
    Layout,
    Shape,
    Spelling,
    Table,
    Tensors,
    Unkept,
    to_ours,
    to_theirs,
    unwrapped,
)
from dmf.models.dit import SIZES, DiT
from dmf.models.layers import position_table
from dmf.typing import InputError, Params

POSITIONS = "pos_embed"
# Where DMF was published with a log-variance head, by depth.
_PUBLISHED_SPLIT = {28: 20, 24: 18}
_PUBLISHED_ALIGNMENT = 8
_JAX_SIDE = 32


def pytorch_table(model: DiT) -> Table:
    """Names of the PyTorch checkpoints of SiT, SiT+REPA and DMF."""
    side = model.input_size // model.patch_size
    positions = position_table(side, model.width)[None]
    return {POSITIONS: Unkept(positions)} | _learned(model)


def _learned(model: DiT) -> dict[str, Entry]:
    patch, channels, width = model.patch_size, model.channels, model.width
    table: dict[str, Entry] = {}

    def linear(name: str, path: str, inputs: int, outputs: int, *index: int) -> None:
        table[f"{name}.weight"] = Entry(f"{path}/kernel", TRANSPOSED, (outputs, inputs), index)
        table[f"{name}.bias"] = Entry(f"{path}/bias", PLAIN, (outputs,), index)

    def time(name: str, path: str) -> None:
        linear(f"{name}.mlp.0", f"{path}/in", 256, width)
        linear(f"{name}.mlp.2", f"{path}/out", width, width)

    table["x_embedder.proj.weight"] = Entry(
        "patch_embedding/kernel", CONVOLUTION, (width, channels, patch, patch)
    )
    table["x_embedder.proj.bias"] = Entry("patch_embedding/bias", PLAIN, (width,))
    time("t_embedder", "time_embedding")
    if model.conditioning == "meanflow":
        time("h_embedder", "interval_embedding")
    table["y_embedder.embedding_table.weight"] = Entry(
        "label_embedding/embedding", PLAIN, (model.num_classes + 1, width)
    )
    hidden = int(width * model.mlp_ratio)
    for i in range(model.depth):
        linear(f"blocks.{i}.attn.qkv", "blocks/attention/qkv", width, 3 * width, i)
        linear(f"blocks.{i}.attn.proj", "blocks/attention/out", width, width, i)
        linear(f"blocks.{i}.mlp.fc1", "blocks/mlp/in", width, hidden, i)
        linear(f"blocks.{i}.mlp.fc2", "blocks/mlp/out", hidden, width, i)
        linear(f"blocks.{i}.adaLN_modulation.1", "blocks/modulation/linear", width, 6 * width, i)
        for norm in ("q_norm", "k_norm") if model.qk_norm else ():
            table[f"blocks.{i}.attn.{norm}.scale"] = Entry(
                f"blocks/attention/{norm}/scale", PLAIN, (width // model.heads,), (i,)
            )
    linear("final_layer.linear", "final/linear", width, patch**2 * channels)
    linear("final_layer.adaLN_modulation.1", "final/modulation/linear", width, 2 * width)
    if model.learned_variance:
        linear("logvar_linear", "log_variance/linear", 256, 1)
    if model.alignment_depth:
        inner, outer = model.alignment_hidden, model.alignment_width
        for i, (a, b) in enumerate(((width, inner), (inner, inner), (inner, outer))):
            linear(f"projectors.0.{2 * i}", f"projector/linear_{i}", a, b)
    return table


def sit_table(model: DiT) -> Table:
    """As `pytorch_table`, with the sign and the time of SiT's first authors folded in.

    Back in their names, the output channels that are not used are zero.
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
    """Weights (out, 256) of the features of t, where these of 1 - t stand; its own inverse.

    cos(w (1 - t)) = cos w cos wt + sin w sin wt and sin(w (1 - t)) = sin w cos wt - cos w sin wt.
    """
    half = weights.shape[1] // 2
    frequencies = 10000.0 ** (-np.arange(half) / half)
    of_cosine, of_sine = weights[:, :half].astype(np.float64), weights[:, half:].astype(np.float64)
    cosine, sine = np.cos(frequencies), np.sin(frequencies)
    return np.concatenate(
        [of_cosine * cosine + of_sine * sine, of_cosine * sine - of_sine * cosine], axis=1
    ).astype(weights.dtype)


_REVERSED_TIME = Layout(
    lambda w, shape: TRANSPOSED.to_ours(_reverse_time(w), shape),
    lambda w, shape: _reverse_time(TRANSPOSED.to_theirs(w, shape)),
)


def _negated_half(layout: Layout, channels: int) -> Layout:
    """The first `channels` of each pixel's output, which are twice as many, negated."""

    def ours(w: np.ndarray, shape: Shape) -> np.ndarray:
        used = -w.reshape(-1, 2, channels, *w.shape[1:])[:, 0]
        return layout.to_ours(used.reshape(-1, *w.shape[1:]), shape)

    def theirs(w: np.ndarray, shape: Shape) -> np.ndarray:
        used = -layout.to_theirs(w, (shape[0] // 2, *shape[1:]))
        pixels = used.reshape(-1, channels, *shape[1:])
        return np.stack([pixels, np.zeros_like(pixels)], axis=1).reshape(shape)

    return Layout(ours, theirs)


def jax_table(model: DiT) -> Table:
    """Names of the published JAX checkpoints of MeanFlow, paths below `params/`."""
    special = {
        "x_embedder.proj.weight": "net/x_embedder/proj/kernel",
        "x_embedder.proj.bias": "net/x_embedder/proj/bias",
        "y_embedder.embedding_table.weight":
            "net/y_embedder/embedding_table/_flax_embedding/embedding",
    }
    renamed: dict[str, Entry] = {}
    for name, entry in _learned(model).items():
        shape = entry.shape
        if entry.layout is CONVOLUTION:
            out, channels, rows, columns = shape
            shape = (rows, columns, channels, out)
        elif entry.layout is TRANSPOSED:
            shape = shape[::-1]
        ours = dataclasses.replace(entry, layout=PLAIN, shape=shape)
        renamed[special.get(name) or _jax_name(name)] = ours
    return renamed


def _jax_name(name: str) -> str:
    """blocks.0.mlp.fc1.weight -> net/blocks/layers_0/mlp/fc1/_flax_linear/kernel."""
    *parts, leaf = name.split(".")
    parts = [f"layers_{part}" if part.isdigit() else part for part in parts]
    return "/".join(["net", *parts, "_flax_linear", "kernel" if leaf == "weight" else leaf])


def read_pytorch(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> DiT:
    """The network of a PyTorch checkpoint.

    Shapes do not say: the number of heads (known for the published sizes, and with qk-norm), the
    split depth, and the depth at which the projected tokens leave.

    Raises:
      InputError: something that the shapes do not say was not given.
    """
    width, channels, _, patch = shapes["x_embedder.proj.weight"]
    side = math.isqrt(shapes[POSITIONS][1]) if POSITIONS in shapes else None
    depth = _count(shapes, "blocks.{}.attn.qkv.bias")
    fields = {"input_size": side * patch} if side else {}
    return _dit(
        given,
        fields
        | {
            "channels": channels,
            "patch_size": patch,
            "depth": depth,
            "width": width,
            "mlp_ratio": shapes["blocks.0.mlp.fc1.bias"][0] / width,
            "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
            "conditioning": "meanflow" if "h_embedder.mlp.0.bias" in shapes else "flow",
            "learned_variance": "logvar_linear.weight" in shapes,
        },
        head_width=shapes.get("blocks.0.attn.q_norm.scale"),
        projector=[shapes[n][0] for n in ("projectors.0.0.bias", "projectors.0.4.bias")
                   if n in shapes],
    )


def read_jax(shapes: Mapping[str, Shape], given: Mapping[str, Any]) -> DiT:
    """The network of a JAX checkpoint of MeanFlow, whose latents are 32 x 32 unless given."""
    rows, _, channels, width = shapes["net/x_embedder/proj/kernel"]
    depth = _count(shapes, "net/blocks/layers_{}/attn/qkv/_flax_linear/bias")
    table = shapes["net/y_embedder/embedding_table/_flax_embedding/embedding"]
    fields = {
        "input_size": _JAX_SIDE,
        "channels": channels,
        "patch_size": rows,
        "depth": depth,
        "width": width,
        "mlp_ratio": shapes["net/blocks/layers_0/mlp/fc1/_flax_linear/bias"][0] / width,
        "num_classes": table[0] - 1,
        "conditioning": "meanflow" if _jax_name("h_embedder.mlp.0.bias") in shapes else "flow",
        "learned_variance": _jax_name("logvar_linear.weight") in shapes,
    }
    norm = _jax_name("blocks.0.attn.q_norm.scale")
    return _dit(given, fields, head_width=shapes.get(norm))


def _dit(
    given: Mapping[str, Any],
    read: Mapping[str, Any],
    head_width: Shape | None = None,
    projector: list[int] | None = None,
) -> DiT:
    """The network of what was read, completed by what was given and by what is published."""
    unknown = given.keys() - {field.name for field in dataclasses.fields(DiT)}
    if unknown:
        raise InputError(f"{min(unknown)}: a diffusion transformer has no such field")
    fields = {**read, **given}
    depth, width = fields["depth"], fields["width"]
    if head_width:
        fields.update(qk_norm=True, heads=width // head_width[0])
    if "heads" not in fields:
        known = [size["heads"] for size in SIZES.values()
                 if (size["depth"], size["width"]) == (depth, width)]
        if not known:
            raise InputError(f"heads=None: {depth} blocks of width {width} are of no published "
                             "size; give --num-heads")
        fields["heads"] = known[0]
    if "input_size" not in fields:
        raise InputError("input_size=None: the checkpoint has no pos_embed to tell it; give "
                         "--input-size")
    if projector:
        hidden, out = projector
        fields.update(alignment_hidden=hidden, alignment_width=out)
        fields.setdefault("alignment_depth", min(_PUBLISHED_ALIGNMENT, depth))
    if fields.get("split_depth") is None and fields.get("learned_variance"):
        if depth not in _PUBLISHED_SPLIT:
            raise InputError("split_depth=None: logvar_linear tells that this is a flow map; give "
                             f"--split-depth, from 0 to {depth}")
        fields["split_depth"] = _PUBLISHED_SPLIT[depth]
    if fields.get("split_depth") is not None:
        fields["conditioning"] = "decoupled"
    return DiT(**fields)


def _count(shapes: Mapping[str, Shape], name: str) -> int:
    """How many blocks there are, by the name of a tensor that each has."""
    count = 0
    while name.format(count) in shapes:
        count += 1
    return count


def _twice_the_channels(shapes: Mapping[str, Shape]) -> bool:
    _, channels, rows, columns = shapes["x_embedder.proj.weight"]
    return shapes["final_layer.linear.bias"][0] == 2 * channels * rows * columns


_MARKS = ("x_embedder.proj.weight", "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.bias",
          "y_embedder.embedding_table.weight", "final_layer.linear.bias")
SPELLINGS = (
    Spelling(
        name="dmf",
        marks=_MARKS,
        read=read_pytorch,
        table=pytorch_table,
        suits=lambda shapes: not _twice_the_channels(shapes),
    ),
    Spelling(
        name="sit",
        marks=_MARKS,
        read=read_pytorch,
        table=sit_table,
        suits=_twice_the_channels,
        notes="time and sign folded into the weights; unused output channels dropped",
    ),
    Spelling(
        name="meanflow",
        marks=("net/x_embedder/proj/kernel",),
        read=read_jax,
        table=jax_table,
    ),
)


def from_pytorch(model: DiT, tensors: Tensors) -> Params:
    """A PyTorch state dict (arrays by name, wrapper prefixes allowed) as our parameters.

    Raises:
      InputError: a tensor is missing, unknown or of another shape.
    """
    return to_ours(pytorch_table(model), unwrapped(tensors), _abstract(model))


def to_pytorch(model: DiT, params: Params) -> dict[str, np.ndarray]:
    """Our parameters as a PyTorch state dict of arrays, the fixed position table included."""
    return to_theirs(pytorch_table(model), params)


def from_jax(model: DiT, tensors: Tensors) -> Params:
    """Parameters of the JAX MeanFlow release, flattened by "/", as ours."""
    return to_ours(jax_table(model), tensors, _abstract(model))


def to_jax(model: DiT, params: Params) -> dict[str, np.ndarray]:
    """Our parameters under the names of the JAX MeanFlow release, flattened by "/"."""
    return to_theirs(jax_table(model), params)


def _abstract(model: DiT) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))
