"""Consistency training in continuous time (sCM, arXiv:2410.11081), for flow maps.

A consistency model f(x_t, t) = x_t - t u(x_t, t, 0, y) jumps to data. It is constant along a path:

    df/dt = v_t - u - t du/dt = 0,

with du/dt the derivative of u(x_t, t, 0) in the direction (v_t, 1, 0). Training follows the
gradient of -u . sg(df/dt), that is, u is regressed on u + df/dt = v_t - t du/dt: the target of
MeanFlow at r = 0. So consistency training is MeanFlow with r = 0, a warm-up of du/dt, and a
weighting by which the gradient of a sample is that of the normalized df/dt.
"""

import dataclasses

from dmf.errors import InputError
from dmf.objectives.guidance import Guidance, NoGuidance
from dmf.objectives.loss_weighting import NormalizedWeighting, Weighting
from dmf.objectives.mean_flow import MeanFlow
from dmf.objectives.time_samplers import TimePair, ToData
from dmf.registry import component_field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency(MeanFlow):
    """Train a consistency model from scratch: MeanFlow with r = 0 (consistency training in
    continuous time, arXiv:2410.11081). Sample it in one step, or with the sampler `restart`.

    Attributes:
      time_pair: distribution of t, with r = 0; `to_data`. With probability `equal_probability` a
        sample takes r = t instead, which trains the velocity.
      guidance: guidance of the velocity in target and tangent: none, self or drawn. The velocities
        that guide are the network's own, which `time_pair.equal_probability` trains.
      tangent: how du/dt is computed and bounded; `warmup_steps` is the warm-up of the paper.
      weighting: from the squared error of a sample to its loss; `normalized` is the tangent
        normalization of the paper.
    """

    time_pair: TimePair = component_field("time_pair", ToData())
    guidance: Guidance = component_field("guidance", NoGuidance())
    weighting: Weighting = component_field("weighting", NormalizedWeighting())

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.time_pair, ToData):
            raise InputError("time_pair.name", type(self.time_pair).__name__, "a consistency model "
                             "has r = 0; choose to_data, or the objective mean_flow")
        guides = self.guidance.needs_conditional or self.guidance.needs_unconditional
        if (guides or self.tangent.is_predicted) and not self.time_pair.equal_probability:
            raise InputError("time_pair.equal_probability", 0.0, "guidance, or a tangent along the "
                             "predicted velocity, needs u at r = t, which nothing trains; give the "
                             "share of samples that train it, such as 0.25")
