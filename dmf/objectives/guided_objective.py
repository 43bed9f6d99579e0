"""What all objectives share that train on a guided velocity."""

import dataclasses

from dmf.objectives.compute_sharing import ComputeSharing
from dmf.objectives.guidance import Guidance, SelfGuidance
from dmf.objectives.interpolants import LINEAR, Interpolant
from dmf.objectives.loss_weighting import AdaptiveWeighting, Weighting, is_learned
from dmf.objectives.objective import Objective
from dmf.objectives.path_sample import check_label_dropout
from dmf.objectives.time_bins import check_time_bins
from dmf.registry import component_field


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedObjective(Objective):
    """A flow map's objective with guidance of the velocity that it trains on.

    Attributes:
      interpolant: the path between data and noise.
      guidance: guidance of the velocity: none, self or drawn.
      label_dropout: probability in [0, 1] that the condition of a sample is dropped.
      weighting: from the squared error of a sample to its loss.
      compute_sharing: which computations are shared; it changes no value.
      time_bins: number of equal parts of [0, 1] for metrics of the errors by t and by (t, r); 0 for
        none.
    """

    interpolant: Interpolant = component_field("interpolant", LINEAR)
    guidance: Guidance = component_field("guidance", SelfGuidance())
    label_dropout: float = 0.1
    weighting: Weighting = component_field("weighting", AdaptiveWeighting())
    compute_sharing: ComputeSharing = ComputeSharing()
    time_bins: int = 0

    needs_r = True

    def __post_init__(self):
        check_label_dropout(self.label_dropout)
        check_time_bins(self.time_bins)

    @property
    def learned_variance(self) -> bool:
        """Whether the weighting needs the log-variance head."""
        return is_learned(self.weighting)

    @property
    def guidance_input(self) -> bool:
        """Whether the network takes the guidance, which is drawn in training, as an input."""
        return self.guidance.is_drawn
