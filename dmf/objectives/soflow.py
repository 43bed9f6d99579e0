"""SoFlow: a flow map from scratch by consistency along a path, without a derivative of the network
(arXiv:2512.15657).

f(x, t, r) = x - (t - r) u(x, t, r) carries x from t to r. From x_t, one step along v_g leads to x_l
at l = t - rho (t - r), and f must end at the same point from there:

    q = (f(x_t, t, r) - sg f(x_l, l, r)) / (t - l) = v_g - u_l - (u - u_l) / rho,
    u = u(x_t, t, r),  u_l = sg u(x_l, l, r),

in which nothing is divided by a time, as (t - r) / (t - l) = 1 / rho. The gradient of the paper,
sign(r - t) <u, sg(q)> with r <= t, is that of half the squared error of u against sg(u + q):

    target = v_g - (1 / rho - 1) (u - u_l),

which is MeanFlow's v_g - (t - r) du/dt with a finite difference in place of the derivative. The
other part of the batch trains u(x_t, t, t) by flow matching.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmf.errors import InputError, check_between
from dmf.objectives.batch_parts import check_share, join_batch, split_batch
from dmf.objectives.compute_sharing import guided_velocities
from dmf.objectives.flow_matching import flow_matching_loss
from dmf.objectives.guidance import GuidedVelocity, check_guides_itself
from dmf.objectives.guided_objective import GuidedObjective
from dmf.objectives.interpolants import per_sample
from dmf.objectives.mean_flow import guidance_flops
from dmf.objectives.objective import Sum, Term
from dmf.objectives.path_sample import (
    Draws,
    PathSample,
    draw_guidance,
    draw_label_dropout,
    draw_noise,
    path_sample,
)
from dmf.objectives.tangent import Tangent
from dmf.objectives.time_samplers import LogitNormal, OrderedPair, TimePair, TimeSampler
from dmf.objectives.weighted_error import weighted_error
from dmf.registry import component_field
from dmf.types import Batch, Images, Metrics, Network, Params, PerSample, PRNGKey


class SoFlowDraws(NamedTuple):
    """The randomness of both losses of SoFlow, of which a sample takes one: the same noise and
    dropped labels, and times of their own.

    Attributes:
      flow_matching: of the flow-matching loss, r = t.
      consistency: of the consistency loss, r <= t.
      ratio: [b] rho in (0, 1], (t - l) / (t - r) at this training step.
    """

    flow_matching: Draws
    consistency: Draws
    ratio: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoFlow(GuidedObjective):
    """Train a flow map from scratch without a derivative of the network: flow matching on one part
    of the batch, and consistency of two points of a path on the other (arXiv:2512.15657).

    Of every few neighbouring rows of a batch some are trained by consistency and the others by flow
    matching, so that each loss is computed for its own rows alone.

    Attributes:
      time_sampler: distribution of t in flow matching.
      time_pair: distribution of (t, r) in the consistency loss.
      consistency_share: share in (0, 1) of the batch that is trained by consistency, a whole number
        of the samples of each microbatch; 0.25 as published.
      first_ratio: rho = (t - l) / (t - r) at the first training step, in (0, 1].
      last_ratio: rho at `last_step` and after it; in between, rho is exponential in the step.
      last_step: training step at which rho reaches `last_ratio`; 0 for the last one of the run.
      guidance: guidance of the velocity in both losses: none, self or drawn.
      weighting: from the squared error of a sample to its loss, for both losses.
    """

    time_sampler: TimeSampler = component_field("time_sampler", LogitNormal(mean=-0.4))
    time_pair: TimePair = component_field("time_pair", OrderedPair(
        first=LogitNormal(mean=-0.4), second=LogitNormal(mean=-0.4)
    ))
    consistency_share: float = 0.25
    first_ratio: float = 0.1
    last_ratio: float = 0.002
    last_step: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_share("consistency_share", self.consistency_share)
        check_guides_itself("SoFlow", self.guidance)
        # Below, float32 has nothing left of u - u_l.
        check_between(self, 1e-5, 1.0, "first_ratio", "last_ratio")
        check_between(self, 0, 10**9, "last_step")

    def for_run(self, steps: int) -> "SoFlow":
        """The objective of a run, in which the last step of the schedule is known.

        >>> SoFlow().for_run(600).last_step, SoFlow(last_step=500).for_run(600).last_step
        (600, 500)

        Args:
          steps: number of steps of the run.
        """
        return dataclasses.replace(self, last_step=self.last_step or steps)

    def ratio(self, step: jax.Array | int | None) -> jax.Array:
        """rho of a training step, a float32 scalar in (0, 1].

        >>> objective = SoFlow(first_ratio=0.1, last_ratio=0.001, last_step=10)
        >>> [round(float(objective.ratio(step)), 4) for step in (0, 5, 10, 20, None)]
        [0.1, 0.01, 0.001, 0.001, 0.001]

        Args:
          step: number of steps taken before this one; None stands for one after the schedule.

        Raises:
          InputError: the end of the schedule is not known; `for_run` gives it.
        """
        if step is None or self.first_ratio == self.last_ratio:
            return jnp.float32(self.last_ratio)
        if not self.last_step:
            raise InputError("last_step", 0, "give the training step at which rho reaches "
                             f"last_ratio={self.last_ratio}; a run gives its own last step")
        done = jnp.minimum(jnp.asarray(step, jnp.float32) / self.last_step, 1.0)
        return self.first_ratio * jnp.exp(done * math.log(self.last_ratio / self.first_ratio))

    def draw(self, key: PRNGKey, batch: Batch, step: jax.Array | None = None) -> SoFlowDraws:
        """Noise, dropped labels and times of both losses, each from a key of its own, and rho."""
        count, keys = len(batch.x), jax.random.split(key, 4)
        noise = draw_noise(keys[0], batch)
        dropped = draw_label_dropout(keys[1], self.label_dropout, batch)
        drawn = draw_guidance(self.guidance, Tangent(), key, batch, step)
        t = self.time_sampler(keys[2], count, self.interpolant)
        pair = self.time_pair(keys[3], count, self.interpolant)
        return SoFlowDraws(
            flow_matching=Draws(noise, t, t, dropped, *drawn),
            consistency=Draws(noise, *pair, dropped, *drawn),
            ratio=jnp.full(count, self.ratio(step)),
        )

    def terms(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: SoFlowDraws,
        frozen_params: Mapping[str, Params],
    ) -> Sum:
        """The flow-matching loss of one part of the batch and the consistency loss of the other,
        each with the weight of its share.

        Raises:
          InputError: the share of the samples is no whole number.
        """
        del frozen_params
        share = self.consistency_share
        parts = split_batch((batch, draws), share, "objective.consistency_share")
        (first, (draws_of_first, _, _)), (second, (_, draws_of_second, ratio)) = parts
        samples = [path_sample(self.interpolant, network, *each)
                   for each in ((first, draws_of_first), (second, draws_of_second))]
        # One after the other, as they differ in size.
        guided = [guided_velocities(self, network, params, [sample])[0] for sample in samples]

        def flow_matching(params: Params, *inputs: Any) -> tuple[PerSample, Metrics]:
            return flow_matching_loss(self, network, params, *inputs)

        def consistency(params: Params, *inputs: Any) -> tuple[PerSample, Metrics]:
            return consistency_loss(self, network, params, *inputs)

        return Sum([Term(flow_matching, (samples[0], guided[0]), 1 - share),
                    Term(consistency, (samples[1], guided[1], ratio), share)])

    def loss(self, network: Network, params: Params, *inputs: Any) -> tuple[PerSample, Metrics]:
        """[b] losses in the order of the rows; the metrics of each part have its number of rows."""
        (first, metrics), (second, others) = (
            term.loss(params, *term.inputs) for term in self.terms(network, params, *inputs)
        )
        return join_batch(first, second), metrics | others

    def flops(self, network: Network) -> float:
        """Operations of a sample, by the shares of both losses: a forward and a backward pass (3
        forward passes) and the guidance, and u_l in the consistency loss."""
        forward, share = network.flops.forward, self.consistency_share
        flow_matching = guidance_flops(self.guidance, network, 0.0)
        consistency = forward + guidance_flops(self.guidance, network, network.flops.decode)
        return 3 * forward + (1 - share) * flow_matching + share * consistency


def consistency_loss(
    objective: SoFlow,
    network: Network,
    params: Params,
    sample: PathSample,
    guided: GuidedVelocity,
    ratio: PerSample,
) -> tuple[PerSample, Metrics]:
    """The consistency loss of SoFlow: the weighted squared error |q|^2 of u against sg(u + q).

    Args:
      objective: its `weighting`, `compute_sharing` and `time_bins`.
      network, params: the flow map u.
      sample: where u is evaluated.
      guided: v_g as a function of the conditional velocity; without guidance it is v_t.
      ratio: [b] rho in (0, 1].

    Returns:
      [b] losses, and metrics of each sample: `consistency_error` is the mean of q^2.
    """
    t, r = sample.t, sample.r
    u, target = average_velocity_and_target(objective, network, params, sample, guided, ratio)
    losses, metrics = weighted_error(objective, network, params, "consistency", u, target, (t, r))
    return losses, metrics | {"consistency_ratio": ratio}


def average_velocity_and_target(
    objective: SoFlow,
    network: Network,
    params: Params,
    sample: PathSample,
    guided: GuidedVelocity,
    ratio: PerSample,
) -> tuple[Images, Images]:
    """u(x_t, t, r), and the target u + q = v_g - (1 / rho - 1) (u - u_l) without gradient."""
    t, r, fixed = sample.t, sample.r, jax.lax.stop_gradient(params)
    u, conditional = _two_velocities(objective, network, params, sample, guided)
    v_g = guided.at(conditional)
    span = ratio * (t - r)
    x_l = sample.x_t - per_sample(span, v_g) * v_g
    u_l = network.apply(fixed, x_l, t - span, r, sample.y)
    target = v_g - per_sample(1 / ratio - 1, u) * (u - u_l)
    return u, jax.lax.stop_gradient(target)


def _two_velocities(
    objective: SoFlow,
    network: Network,
    params: Params,
    sample: PathSample,
    guided: GuidedVelocity,
) -> tuple[Images, Images | None]:
    """u(x_t, t, r, y), and u(x_t, t, t, y) without gradient where the guidance needs it."""
    x_t, t, r, y = sample.x_t, sample.t, sample.r, sample.y
    if guided.kappa is None:
        return network.apply(params, x_t, t, r, y), None
    fixed = jax.lax.stop_gradient(params)
    if not objective.compute_sharing.enabled:
        return network.apply(params, x_t, t, r, y), network.apply(fixed, x_t, t, t, y)
    hidden = network.encode(params, x_t, t, y)
    conditional = network.decode(fixed, jax.lax.stop_gradient(hidden), t, y)
    return network.decode(params, hidden, r, y), conditional
