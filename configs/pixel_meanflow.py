"""Pixel MeanFlow at 256 and 512 from scratch (arXiv:2601.22158): one step, without latents.

    dmf train --config=configs/pixel_meanflow.py:b16 --workdir=runs/pixel_meanflow_b16 \\
      --config.data.directory=DIR

DIR is a dataset of crops, which `dmf prepare` makes without `--autoencoder`. As published: 320
epochs in batches of 1,024, Muon at 1e-3 for all linear layers, three EMAs of half-lives of 500,
1,000 and 2,000 thousand images, balanced labels at evaluation. A tenth of the pairs of times is
uniform for H alone, as far as is known here. Each row's guidance is that of its score; which EMA
gave it is known for H alone (`sampling.ema`). bfloat16 is our choice; the flips, and that B and L
have no warm-up, are assumptions.

H/16 fits 256 TPU v5e and 64 TPU v6e with a batch of 1,024, and eight H100 with
`--config.gradient_accumulation=2` (docs/scaling.md).

The published runs add a perceptual loss (LPIPS and ConvNeXt-V2), which is not here: expect other
scores. Published code gives FID 3.11, 2.50 and 2.11 at 256, and 3.64, 2.73 and 2.37 at 512.
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from configs import default
from configs.improved_meanflow import STEPS_PER_EPOCH, guided, improved_meanflow
from configs.rows import Row, chosen
from dmf.models.in_context_dit import PIXEL_SIZES, InContextDiT
from dmf.objectives import (
    DrawnGuidance,
    ImprovedMeanFlow,
    LogitNormal,
    MixedPair,
    ScaledLinear,
)
from dmf.training import HalfLifeEma, Muon

EMAS = {f"half_life_{thousands}k": HalfLifeEma(images=1000.0 * thousands)
        for thousands in (500, 1000, 2000)}  # fmt: skip

_row = functools.partial(Row, paper="arXiv:2601.22158", note="published with a perceptual loss")


def _sized(size: str, resolution: int) -> dict[str, Any]:
    """The network of a size, with 16 x 16 patches and more."""
    fields = {**PIXEL_SIZES[size], "input_size": resolution, "patch_size": resolution // 16}
    name = {"data.name": f"imagenet_{resolution}"}
    return name | {f"model.{field}": value for field, value in fields.items()}


def _trained(
    mean: float, *, noise_scale: float = 1.0, power: float = 1.0, uniform: float = 0.0
) -> dict[str, Any]:
    """The times, the noise, and the density of the guidance scale in training."""
    objective = ImprovedMeanFlow(
        interpolant=ScaledLinear(noise_scale=noise_scale),
        time_pair=MixedPair(times=LogitNormal(mean=mean, std=0.8), uniform_probability=uniform),
        guidance=DrawnGuidance(kappa=None, power=power),
    )
    return {"objective": default.component(objective)}


ROWS = {
    "b16": _row(fid={1: 3.12}, changes={
        **_sized("B", 256), **_trained(0.8), **guided(8.5, (0.1, 0.7)),
    }),
    "l16": _row(fid={1: 2.52}, changes={
        **_sized("L", 256), **_trained(0.8, power=2.0), **guided(7.0, (0.2, 0.7)),
    }),
    "h16": _row(fid={1: 2.22}, changes={
        **_sized("H", 256), **_trained(0.0, noise_scale=2.0, uniform=0.1),
        **guided(7.0, (0.2, 0.6)),
    }),
    "b32": _row(fid={1: "3.70"}, changes={
        **_sized("B", 512), **_trained(0.8, noise_scale=2.0), **guided(6.5, (0.1, 0.7)),
    }),
    "l32": _row(fid={1: 2.75}, changes={
        **_sized("L", 512), **_trained(0.0, noise_scale=4.0), **guided(7.5, (0.2, 0.6)),
    }),
    "h32": _row(fid={1: 2.48}, changes={
        **_sized("H", 512), **_trained(0.0, noise_scale=4.0, uniform=0.1),
        **guided(5.5, (0.1, 0.6)), "sampling.ema": "half_life_500k",
    }),
}  # fmt: skip


def get_config(row: str = "b16") -> ConfigDict:
    """A network that predicts data, with positions in two dimensions."""
    network = InContextDiT(
        input_size=256, channels=3, patch_size=16, num_classes=1000, positions="rotary_2d",
        prediction="data", **PIXEL_SIZES["B"],
    )  # fmt: skip
    config = improved_meanflow(network, resolution=256)
    config.optimizer = default.component(Muon(matrices="all", clip_norm=0.0))
    config.emas = ConfigDict({name: default.component(ema) for name, ema in EMAS.items()})
    config.run.steps = 320 * STEPS_PER_EPOCH
    config.sampling.update(ema="half_life_1000k", steps=(1,))
    config.evaluation.emas = tuple(EMAS)
    return chosen(config, ROWS, row)
