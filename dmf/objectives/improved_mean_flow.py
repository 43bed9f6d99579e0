"""Improved MeanFlow: two heads, of which one guides the training of both (arXiv:2512.02012).

A network predicts the average velocity u(x_t, t, r, y) and, with a second head, the velocity
v(x_t, t, r, y). Both are regressed on one guided velocity v_g: v directly, and u through

    V_u = u + (t - r) sg(du/dt),    du/dt along (v_c, 1, 0),

a function of x_t alone. The velocity head guides: with V(scale, y) its output at r = t,

    v_g = v_t + (1 - 1 / scale) (v_c - v_u),    v_c = V(scale, y),    v_u = V(1, null).

Scale and interval of the guidance are drawn for each sample and are inputs of the network. Pixel
MeanFlow (arXiv:2601.22158) is the same loss for a network that predicts data.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dmf.errors import InputError
from dmf.objectives.compute_sharing import joined
from dmf.objectives.guidance import (
    DrawnGuidance,
    Guidance,
    guided_velocity,
    in_drawn_interval,
    unconditional_needed,
)
from dmf.objectives.interpolants import per_sample
from dmf.objectives.mean_flow import MeanFlow, identity_loss
from dmf.objectives.path_sample import Draws, PathSample, path_sample
from dmf.objectives.tangent import Tangent
from dmf.objectives.time_samplers import LogitNormal, OrderedPair, TimePair
from dmf.objectives.weighted_error import weighted_error
from dmf.registry import component_field
from dmf.types import (
    Batch,
    Condition,
    Dropped,
    GuidanceInput,
    GuidedCondition,
    Images,
    Metrics,
    Network,
    Params,
    PerSample,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlow(MeanFlow):
    """Train a flow map and a velocity head that guides it, from scratch: both regress on the guided
    velocity (improved MeanFlow, arXiv:2512.02012; pixel MeanFlow, arXiv:2601.22158).

    Attributes:
      guidance: guidance of the velocity that both heads regress on: drawn. kappa=None, the default,
        is the published one; where r = t, the interval is (0, 1).
      tangent: how du/dt is computed and bounded; its velocity is predicted, by the velocity head.
      weighting: from the squared error of a head to its loss: adaptive or uniform.
      time_bins: number of equal parts of [0, 1] for metrics of both errors by (t, r); 0 for none.
    """

    time_pair: TimePair = component_field("time_pair", OrderedPair(
        first=LogitNormal(mean=-0.4), second=LogitNormal(mean=-0.4), equal_probability=0.5
    ))
    guidance: Guidance = component_field("guidance", DrawnGuidance(kappa=None))
    tangent: Tangent = Tangent(velocity="predicted")

    velocity_head = True

    def __post_init__(self):
        super().__post_init__()
        if not self.guidance.is_drawn:
            raise InputError("guidance.name", type(self.guidance).__name__, "improved MeanFlow "
                             "draws the guidance of each sample; choose drawn")
        if not self.tangent.is_predicted:
            raise InputError("tangent.velocity", self.tangent.velocity, "improved MeanFlow "
                             "differentiates along its own velocity; choose predicted")
        if self.learned_variance:
            raise InputError("weighting.name", type(self.weighting).__name__, "improved MeanFlow "
                             "weights two errors and learns no variance; choose adaptive or "
                             "uniform")

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Draws,
        frozen_params: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]:
        """The weighted squared errors of V_u and of v against v_g, added.

        Raises:
          InputError: the network has no velocity head, or takes no guidance as an input.
        """
        del frozen_params
        if not network.guidance_input:
            raise InputError("model.guidance_input", False, "improved MeanFlow gives the network "
                             "its guidance as an input; set it to True")
        draws = draws._replace(guidance=_whole_where_equal(draws))
        sample = path_sample(self.interpolant, network, batch, draws)
        apart = sample.r < sample.t
        # Where r = t the velocity head is given what V(scale, y) is given: they are equal there.
        needed = apart if self.compute_sharing.enabled else jnp.ones_like(apart)
        v_c, v_u = guiding_velocities(
            self, network, params, sample, network.condition(batch.y), needed
        )
        u, v, du_dt = heads_and_tangent(self, network, params, sample, v_c)
        v_c = jnp.where(per_sample(needed, v), v_c, v)
        v_g = guided_velocity(
            self.guidance, sample.t, sample.dropped, sample.v_t, v_u, sample.guidance
        ).at(v_c)
        losses, metrics = identity_loss(self, network, params, sample, u, v_g, du_dt)
        others, errors = weighted_error(
            self, network, params, "velocity_head", v, v_g, (sample.t, sample.r)
        )
        return losses + others, metrics | errors

    def flops(self, network: Network) -> float:
        """Operations of a forward and a backward pass of both heads, of the tangent of u, and of
        the two velocities of the guidance."""
        one = network.flops.forward
        tangent = 2 * one if self.tangent.finite_difference else one
        return 3 * (one + network.flops.velocity_head) + tangent + 2 * one


def _whole_where_equal(draws: Draws) -> GuidanceInput:
    """The drawn guidance, with the interval (0, 1) where r = t."""
    apart, (scale, start, end) = draws.r < draws.t, draws.guidance
    return GuidanceInput(scale, jnp.where(apart, start, 0.0), jnp.where(apart, end, 1.0))


def guiding_velocities(
    objective: ImprovedMeanFlow,
    network: Network,
    params: Params,
    sample: PathSample,
    kept: Condition,
    needed: Dropped,
) -> list[Images]:
    """[v_c, v_u]: the velocity head at r = t, given the scale at t and the condition y, and given
    the scale 1 and the null condition; each in the interval (0, 1) and without gradient.

    Args:
      objective: its `guidance` and `compute_sharing`.
      network, params: the velocity head.
      sample: where the velocities are evaluated.
      kept: the condition y before label dropout, which the direction of du/dt keeps.
      needed: [b] bool, the rows of v_c that are needed; microbatches without one are not computed.
    """
    t, guidance = sample.t, sample.guidance
    ones = jnp.ones_like(t)
    scale = jnp.where(in_drawn_interval(t, guidance), guidance.scale, 1.0)
    inputs = [
        (sample.x_t, t, GuidedCondition(y, GuidanceInput(each, jnp.zeros_like(t), ones)))
        for y, each in ((kept, scale), (kept.null(), ones))
    ]
    null_needed = unconditional_needed(objective.guidance, t, sample.dropped, guidance)
    velocity = functools.partial(network.velocity, jax.lax.stop_gradient(params))
    microbatches = objective.compute_sharing.microbatches(2 * len(t))
    return joined(velocity, inputs, [needed, null_needed], microbatches)


def heads_and_tangent(
    objective: ImprovedMeanFlow, network: Network, params: Params, sample: PathSample, v_c: Images
) -> tuple[Images, Images, Images]:
    """(u, v, du/dt) at a sample, d/dt along (v_c, 1, 0). du/dt carries no gradient; where r = t it
    has no weight, and is 0."""
    t, r, tangent = sample.t, sample.r, objective.tangent

    def heads(x_t: Images, t: jax.Array, r: jax.Array) -> tuple[Images, Images]:
        return network.apply_heads(params, x_t, t, r, sample.y)

    def flow_map(x_t: Images, t: jax.Array, r: jax.Array) -> Images:
        return network.apply(params, x_t, t, r, sample.y)

    primals, tangents = (sample.x_t, t, r), (v_c, jnp.ones_like(t), jnp.zeros_like(r))
    if objective.compute_sharing.enabled and not tangent.finite_difference:
        u, du_dt, v = jax.jvp(heads, primals, tangents, has_aux=True)
    else:
        differentiate = tangent.central_difference if tangent.finite_difference else jax.jvp
        u, du_dt = differentiate(flow_map, primals, tangents)
        _, v = heads(*primals)
    return u, v, jax.lax.stop_gradient(jnp.where(per_sample(r < t, du_dt), du_dt, 0.0))
