"""The ablations of DMF-L/2 at 256 (arXiv:2510.24474), and MeanFlow from the same start.

    dmf train --config=configs/dmf_l2.py:guided --workdir=runs/dmf_l2_guided

Training starts from SiT-L/2 of 400 k steps, for `*_repa` from one with representation alignment.
`guided` and `*_repa` have model guidance 0.6 on [0, 0.7], like the published XL run. Assumptions
that are not published: 400 k steps of fine-tuning, and for the rows of MeanFlow the settings of its
own paper with the same guidance.

XL/2 fits 8 A100 of 40 GB with `--config.model.remat=none` (dmf_xl2_256.py, meanflow.py); L/2 has
fewer parameters and activations, and was not compiled.
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet
from configs.rows import Row, chosen
from dmf.objectives import DecoupledMeanFlow, MeanFlow, SelfGuidance

_row = functools.partial(Row, paper="arXiv:2510.24474")
_GUIDANCE = SelfGuidance(kappa=0.6, interval=(0.0, 0.7))
_GUIDED = {"objective": default.component(DecoupledMeanFlow(guidance=_GUIDANCE))}
_REPA = {"init.checkpoint": "runs/sit_l2_repa"}


def _meanflow(guidance=SelfGuidance()) -> dict[str, Any]:
    return {
        "model.conditioning": "meanflow",
        "model.split_depth": None,
        "model.learned_variance": False,
        "objective": default.component(MeanFlow(guidance=guidance)),
    }


ROWS = {
    "base": _row(quoted={1: 19.3, 2: 17.3}),
    "guided": _row(quoted={1: 4.53, 2: 3.58}, changes=_GUIDED),
    "guided_repa": _row(quoted={1: "3.10", 2: 2.51}, changes=_GUIDED | _REPA),
    "meanflow": _row(quoted={1: 20.6, 2: 18.1}, changes=_meanflow()),
    "meanflow_guided": _row(quoted={1: 5.27, 2: 4.09}, changes=_meanflow(_GUIDANCE)),
    "meanflow_guided_repa": _row(
        quoted={1: 3.65, 2: 2.63}, changes=_meanflow(_GUIDANCE) | _REPA
    ),
    "split=16": _row(changes={"model.split_depth": 16}, note="close to base (second-hand)"),
    "split=18": _row(quoted={1: 19.3, 2: 17.3}, note="base"),
    "split=20": _row(changes={"model.split_depth": 20}, note="close to base (second-hand)"),
    "decoder_only": _row(
        changes={"freeze": ("encoder",), "sampling.steps": (1, 2, 8)},
        note="good at 8 steps and poor at 1 (second-hand)",
    ),
}


def get_config(row: str = "base") -> ConfigDict:
    """The flow model's network, whose last 6 of 24 blocks are conditioned on r; no guidance."""
    config = imagenet("L")
    config.init.checkpoint = "runs/sit_l2"
    config.model.conditioning = "decoupled"
    config.model.split_depth = 18
    config.model.learned_variance = True
    config.objective = default.component(DecoupledMeanFlow())
    config.run.steps = 400_000
    config.sampling.steps = (1, 2)
    return chosen(config, ROWS, row)
