"""MeanFlow: regression of the network on the MeanFlow identity (arXiv:2505.13447).

The average velocity u(x_t, t, r) and the velocity v_t satisfy u = v_t - (t - r) du/dt (equation 6).
du/dt is the total derivative along the path, v_t ∂u/∂x + ∂u/∂t (equation 8): the derivative of
u(x_t, t, r) in the direction (v_t, 1, 0), which `jax.jvp` computes together with u.
`mean_flow_loss` is algorithm 1: `average_velocity`, then `identity_loss`.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dmf.objectives.compute_sharing import guided_velocities, shared_encoder_jvp
from dmf.objectives.distances import mean_squared_error
from dmf.objectives.guidance import Guidance, GuidedVelocity, check_guides_itself
from dmf.objectives.guided_objective import GuidedObjective
from dmf.objectives.interpolants import per_sample
from dmf.objectives.objective import Objective
from dmf.objectives.path_sample import (
    Draws,
    PathSample,
    draw_guidance,
    draw_label_dropout,
    draw_noise,
    path_sample,
)
from dmf.objectives.tangent import Tangent, root_mean_square
from dmf.objectives.time_samplers import LogitNormal, OrderedPair, TimePair
from dmf.objectives.weighted_error import weighted_error
from dmf.registry import component_field
from dmf.types import Batch, Images, Metrics, Network, Params, PerSample, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlow(GuidedObjective):
    """Train a flow map from scratch: regress u(x_t, t, r, y) on the MeanFlow identity
    (arXiv:2505.13447).

    Attributes:
      time_pair: distribution of (t, r).
      guidance: guidance of the velocity in target and tangent: none, self or drawn.
      tangent: how du/dt is computed and bounded.
      time_bins: number of equal parts of [0, 1] for metrics of the error by (t, r); 0 for none.
    """

    time_pair: TimePair = component_field("time_pair", OrderedPair(
        first=LogitNormal(mean=-0.4), second=LogitNormal(mean=-0.4), equal_probability=0.75
    ))
    tangent: Tangent = Tangent()

    def __post_init__(self):
        super().__post_init__()
        check_guides_itself(type(self).__name__, self.guidance)

    def draw(self, key: PRNGKey, batch: Batch, step: jax.Array | None = None) -> Draws:
        """Noise, (t, r) and dropped labels, each from a key of its own."""
        noise_key, time_key, label_key = jax.random.split(key, 3)
        t, r = self.time_pair(time_key, len(batch.x), self.interpolant)
        dropped = draw_label_dropout(label_key, self.label_dropout, batch)
        drawn = draw_guidance(self.guidance, self.tangent, key, batch, step)
        return Draws(draw_noise(noise_key, batch), t, r, dropped, *drawn)

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Draws,
        frozen_params: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]:
        """The weighted squared error of u(x_t, t, r, y) against the MeanFlow identity."""
        del frozen_params
        sample = path_sample(self.interpolant, network, batch, draws)
        (guided,) = guided_velocities(self, network, params, [sample])
        return mean_flow_loss(self, network, params, sample, guided)

    def flops(self, network: Network) -> float:
        """Operations of a forward and a backward pass (3 forward passes), of the tangent, and of
        the guidance."""
        guidance = guidance_flops(self.guidance, network, network.flops.decode)
        return 3 * network.flops.forward + tangent_flops(self, network) + guidance


def mean_flow_loss(
    objective: Objective,
    network: Network,
    params: Params,
    sample: PathSample,
    guided: GuidedVelocity,
) -> tuple[PerSample, Metrics]:
    """The MeanFlow loss, |u - sg(v_g - (t - r) du/dt)|^2 weighted (equations 9 and 10).

    Args:
      objective: its `tangent`, `weighting`, `compute_sharing` and `time_bins`.
      network, params: the flow map u.
      sample: where u is evaluated.
      guided: v_g as a function of the conditional velocity; without guidance it is v_t.

    Returns:
      [b] losses, and metrics of each sample.
    """
    predicted = average_velocity(objective, network, params, sample, guided)
    return identity_loss(objective, network, params, sample, *predicted)


def identity_loss(
    objective: Objective,
    network: Network,
    params: Params,
    sample: PathSample,
    u: Images,
    v_g: Images,
    du_dt: Images,
) -> tuple[PerSample, Metrics]:
    """The MeanFlow loss of u, v_g and du/dt [b, h, w, c] at a sample; otherwise as for
    `mean_flow_loss`."""
    bounded = objective.tangent.bound(du_dt, sample.tangent_weight)
    target = v_g - per_sample(sample.t - sample.r, u) * bounded  # equation 6
    losses, metrics = target_loss(objective, network, params, sample, u, target)
    return losses, metrics | {"du_dt_norm": root_mean_square(jax.lax.stop_gradient(du_dt))}


def target_loss(
    objective: Objective,
    network: Network,
    params: Params,
    sample: PathSample,
    u: Images,
    target: Images,
) -> tuple[PerSample, Metrics]:
    """The weighted squared error of u against a target [b, h, w, c] without gradient; otherwise as
    for `mean_flow_loss`."""
    losses, metrics = weighted_error(objective, network, params, "mean_flow", u,
                                     jax.lax.stop_gradient(target), (sample.t, sample.r))
    return losses, metrics | {"velocity_error": mean_squared_error(u, sample.v_t)}


def average_velocity(
    objective: Objective,
    network: Network,
    params: Params,
    sample: PathSample,
    guided: GuidedVelocity,
) -> tuple[Images, Images, Images]:
    """(u, v_g, du/dt) at a sample; only u carries a gradient that is used.

    This is the formula as it stands. `compute_sharing` replaces it by `shared_encoder_jvp`, which
    gives the same numbers from fewer forward passes.
    """
    tangent = objective.tangent
    if objective.compute_sharing.shares_encoder(network, tangent):
        return shared_encoder_jvp(network, params, sample, guided, tangent)
    x_t, t, r, y = sample.x_t, sample.t, sample.r, sample.y
    conditional = None
    if guided.kappa is not None or tangent.is_predicted:
        conditional = network.apply(jax.lax.stop_gradient(params), x_t, t, t, y)
    v_g = guided.at(conditional)
    v = conditional if tangent.is_predicted else v_g

    def flow_map(x_t: Images, t: jax.Array, r: jax.Array) -> Images:
        return network.apply(params, x_t, t, r, y)

    primals, tangents = (x_t, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r))
    if tangent.finite_difference:
        u, du_dt = tangent.central_difference(flow_map, primals, tangents)
    else:
        u, du_dt = jax.jvp(flow_map, primals, tangents)  # equation 8
    return u, v_g, du_dt


def tangent_flops(objective: Objective, network: Network) -> float:
    """Operations of du/dt, and of the conditional velocity where only the tangent needs it."""
    passes = 2 if objective.tangent.finite_difference else 1
    guidance = objective.guidance
    known = guidance.needs_conditional and not guidance.uses_teacher
    conditional = network.flops.decode if objective.tangent.is_predicted and not known else 0.0
    return passes * network.flops.forward + conditional


def guidance_flops(guidance: Guidance, source: Network, conditional: float) -> float:
    """Operations of the velocities in v_g, of which the conditional one takes `conditional`."""
    return (guidance.needs_unconditional * source.flops.forward
            + guidance.needs_conditional * conditional)
