"""Frozen networks so small that a test can train with them, as `dmf convert` writes them."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from dmf.checkpoints import export, load
from dmf.models.abstract_params import abstract_params
from dmf.models.encoders.autoencoder_kl import AutoencoderKL
from dmf.models.encoders.dinov2 import DinoV2
from dmf.types import Params

DINOV2 = DinoV2(width=12, depth=2, heads=2, patch_size=2, mlp_ratio=2.0, table_side=3)
AUTOENCODER = AutoencoderKL(widths=(8, 8, 8), layers_per_block=1, groups=4)


def params(network: Any, scale: float = 0.3) -> Params:
    """Random parameters, drawn without compiling."""
    draw = np.random.default_rng(5)
    shapes = abstract_params(network)
    return jax.tree.map(lambda w: jnp.asarray(draw.normal(0, scale, w.shape), w.dtype), shapes)


@functools.cache
def exported(network: Any) -> pathlib.Path:
    """A directory that holds the network with these parameters."""
    folder = tiny.SCRATCH / f"tiny_{type(network).__name__.lower()}"
    config = load.export_config(network, {})
    export.write(folder, export.Parts(network, config, params(network), "drawn"))
    return folder
