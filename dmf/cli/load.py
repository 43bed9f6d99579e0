"""`dmf.load`: the flow map of a run or an export with overrides of its config, for Python."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from dmf.cli import config_flag

if TYPE_CHECKING:
    import dmf.models.flow_map


def load(
    directory: str | os.PathLike,
    overrides: Mapping[str, Any] | None = None,
    *,
    ema: str = "main",
) -> "tuple[dmf.models.flow_map.NetworkFlowMap, ConfigDict]":
    """The flow map of a run or an export, ready to call, and its config.

    One step of sampling from noise (t = 1) to images (r = 0):

    >>> flow_map, config = dmf.load("runs/digits_sit")
    >>> noise = jax.random.normal(jax.random.key(0), (10, 8, 8, 1))
    >>> images = noise - flow_map(noise, 1.0, 0.0, range(10))  # [10, 8, 8, 1]

    A flow model can be loaded as a flow map, before any training:

    >>> fields = {"model.conditioning": "decoupled", "model.split_depth": 4}
    >>> dmf.load("runs/digits_sit", fields)[0].network.split_depth
    4

    Args:
      directory: a workdir, whose newest checkpoint is loaded, one of its checkpoints/STEP, an
        export, or hf:OWNER/REPO or hf:OWNER/REPO@REVISION for an export on the Hugging Face hub.
      overrides: values by dotted field of the config, as --config.FIELD=VALUE of `dmf sample`.
      ema: EMA parameters of a run, also std=WIDTH (from power EMAs); empty for the raw parameters.

    Returns:
      The flow map u(x_t, t, r, y) -> [b, h, w, c] without guidance, which has its `network` and
      `params` and is a pytree, to be passed to jitted functions; and the config.

    Raises:
      InputError: there is no checkpoint, EMA or field; or the checkpoint has another architecture.
      RunError: the checkpoint is damaged.
    """
    from dmf.checkpoints import load, located
    located.look_again()
    config, given = None, config_flag.as_flags(overrides)
    if given:
        config = config_flag.overridden_stored(load.read_config(directory), given)
    return load.load(directory, ema=ema, config=config)
