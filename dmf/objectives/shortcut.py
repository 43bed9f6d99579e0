"""Shortcut models: a step that lands where two steps of half its length land (arXiv:2410.12557).

Most of a batch trains the velocity by flow matching. The rest trains steps from t to r, whose
lengths are powers of two, by self-consistency: u(x_t, t, r) is regressed on the mean velocity of
two steps of half the length by the network itself. Long steps so learn from shorter ones.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmf.errors import InputError
from dmf.objectives.batch_parts import check_share, join_batch, split_batch
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
from dmf.objectives.tangent import Tangent
from dmf.objectives.time_samplers import TimeSampler, UniformTime
from dmf.objectives.weighted_error import weighted_error
from dmf.registry import component_field
from dmf.types import Batch, Images, Metrics, Network, Params, PerSample, PRNGKey, Times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortcut(GuidedObjective):
    """Train a flow map from scratch: flow matching, and steps of lengths 2/n, 4/n, ..., 1 that
    agree with two steps of half the length (shortcut models, arXiv:2410.12557).

    Of every few neighbouring rows of a batch some are trained by self-consistency and the others by
    flow matching, so that each loss is computed for its own rows alone.

    Attributes:
      time_sampler: distribution of t in flow matching; uniform as published.
      shortest_steps: n, a power of two: the number of the shortest steps from noise to data, 128 as
        published. Steps of length 1/n are the velocity's: the target of a step of 2/n has r = t.
      self_consistency_share: share in (0, 1) of the batch that is trained by self-consistency; a
        whole number of each microbatch.
      target_ema: name of the EMA in `config.emas` whose parameters take the two steps; "" for the
        network's own, without gradient.
      guidance: guidance of the velocity in flow matching: none, self or drawn. Self-consistency
        passes it on to longer steps.
    """

    time_sampler: TimeSampler = component_field("time_sampler", UniformTime())
    shortest_steps: int = 128
    self_consistency_share: float = 0.25
    target_ema: str = ""
    weighting: Weighting = component_field("weighting", UniformWeighting())

    def __post_init__(self):
        super().__post_init__()
        check_share("self_consistency_share", self.self_consistency_share)
        check_guides_itself("Shortcut", self.guidance)
        n = self.shortest_steps
        if not 2 <= n <= 2**16 or n & (n - 1):
            raise InputError("shortest_steps", n, f"give a power of two from 2 to {2**16}")

    def draw(self, key: PRNGKey, batch: Batch, step: jax.Array | None = None) -> FlowMapDraws:
        """Noise and dropped labels, a time of flow matching, and a step, for every sample; the loss
        of a sample takes the time or the step."""
        noise_key, time_key, step_key, label_key = jax.random.split(key, 4)
        t = self.time_sampler(time_key, len(batch.x), self.interpolant)
        steps = draw_steps(step_key, len(batch.x), self.shortest_steps)
        noise = draw_noise(noise_key, batch)
        dropped = draw_label_dropout(label_key, self.label_dropout, batch)
        drawn = draw_guidance(self.guidance, Tangent(), key, batch, step)
        return FlowMapDraws(
            flow_matching=Draws(noise, t, t, dropped, *drawn),
            flow_map=Draws(noise, *steps, dropped, *drawn),
        )

    def terms(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: FlowMapDraws,
        frozen_params: Mapping[str, Params],
    ) -> Sum:
        """Flow matching of the one part of the batch, and self-consistency of the other, each with
        the weight of its share.

        Raises:
          InputError: the share of the samples is no whole number.
        """
        share = self.self_consistency_share
        parts = split_batch((batch, draws), share, "objective.self_consistency_share")
        (first, (times, _)), (second, (_, steps)) = parts
        samples = [path_sample(self.interpolant, network, *each)
                   for each in ((first, times), (second, steps))]
        guided = guided_velocities(self, network, params, samples[:1])

        def flow_matching(params: Params, *inputs: Any) -> tuple[PerSample, Metrics]:
            return flow_matching_loss(self, network, params, *inputs)

        def self_consistency(params: Params, sample: PathSample) -> tuple[PerSample, Metrics]:
            fixed = target_params(self, params, frozen_params)
            return self_consistency_loss(self, network, params, fixed, sample)

        return Sum([Term(flow_matching, (samples[0], *guided), 1 - share),
                    Term(self_consistency, (samples[1],), share)])

    def loss(self, *inputs: Any) -> tuple[PerSample, Metrics]:
        """[b] losses in the order of the rows; the metrics of each part have its number of rows."""
        _, params, *_ = inputs
        (first, metrics), (second, others) = (
            term.loss(params, *term.inputs) for term in self.terms(*inputs)
        )
        return join_batch(first, second), metrics | others

    def flops(self, network: Network) -> float:
        """Operations of a sample, by the shares of both losses: a forward and a backward pass (3
        forward passes), and the guidance in the one, or the two steps of the target in the other;
        the first of them starts from the encoder's output, unless an EMA takes it."""
        forward, share = network.flops.forward, self.self_consistency_share
        guidance = guidance_flops(self.guidance, network, 0.0)
        target = forward + (forward if self.target_ema else network.flops.decode)
        return 3 * forward + (1 - share) * guidance + share * target


def draw_steps(key: PRNGKey, count: int, shortest_steps: int) -> tuple[Times, Times]:
    """(t, r), each [count]: the length t - r is 1, 1/2, ..., 2 / shortest_steps with equal
    probability, and t a multiple of it.

    >>> t, r = draw_steps(jax.random.key(0), 100, shortest_steps=4)
    >>> sorted(set(zip(t.tolist(), r.tolist())))
    [(0.5, 0.0), (1.0, 0.0), (1.0, 0.5)]
    """
    length_key, place_key = jax.random.split(key)
    halvings = shortest_steps.bit_length() - 1
    number = 2 ** jax.random.randint(length_key, (count,), 0, halvings)
    place = jax.random.randint(place_key, (count,), 0, number)
    return (place + 1) / number, place / number


def self_consistency_loss(
    objective: Shortcut, network: Network, params: Params, fixed: Params, sample: PathSample
) -> tuple[PerSample, Metrics]:
    """The weighted squared error of u(x_t, t, r) against the mean velocity of two steps.

    Args:
      objective: its `weighting`, `compute_sharing`, `target_ema`, `shortest_steps` and `time_bins`.
      network, params: the flow map u.
      fixed: the parameters that take the two steps, without gradient.
      sample: where the steps start and end.

    Returns:
      [b] losses, and metrics of each sample.
    """
    t, r = sample.t, sample.r
    u, target = step_and_target(objective, network, params, fixed, sample)
    return weighted_error(objective, network, params, "self_consistency", u, target, (t, r))


def step_and_target(
    objective: Shortcut, network: Network, params: Params, fixed: Params, sample: PathSample
) -> tuple[Images, Images]:
    """u(x_t, t, r), and its target (u(x_t, t, s) + u(x_s, s, r)) / 2 without gradient, with
    s = (t + r) / 2 and x_s = x_t - (t - s) u(x_t, t, s). Both halves of the shortest step are
    velocities u(x_t, t, t)."""
    x_t, t, r, y = sample.x_t, sample.t, sample.r, sample.y
    s = (t + r) / 2
    shortest = t - r <= 2 / objective.shortest_steps
    first_end, second_end = jnp.where(shortest, t, s), jnp.where(shortest, s, r)
    if objective.compute_sharing.enabled and not objective.target_ema:
        hidden = network.encode(params, x_t, t, y)
        u = network.decode(params, hidden, r, y)
        first = network.decode(fixed, jax.lax.stop_gradient(hidden), first_end, y)
    else:
        u = network.apply(params, x_t, t, r, y)
        first = network.apply(fixed, x_t, t, first_end, y)
    x_s = x_t - per_sample(t - s, x_t) * jax.lax.stop_gradient(first)
    second = network.apply(fixed, x_s, s, second_end, y)
    return u, jax.lax.stop_gradient(first + second) / 2
