"""SoFlow at 256 from scratch (arXiv:2512.15657): no derivative of the network.

    dmf train --config=configs/soflow.py:xl2 --workdir=runs/soflow_xl2

As published: MeanFlow's network, 1,200,000 steps in batches of 256, a quarter of each trained by
consistency, rho from 0.1 to 0.002, guidance of scale 3 that decays from t = 0.8 on, mixed with the
network's own velocity (kappa 0.75), and adaptive weights 1 / (m + 0.01) of the mean square m over
the 4,096 values of a latent. The scores are those of the published code, by ADM's evaluator. The
distributions of the times and the optimizer are MeanFlow's: we have not read the published ones.
XL/2 takes 13.35 of 59.33 GiB of each of 8 H100 without remat (`dmf compile
--config=configs/soflow.py:xl2 --topology=h100:8 --config.model.remat=none`). bfloat16 is our
choice; docs/performance.md says what it does to the difference that rho divides.
"""

import functools

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet, sized
from configs.rows import Row, chosen
from dmf.objectives import AdaptiveWeighting, SelfGuidance, SoFlow

# The published coefficients are 0.25 (1 + d(t) (3 - 1)), 0.75 and the rest, with d(0) = 1.
GUIDANCE = SelfGuidance(omega=0.75, kappa=0.75, decay_start=0.8)
WEIGHTING = AdaptiveWeighting(offset=0.01 * 32 * 32 * 4)

_row = functools.partial(Row, paper="arXiv:2512.15657")

ROWS = {
    "b4_80": _row(fid={1: "11.59", 2: "8.22"}, changes=sized("B", 4) | {"run.steps": 400_000}),
    "b2": _row(fid={1: 4.85, 2: 4.24}, changes=sized("B")),
    "m2": _row(fid={1: 3.73, 2: 3.42}, changes=sized("M")),
    "l2": _row(fid={1: "3.20", 2: "2.90"}, changes=sized("L")),
    "xl2": _row(fid={1: 2.96, 2: 2.66}),
}


def get_config(row: str = "xl2") -> ConfigDict:
    """The published network with two time embeddings, at its published length."""
    config = imagenet("XL")
    config.model.conditioning = "meanflow"
    config.objective = default.component(SoFlow(guidance=GUIDANCE, weighting=WEIGHTING))
    config.optimizer.clip_norm = 0.0
    config.run.steps = 1_200_000
    config.sampling.steps = (1, 2)
    config.evaluation.protocol = "adm"
    return chosen(config, ROWS, row)
