"""Decoupled MeanFlow: turns a pretrained flow model into a flow map (arXiv:2510.24474).

The loss is (flow-matching loss + MeanFlow loss) / 2, each on the whole batch, with independent
noise and times and the same dropped labels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from dmf.objectives.compute_sharing import guided_velocities
from dmf.objectives.flow_matching import flow_matching_loss
from dmf.objectives.guided_objective import GuidedObjective
from dmf.objectives.loss_weighting import CauchyWeighting, Weighting
from dmf.objectives.mean_flow import guidance_flops, mean_flow_loss, tangent_flops
from dmf.objectives.objective import Sum, Term
from dmf.objectives.path_sample import (
    DecoupledDraws,
    Draws,
    draw_guidance,
    draw_label_dropout,
    draw_noise,
    path_sample,
)
from dmf.objectives.tangent import Tangent
from dmf.objectives.time_samplers import LogitNormal, OrderedPair, TimePair, TimeSampler
from dmf.registry import component_field, runtime_field
from dmf.types import Batch, Metrics, Network, Params, PerSample, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoupledMeanFlow(GuidedObjective):
    """Turn a flow model into a flow map: half flow matching, half MeanFlow, each on the whole batch
    (arXiv:2510.24474).

    Attributes:
      time_sampler: distribution of t in the flow-matching loss.
      time_pair: distribution of (t, r) in the MeanFlow loss.
      guidance: guidance of the velocity in both losses: none, self, drawn, or a frozen teacher's.
      tangent: how du/dt is computed and bounded in the MeanFlow loss.
      label_dropout: probability in [0, 1] that the condition of a sample is dropped in both losses.
      teacher: the network of `frozen_params["teacher"]`, where the guidance is a teacher's.
    """

    time_sampler: TimeSampler = component_field("time_sampler", LogitNormal())
    time_pair: TimePair = component_field("time_pair", OrderedPair(
        first=LogitNormal(mean=0.4), second=LogitNormal(mean=-1.2)
    ))
    tangent: Tangent = Tangent()
    weighting: Weighting = component_field("weighting", CauchyWeighting())
    teacher: Network | None = runtime_field()

    def __post_init__(self):
        super().__post_init__()

    @property
    def needs_teacher(self) -> bool:
        """Whether the guidance is that of a frozen teacher."""
        return self.guidance.uses_teacher

    def draw(self, key: PRNGKey, batch: Batch, step: jax.Array | None = None) -> DecoupledDraws:
        """Dropped labels, and noise and times of each loss, each from a key of its own."""
        keys = jax.random.split(key, 5)
        dropped = draw_label_dropout(keys[0], self.label_dropout, batch)
        t = self.time_sampler(keys[3], len(batch.x), self.interpolant)
        pair = self.time_pair(keys[4], len(batch.x), self.interpolant)
        drawn = draw_guidance(self.guidance, self.tangent, key, batch, step)
        return DecoupledDraws(
            flow_matching=Draws(draw_noise(keys[1], batch), t, t, dropped, *drawn),
            mean_flow=Draws(draw_noise(keys[2], batch), *pair, dropped, *drawn),
        )

    def terms(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: DecoupledDraws,
        frozen_params: Mapping[str, Params],
    ) -> Sum:
        """(flow-matching loss + MeanFlow loss) / 2, both regressing on guided velocities."""
        samples = [path_sample(self.interpolant, network, batch, each) for each in draws]
        guided = guided_velocities(self, network, params, samples, frozen_params)

        def flow_matching(params: Params, *inputs: Any) -> tuple[PerSample, Metrics]:
            losses, metrics = flow_matching_loss(self, network, params, *inputs)
            return losses, metrics | {"flow_matching_loss": losses}

        def mean_flow(params: Params, *inputs: Any) -> tuple[PerSample, Metrics]:
            losses, metrics = mean_flow_loss(self, network, params, *inputs)
            return losses, metrics | {"mean_flow_loss": losses}

        flow_matching_term = Sum([Term(flow_matching, (samples[0], guided[0]))])
        mean_flow_term = Sum([Term(mean_flow, (samples[1], guided[1]))])
        return (flow_matching_term + mean_flow_term) / 2

    def flops(self, network: Network) -> float:
        """Operations of the forward and backward passes of both losses (6 forward passes), of the
        tangent, and of the guidance of both."""
        if self.guidance.uses_teacher:
            source, conditional = self.teacher, (self.teacher.flops.forward,) * 2
        else:
            # The conditional velocity of the flow-matching loss is its prediction.
            source, conditional = network, (0.0, network.flops.decode)
        guidance = sum(guidance_flops(self.guidance, source, each) for each in conditional)
        return 6 * network.flops.forward + tangent_flops(self, network) + guidance
