"""Terminal velocity matching: the velocity at the end of a jump (arXiv:2511.19797).

A jump from x_t lands at x_r = x_t - (t - r) u(x_t, t, r). As its end r moves, x_r must move with
the velocity of the flow there:

    dx_r/dr = u - (t - r) du/dr = u(x_r, r, r).

du/dr is the derivative of u(x_t, t, r) by r alone. MeanFlow moves the start of the jump and
differentiates along (v_t, 1, 0); here no velocity enters the derivative, and the gradient goes
through it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmf.objectives.compute_sharing import guided_velocities
from dmf.objectives.flow_matching import flow_matching_loss
from dmf.objectives.guidance import check_guides_itself
from dmf.objectives.guided_objective import GuidedObjective
from dmf.objectives.interpolants import per_sample
from dmf.objectives.loss_weighting import UniformWeighting, Weighting
from dmf.objectives.mean_flow import guidance_flops
from dmf.objectives.objective import (
    Sum,
    Term,
    target_params,
)
from dmf.objectives.path_sample import (
    Draws,
    FlowMapDraws,
    PathSample,
    draw_guidance,
    draw_label_dropout,
    draw_noise,
    path_sample,
)
from dmf.objectives.tangent import Tangent, root_mean_square
from dmf.objectives.time_samplers import GapPair, LogitNormal, TimePair, TimeSampler
from dmf.objectives.weighted_error import weighted_error
from dmf.registry import component_field
from dmf.types import Batch, Images, Metrics, Network, Params, PerSample, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class TerminalVelocityMatching(GuidedObjective):
    """Train a flow map from scratch: flow matching, and the velocity at the end of jumps (terminal
    velocity matching, arXiv:2511.19797).

    Attributes:
      time_sampler: distribution of t in flow matching.
      time_pair: distribution of the start t and the end r of a jump.
      guidance: guidance of the velocity in flow matching: none, self or drawn; the published one is
        self with omega = 2 at 256 x 256. Jumps follow it.
      target_ema: name of the EMA in `config.emas` whose velocity is the target and guides, with
        decay 0.99 as published; "" for the network's own velocity, without gradient, by which the
        paper's FID at one step rises from 4.90 to 10.24.
      differentiate_tangent: whether the gradient goes through du/dr. False is cheaper and biased
        ("detach JVP" in the paper), and is what flash attention allows.
    """

    time_sampler: TimeSampler = component_field("time_sampler", LogitNormal(mean=-0.4))
    time_pair: TimePair = component_field("time_pair", GapPair())
    target_ema: str = ""
    differentiate_tangent: bool = True
    weighting: Weighting = component_field("weighting", UniformWeighting())

    def __post_init__(self):
        super().__post_init__()
        check_guides_itself("TerminalVelocityMatching", self.guidance)

    def draw(self, key: PRNGKey, batch: Batch, step: jax.Array | None = None) -> FlowMapDraws:
        """Noise and dropped labels of both losses, a time of flow matching, (t, r) of a jump."""
        noise_key, time_key, pair_key, label_key = jax.random.split(key, 4)
        t = self.time_sampler(time_key, len(batch.x), self.interpolant)
        pair = self.time_pair(pair_key, len(batch.x), self.interpolant)
        noise = draw_noise(noise_key, batch)
        dropped = draw_label_dropout(label_key, self.label_dropout, batch)
        drawn = draw_guidance(self.guidance, Tangent(), key, batch, step)
        return FlowMapDraws(
            flow_matching=Draws(noise, t, t, dropped, *drawn),
            flow_map=Draws(noise, *pair, dropped, *drawn),
        )

    def terms(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: FlowMapDraws,
        frozen_params: Mapping[str, Params],
    ) -> Sum:
        """The flow-matching loss plus that of the terminal velocity (equation 12)."""
        samples = [path_sample(self.interpolant, network, batch, each) for each in draws]
        guided = guided_velocities(
            self, network, target_params(self, params, frozen_params), samples[:1],
            trained=not self.target_ema,
        )  # fmt: skip

        def flow_matching(params: Params, *inputs: Any) -> tuple[PerSample, Metrics]:
            return flow_matching_loss(self, network, params, *inputs)

        def terminal(params: Params, sample: PathSample) -> tuple[PerSample, Metrics]:
            fixed = target_params(self, params, frozen_params)
            return terminal_velocity_loss(self, network, params, fixed, sample)

        return Sum([Term(flow_matching, (samples[0], *guided)), Term(terminal, (samples[1],))])

    def flops(self, network: Network) -> float:
        """Operations of a sample: the forward and backward passes of both losses (6 forward
        passes), du/dr of the part of the network that sees r, its backward pass, the target, and
        the guidance, whose conditional velocity is the prediction unless an EMA guides."""
        tangent = (3 if self.differentiate_tangent else 1) * network.flops.decode
        conditional = network.flops.forward if self.target_ema else 0.0
        guidance = guidance_flops(self.guidance, network, conditional)
        return 7 * network.flops.forward + tangent + guidance


def terminal_velocity_loss(
    objective: TerminalVelocityMatching,
    network: Network,
    params: Params,
    fixed: Params,
    sample: PathSample,
) -> tuple[PerSample, Metrics]:
    """The weighted squared error |u - (t - r) du/dr - sg(u(x_r, r, r))|^2; 0 where r = t.

    Args:
      objective: its `differentiate_tangent`, `weighting` and `time_bins`.
      network, params: the flow map u.
      fixed: the parameters of the velocity u(x_r, r, r), without gradient.
      sample: where jumps start and end.

    Returns:
      [b] losses, and metrics of each sample.
    """
    t, r = sample.t, sample.r
    velocity, target, du_dr = terminal_velocities(objective, network, params, fixed, sample)
    losses, metrics = weighted_error(
        objective, network, params, "terminal_velocity", velocity, target, (t, r)
    )
    error = metrics["terminal_velocity_error"]
    metrics |= {"terminal_velocity_error": jnp.where(r < t, error, 0.0),
                "du_dr_norm": root_mean_square(jax.lax.stop_gradient(du_dr))}
    return jnp.where(r < t, losses, 0.0), metrics


def terminal_velocities(
    objective: TerminalVelocityMatching,
    network: Network,
    params: Params,
    fixed: Params,
    sample: PathSample,
) -> tuple[Images, Images, Images]:
    """u - (t - r) du/dr at a sample (equation 17), the velocity u(x_r, r, r) where the jump lands,
    without gradient, and du/dr. The encoder does not see r, so that it is not differentiated."""
    x_t, t, r, y = sample.x_t, sample.t, sample.r, sample.y
    hidden = network.encode(params, x_t, t, y)

    def flow_map(r: jax.Array) -> Images:
        return network.decode(params, hidden, r, y)

    u, du_dr = jax.jvp(flow_map, (r,), (jnp.ones_like(r),))
    if not objective.differentiate_tangent:
        du_dr = jax.lax.stop_gradient(du_dr)
    length = per_sample(t - r, u)
    x_r = x_t - length * jax.lax.stop_gradient(u)
    target = network.apply(fixed, x_r, r, r, y)
    return u - length * du_dr, jax.lax.stop_gradient(target), du_dr
