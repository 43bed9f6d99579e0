"""Names of the published diffusion transformers: SiT and DMF in PyTorch, MeanFlow in JAX."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from dmf.convert.names import PATCHES, PLAIN, TRANSPOSED, Entry, Table
from dmf.convert.names import to_ours as tensors_to_ours
from dmf.convert.names import to_theirs as tensors_to_theirs
from dmf.models.dit import DiT
from dmf.models.layers import position_table
from dmf.typing import InputError, Params

POSITIONS = "pos_embed"
_WRAPPERS = ("module.", "_orig_mod.")


def pytorch_table(model: DiT) -> Table:
    """Names of the PyTorch checkpoints of SiT, SiT+REPA and DMF, without the fixed `pos_embed`."""
    patch, channels, width = model.patch_size, model.channels, model.width
    table: dict[str, Entry] = {}

    def linear(
        name: str, path: str, inputs: int, outputs: int, block: int | None = None
    ) -> None:
        table[f"{name}.weight"] = Entry(f"{path}/kernel", TRANSPOSED, (outputs, inputs), block)
        table[f"{name}.bias"] = Entry(f"{path}/bias", PLAIN, (outputs,), block)

    def time(name: str, path: str) -> None:
        linear(f"{name}.mlp.0", f"{path}/in", 256, width)
        linear(f"{name}.mlp.2", f"{path}/out", width, width)

    table["x_embedder.proj.weight"] = Entry(
        "patch_embedding/kernel", PATCHES, (width, channels, patch, patch)
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
                f"blocks/attention/{norm}/scale", PLAIN, (width // model.heads,), i
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


def jax_table(model: DiT) -> Table:
    """Names of the published JAX checkpoints of MeanFlow, paths below `params/`."""
    special = {
        "x_embedder.proj.weight": "net/x_embedder/proj/kernel",
        "x_embedder.proj.bias": "net/x_embedder/proj/bias",
        "y_embedder.embedding_table.weight":
            "net/y_embedder/embedding_table/_flax_embedding/embedding",
    }
    renamed: dict[str, Entry] = {}
    for name, entry in pytorch_table(model).items():
        shape = entry.shape
        if entry.layout is PATCHES:
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


def from_pytorch(model: DiT, tensors: Mapping[str, np.ndarray]) -> Params:
    """A PyTorch state dict (arrays by name, wrapper prefixes allowed) as our parameters.

    Raises:
      InputError: a tensor is missing, unknown or of another shape.
    """
    kept = {_unwrapped(name): tensor for name, tensor in tensors.items()}
    if len(kept) < len(tensors):
        raise InputError(f"{len(tensors)} tensors have only {len(kept)} names without the wrappers "
                         f"{', '.join(_WRAPPERS)}")
    kept.pop(POSITIONS, None)
    return tensors_to_ours(pytorch_table(model), kept, _abstract(model))


def to_pytorch(model: DiT, params: Params) -> dict[str, np.ndarray]:
    """Our parameters as a PyTorch state dict of arrays, the fixed position table included."""
    side = model.input_size // model.patch_size
    positions = {POSITIONS: position_table(side, model.width)[None]}
    return positions | tensors_to_theirs(pytorch_table(model), params)


def from_jax(model: DiT, tensors: Mapping[str, np.ndarray]) -> Params:
    """Parameters of the JAX MeanFlow release, flattened by "/", as ours."""
    return tensors_to_ours(jax_table(model), tensors, _abstract(model))


def to_jax(model: DiT, params: Params) -> dict[str, np.ndarray]:
    """Our parameters under the names of the JAX MeanFlow release, flattened by "/"."""
    return tensors_to_theirs(jax_table(model), params)


def _abstract(model: DiT) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name
