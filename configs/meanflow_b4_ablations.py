"""The ablations of MeanFlow-B/4 at 256: 80 epochs, one step (arXiv:2505.13447).

    dmf train --config=configs/meanflow_b4_ablations.py:p=0.5 \\
      --workdir=runs/meanflow_b4_ablations_p_0.5

Each row changes one setting of the first row: 25% of samples with r < t, the embedding of
(t, t - r), times from LN(-0.4, 1), p = 1, no guidance. `guidance` is the effective scale with kappa
0; `kappa` varies at scale 2.
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import STEPS_PER_EPOCH
from configs.meanflow import meanflow
from configs.rows import Row, chosen
from dmf.objectives import LogitNormal, OrderedPair, SelfGuidance, UniformTime
from dmf.objectives.time_samplers import TimeSampler

_row = functools.partial(Row, paper="arXiv:2505.13447")


def _distinct(share: float) -> dict[str, Any]:
    return {"objective.time_pair.equal_probability": 1 - share}


def _embedded(*times: str) -> dict[str, Any]:
    return {"model.embedded_times": times}


def _times(time: TimeSampler) -> dict[str, Any]:
    pair = OrderedPair(first=time, second=time, equal_probability=0.75)
    return {"objective.time_pair": default.component(pair)}


def _power(power: float) -> dict[str, Any]:
    return {"objective.weighting.power": power}


def _scale(scale: float, kappa: float = 0.0) -> dict[str, Any]:
    guidance = SelfGuidance(omega=scale * (1 - kappa), kappa=kappa)
    return {"objective.guidance": default.component(guidance)}


ROWS = {
    "base": _row(fid={1: 61.06}),
    "share=0": _row(fid={1: 328.91}, changes=_distinct(0.0), note="a flow model, in one step"),
    "share=25": _row(fid={1: 61.06}, changes=_distinct(0.25)),
    "share=50": _row(fid={1: 63.14}, changes=_distinct(0.5)),
    "share=100": _row(fid={1: 67.32}, changes=_distinct(1.0)),
    "tangent=v,1,0": _row(fid={1: 61.06}),
    "tangent=wrong": _row(
        note="the three other tangents with a 0 or a 1 misplaced gave 137 to 329",
        lacks="the tangent is that of the identity, and no other",
    ),
    "embedding=t,r": _row(fid={1: 61.75}, changes=_embedded("t", "r")),
    "embedding=t,t-r": _row(fid={1: 61.06}, changes=_embedded("t", "t-r")),
    "embedding=t,r,t-r": _row(fid={1: 63.98}, changes=_embedded("t", "r", "t-r")),
    "embedding=t-r": _row(fid={1: 63.13}, changes=_embedded("t-r")),
    "times=uniform": _row(fid={1: "65.90"}, changes=_times(UniformTime())),
    "times=-0.2,1": _row(fid={1: 63.83}, changes=_times(LogitNormal(mean=-0.2, std=1.0))),
    "times=-0.2,1.2": _row(fid={1: 64.72}, changes=_times(LogitNormal(mean=-0.2, std=1.2))),
    "times=-0.4,1": _row(fid={1: 61.06}, changes=_times(LogitNormal(mean=-0.4, std=1.0))),
    "times=-0.4,1.2": _row(fid={1: 61.79}, changes=_times(LogitNormal(mean=-0.4, std=1.2))),
    "p=0": _row(fid={1: 79.75}, changes=_power(0.0)),
    "p=0.5": _row(fid={1: 63.98}, changes=_power(0.5)),
    "p=1": _row(fid={1: 61.06}, changes=_power(1.0)),
    "p=1.5": _row(fid={1: 66.57}, changes=_power(1.5)),
    "p=2": _row(fid={1: 69.19}, changes=_power(2.0)),
    "guidance=1": _row(fid={1: 61.06}, changes=_scale(1.0)),
    "guidance=1.5": _row(fid={1: 33.33}, changes=_scale(1.5)),
    "guidance=2": _row(fid={1: 20.15}, changes=_scale(2.0)),
    "guidance=3": _row(fid={1: 15.53}, changes=_scale(3.0)),
    "guidance=5": _row(fid={1: 20.75}, changes=_scale(5.0)),
    "kappa=0": _row(fid={1: 20.15}, changes=_scale(2.0, 0.0)),
    "kappa=0.5": _row(fid={1: 19.15}, changes=_scale(2.0, 0.5)),
    "kappa=0.8": _row(fid={1: "19.10"}, changes=_scale(2.0, 0.8)),
    "kappa=0.9": _row(fid={1: 18.63}, changes=_scale(2.0, 0.9)),
    "kappa=0.95": _row(fid={1: 19.17}, changes=_scale(2.0, 0.95)),
    "epochs=240": _row(fid={1: 48.16}, changes={"run.steps": 240 * STEPS_PER_EPOCH}),
}


def get_config(row: str = "base") -> ConfigDict:
    """MeanFlow-B/4 for 80 epochs without guidance, with the change of a row."""
    config = meanflow("B", patch_size=4)
    config.run.steps = 80 * STEPS_PER_EPOCH
    config.sampling.steps = (1,)
    return chosen(config, ROWS, row)
