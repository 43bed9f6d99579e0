"""MeanFlow at 256 from scratch (arXiv:2505.13447).

    dmf train --config=configs/meanflow.py:xl2 --workdir=runs/meanflow_xl2

Adam 1e-4 without a clip, batch 256, 25% of samples with r < t. The effective guidance scale is 2.5
for L/2 and XL/2, and 2 for the others. Latents of sd-vae-ft-mse.

XL/2 fits 16 TPU v5e, 8 A100 of 40 or 80 GB and 8 H100, the GPUs also with
`--config.model.remat=none`: 26.00 of 29.57 GiB (`dmf compile --config=configs/meanflow.py:xl2
--topology=a100-40gb:8 --config.model.remat=none`), and 25.98 of 59.33 on `h100:8`. The smaller
sizes have fewer parameters and activations.
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import STEPS_PER_EPOCH, imagenet, sized
from configs.rows import Row, chosen
from dmf.objectives import MeanFlow, SelfGuidance, Tangent

_row = functools.partial(Row, paper="arXiv:2505.13447")


def _guided(omega: float, kappa: float, interval: tuple[float, float]) -> dict[str, Any]:
    guidance = SelfGuidance(omega=omega, kappa=kappa, interval=interval)
    return {"objective.guidance": default.component(guidance)}


ROWS = {
    "b4": _row(fid={1: 11.35}, changes=sized("B", 4)),
    "b4_80": _row(fid={1: 19.15}, changes=sized("B", 4) | {"run.steps": 80 * STEPS_PER_EPOCH}),
    "b2": _row(fid={1: 6.17}, changes=sized("B")),
    "m2": _row(fid={1: 5.01}, changes=sized("M")),
    "l2": _row(fid={1: 3.84}, changes=sized("L") | _guided(0.2, 0.92, (0.0, 0.8))),
    "xl2": _row(fid={1: 3.43, 2: 2.93}, changes=_guided(0.2, 0.92, (0.0, 0.75))),
    "xl2_predicted_tangent": _row(
        fid={1: 2.99},
        paper="arXiv:2512.02012",
        changes={
            **_guided(0.2, 0.92, (0.0, 0.75)),
            "objective.tangent": default.component(Tangent(velocity="predicted")),
        },
        note="the loss of improved MeanFlow alone",
    ),
    "xl2_plus": _row(
        fid={2: "2.20"},
        changes={"run.steps": 1000 * STEPS_PER_EPOCH, **_guided(1.0, 0.5, (0.3, 0.8))},
    ),
}


def meanflow(size: str, patch_size: int = 2) -> ConfigDict:
    """MeanFlow for 240 epochs without guidance, evaluated like its paper."""
    config = imagenet(size, patch_size)
    config.model.conditioning = "meanflow"
    config.objective = default.component(MeanFlow())
    config.optimizer.clip_norm = 0.0
    config.run.steps = 240 * STEPS_PER_EPOCH
    config.sampling.steps = (1, 2)
    config.evaluation.protocol = "meanflow"
    return config


def get_config(row: str = "xl2") -> ConfigDict:
    """The published network with two time embeddings, at its published length."""
    config = meanflow("XL")
    config.objective.guidance = default.component(SelfGuidance(omega=1.0, kappa=0.5))
    return chosen(config, ROWS, row)
