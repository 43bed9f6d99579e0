"""A diffusion transformer with a wide head in NumPy and float64, written from the formulas alone.

It has flow or decoupled conditioning, and none of the options of `dmf.models.dit.DiT`.
"""

import math
from typing import Any

import numpy as np


def linear(p: Any, x: np.ndarray) -> np.ndarray:
    """x W + b, with the axes of the outputs as one."""
    kernel = np.asarray(p["kernel"], np.float64)
    matrix = kernel.reshape(x.shape[-1], -1)
    return x @ matrix + np.asarray(p["bias"], np.float64).ravel()


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray) -> np.ndarray:
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)


def modulation(p: Any, c: np.ndarray, count: int) -> list[np.ndarray]:
    """`count` vectors of each vector of c, whose axes are samples and tokens."""
    return np.split(linear(p["linear"], silu(c)), count, axis=-1)


def attention(p: Any, x: np.ndarray, heads: int) -> np.ndarray:
    b, length, d = x.shape
    qkv = linear(p["qkv"], x).reshape(b, length, 3, heads, d // heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    logits = q @ k.swapaxes(-1, -2) / math.sqrt(d // heads)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    out = p["out"] | {"kernel": np.asarray(p["out"]["kernel"]).reshape(d, d)}
    return linear(out, mixed.swapaxes(1, 2).reshape(b, length, d))


def at(tree: Any, index: int) -> Any:
    """The parameters of one block of a stack."""
    if isinstance(tree, dict):
        return {name: at(part, index) for name, part in tree.items()}
    return np.asarray(tree)[index]


def block(p: Any, x: np.ndarray, c: np.ndarray, heads: int) -> np.ndarray:
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation(p["modulation"], c, 6)
    x = x + gate_1 * attention(p["attention"], layer_norm(x) * (1 + scale_1) + shift_1, heads)
    hidden = gelu(linear(p["mlp"]["in"], layer_norm(x) * (1 + scale_2) + shift_2))
    return x + gate_2 * linear(p["mlp"]["out"], hidden)


def time_embedding(p: Any, t: np.ndarray) -> np.ndarray:
    angles = t[:, None] * 10000.0 ** (-np.arange(128) / 128)
    features = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    return linear(p["out"], silu(linear(p["in"], features)))


def positions(side: int, width: int) -> np.ndarray:
    table = np.zeros((side, side, width))
    for i in range(width // 4):
        places = np.arange(side) / 10000 ** (i / (width / 4))
        quarter = width // 4
        table[:, :, i], table[:, :, quarter + i] = np.sin(places), np.cos(places)
        table[:, :, 2 * quarter + i] = np.sin(places)[:, None]
        table[:, :, 3 * quarter + i] = np.cos(places)[:, None]
    return table.reshape(side * side, width)


def velocity(
    model: Any, params: Any, x_t: np.ndarray, t: np.ndarray, r: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """u(x_t, t, r, y) of a model with patches of 1 x 1, whose first `split_depth` blocks see t."""
    side, head = model.input_size, model.wide_head
    labels = np.asarray(params["label_embedding"]["embedding"], np.float64)[y]
    early, late = (time_embedding(params["time_embedding"], time) + labels for time in (t, r))
    pixels = np.asarray(x_t, np.float64).reshape(len(x_t), side * side, model.channels)
    trunk = linear(params["patch_embedding"], pixels) + positions(side, model.width)
    for i in range(model.depth):
        c = early if i < model.split_depth else late
        trunk = block(at(params["blocks"], i), trunk, c[:, None], model.heads)
    wide = params["wide_head"]
    c = linear(wide["condition"], silu(trunk + late[:, None]))
    tokens = linear(wide["patch_embedding"], pixels) + positions(side, head.width)
    for i in range(head.depth):
        tokens = block(at(wide["blocks"], i), tokens, c, head.heads)
    shift, scale = modulation(params["final"]["modulation"], c, 2)
    out = linear(params["final"]["linear"], layer_norm(tokens) * (1 + scale) + shift)
    return out.reshape(x_t.shape)
