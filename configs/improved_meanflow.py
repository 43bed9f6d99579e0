"""Improved MeanFlow at 256 from scratch (arXiv:2512.02012): in-context conditioning and two heads.

    dmf train --config=configs/improved_meanflow.py:xl2 --workdir=runs/improved_meanflow_xl2

As published: 640 epochs in batches of 1,024, 10 of them of warm-up, Adam 1e-4 without a clip, EMA
0.9999, flips, latents of sd-vae-ft-mse normalised by channel, balanced labels at evaluation. The
scale and the interval of the guidance are drawn in training and are inputs of the network. Those of
a row's `sampling.guidance` gave its score at one step; the published ones were searched, as `dmf
evaluate` does with `--guidance` and `--interval`. bfloat16 is our choice. Published code gives FID
3.37, 2.27, 1.85 and 1.70 at one step, and 1.53 at two.

XL/2 fits 256 TPU v5e, 64 TPU v6e and eight H100 with a batch of 1,024 (docs/scaling.md).
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet
from configs.rows import Row, chosen
from dmf.models.in_context_dit import SIZES, InContextDiT
from dmf.objectives import ImprovedMeanFlow

BATCH_SIZE = 1024
STEPS_PER_EPOCH = 1251  # 1,281,167 images, 1,024 at a time; the rest of an epoch is dropped
# Of the latents of sd-vae-ft-mse, by channel.
LATENT_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
LATENT_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)

_row = functools.partial(Row, paper="arXiv:2512.02012")


def guided(scale: float, interval: tuple[float, float]) -> dict[str, Any]:
    """The guidance at sampling, for the `changes` of a row."""
    return {"sampling.guidance.scale": scale, "sampling.guidance.interval": interval}


def _sized(size: str) -> dict[str, Any]:
    return {f"model.{name}": value for name, value in SIZES[size].items()}


ROWS = {
    "b2": _row(fid={1: 3.39}, changes=_sized("B") | guided(8.0, (0.4, 0.65))),
    "m2": _row(fid={1: 2.27}, changes=_sized("M") | guided(10.5, (0.4, 0.6))),
    "l2": _row(fid={1: 1.86}, changes=_sized("L") | guided(10.5, (0.4, 0.6))),
    "xl2": _row(fid={1: 1.72, 2: 1.54}, changes=_sized("XL") | guided(8.0, (0.42, 0.62)),
                note="at two steps scale 4 in [0.36, 0.64]"),
}


def improved_meanflow(network: InContextDiT, resolution: int) -> ConfigDict:
    """What improved MeanFlow and pixel MeanFlow share.

    Args:
      network: the network; its dtype and remat are set here.
      resolution: height and width of the images.
    """
    config = imagenet("B", resolution=resolution)
    config.model = default.component(network)
    config.model.update(dtype="bfloat16", remat="dots")
    config.objective = default.component(ImprovedMeanFlow())
    config.data.update(batch_size=BATCH_SIZE, mirror=True)
    config.latents.scale = 1.0
    config.optimizer.clip_norm = 0.0
    config.sampling.steps = (1, 2)
    config.evaluation.update(protocol="meanflow", label_sampling="balanced")
    return config


def get_config(row: str = "xl2") -> ConfigDict:
    """The published network at its published length."""
    config = improved_meanflow(
        InContextDiT(input_size=32, channels=4, num_classes=1000, **SIZES["XL"]), resolution=256
    )
    config.latents.update(mean=LATENT_MEAN, std=LATENT_STD)
    config.optimizer.warmup_steps = 10 * STEPS_PER_EPOCH
    config.run.steps = 640 * STEPS_PER_EPOCH
    return chosen(config, ROWS, row)
