"""alpha-Flow: from flow matching along trajectories to MeanFlow (arXiv:2510.20771).

For 0 < alpha <= 1, a step along v_g leads from x_t to x_s = x_t - alpha (t - r) v_g at
s = t - alpha (t - r), and

    target = alpha v_g + (1 - alpha) u(x_s, s, r)

is the average velocity of this step and of the network's jump over the rest. alpha = 1 is
trajectory flow matching, whose target is v_g at every r; alpha = 1/2 is the loss of shortcut models
with v_g in the first half of a step. u differs from the target by alpha e with

    e = u - v_g + (1 / alpha - 1) (u - u(x_s, s, r)),

which tends to the error of the MeanFlow identity, u - v_g + (t - r) du/dt, as alpha -> 0. The loss
regresses u on sg(u - e), so that losses, gradients and weights have the scale of MeanFlow's for
every alpha. alpha = 0 is MeanFlow, with du/dt. Training starts at alpha = 1 and ends at alpha = 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmf.errors import InputError, check_between
from dmf.objectives.compute_sharing import guided_velocities
from dmf.objectives.guidance import GuidedVelocity
from dmf.objectives.interpolants import per_sample
from dmf.objectives.mean_flow import MeanFlow, guidance_flops, target_loss
from dmf.objectives.path_sample import Draws, PathSample, path_sample
from dmf.objectives.tangent import Tangent
from dmf.objectives.time_samplers import LogitNormal, OrderedPair, TimePair
from dmf.registry import component_field
from dmf.types import Batch, Images, Metrics, Network, Params, PerSample, PRNGKey

# Of the published schedule: the slope of the sigmoid, and the alpha that counts as 0.
_SLOPE, _CLAMP = 25.0, 0.005


class AlphaFlowDraws(NamedTuple):
    """The randomness of alpha-Flow.

    Attributes:
      mean_flow: as MeanFlow draws it.
      alpha: [b] in [0, 1], one number of this training step.
    """

    mean_flow: Draws
    alpha: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlphaFlow(MeanFlow):
    """Train a flow map from scratch: from flow matching along trajectories, alpha = 1, to MeanFlow,
    alpha = 0 (alpha-Flow, arXiv:2510.20771).

    One compiled program serves every alpha. alpha is a metric, and `mean_flow_error` the mean
    square of e, which at alpha = 0 is the error of the MeanFlow identity.

    Attributes:
      time_pair: distribution of (t, r); r = t for a quarter or half of the samples as published.
      constant_alpha: alpha in [0, 1] of every training step; None for the schedule, a sigmoid that
        falls from 1 to 0.
      first_step: training step until which alpha is 1.
      last_step: training step from which on alpha is 0; 0 for the last one of the run.
      clip: bound of the values of the target where r < t and alpha > 0; 4 is published for training
        with guidance, 0 for none. At alpha = 0 there is nothing to bound, as the target with a
        small alpha is close to u.
      tangent: how du/dt is computed and bounded at alpha = 0; `velocity` is also that of the step
        to x_s. A warm-up is for constant_alpha = 0: with the schedule, du/dt enters at its end.
    """

    time_pair: TimePair = component_field("time_pair", OrderedPair(
        first=LogitNormal(mean=-0.4), second=LogitNormal(mean=-0.4), equal_probability=0.25
    ))
    constant_alpha: float | None = None
    first_step: int = 0
    last_step: int = 0
    clip: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_between(self, 0, 10**9, "first_step", "last_step")
        check_between(self, 0.0, 1e6, "clip")
        if self.constant_alpha is not None:
            self._check_constant()
        elif self.tangent.warmup_steps:
            raise InputError("tangent.warmup_steps", self.tangent.warmup_steps, "du/dt enters at "
                             "the end of the schedule of alpha; leave it 0, or give "
                             "constant_alpha=0")
        elif self.last_step and self.first_step >= self.last_step:
            raise InputError("first_step", self.first_step, "the schedule of alpha must start "
                             f"before it ends, at step {self.last_step}")

    def _check_constant(self) -> None:
        """Raises InputError for fields that have no effect with a constant alpha, or a bad one."""
        alpha = self.constant_alpha
        # Below, float32 has nothing left of u - u(x_s, s, r).
        if alpha != 0 and not 1e-5 <= alpha <= 1:
            raise InputError("constant_alpha", alpha, "give 0, or a number from 1e-05 to 1")
        for name in ("first_step", "last_step"):
            if getattr(self, name):
                raise InputError(name, getattr(self, name), f"constant_alpha={alpha} leaves no "
                                 "schedule; leave it 0, or give constant_alpha=None")
        if self.clip and alpha == 0:
            raise InputError("clip", self.clip, "constant_alpha=0 has no target to clip; set it to "
                             "0, or bound du/dt by tangent.max_rms")
        used = Tangent(velocity=self.tangent.velocity) if alpha < 1 else Tangent()
        if alpha and self.tangent != used:
            raise InputError("constant_alpha", alpha, "settings of the tangent have no effect with "
                             "it; leave objective.tangent at its defaults")

    def for_run(self, steps: int) -> "AlphaFlow":
        """The objective of a run, in which the last step of the schedule is known.

        >>> AlphaFlow().for_run(600).last_step, AlphaFlow(last_step=500).for_run(600).last_step
        (600, 500)

        Args:
          steps: number of steps of the run.

        Raises:
          InputError: the schedule starts after the run.
        """
        if self.constant_alpha is not None:
            return self
        return dataclasses.replace(self, last_step=self.last_step or steps)

    def alpha(self, step: jax.Array | int | None) -> jax.Array:
        """alpha of a training step, a float32 scalar: 1 - sigmoid(25 (step - middle) / length) over
        the steps of the schedule, 0 below 0.005 and 1 above 0.995.

        >>> objective = AlphaFlow(first_step=10, last_step=30)
        >>> [round(float(objective.alpha(step)), 4) for step in (0, 12, 19, 20, 28, None)]
        [1.0, 1.0, 0.7773, 0.5, 0.0, 0.0]

        Args:
          step: number of steps taken before this one; None stands for one after the schedule.

        Raises:
          InputError: the end of the schedule is not known; `for_run` gives it.
        """
        if self.constant_alpha is not None or step is None:
            return jnp.float32(self.constant_alpha or 0.0)
        if not self.last_step:
            raise InputError("last_step", 0, "give the training step at which alpha reaches 0; a "
                             "run gives its own last step")
        middle, length = (self.first_step + self.last_step) / 2, self.last_step - self.first_step
        alpha = jax.nn.sigmoid(_SLOPE * (middle - jnp.asarray(step, jnp.float32)) / length)
        return jnp.where(alpha < _CLAMP, 0.0, jnp.where(alpha > 1 - _CLAMP, 1.0, alpha))

    def draw(self, key: PRNGKey, batch: Batch, step: jax.Array | None = None) -> AlphaFlowDraws:
        """What MeanFlow draws, and alpha."""
        alpha = jnp.full(len(batch.x), self.alpha(step))
        return AlphaFlowDraws(super().draw(key, batch, step), alpha)

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: AlphaFlowDraws,
        frozen_params: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]:
        """The weighted squared error of u(x_t, t, r, y) against the target of this alpha."""
        del frozen_params
        sample = path_sample(self.interpolant, network, batch, draws.mean_flow)
        (guided,) = guided_velocities(self, network, params, [sample])
        u, target = average_velocity_and_target(
            self, network, params, sample, guided, draws.alpha
        )
        losses, metrics = target_loss(self, network, params, sample, u, target)
        return losses, metrics | {"alpha": draws.alpha}

    def flops(self, network: Network) -> float:
        """Operations at alpha < 1: a forward and a backward pass (3 forward passes), the guidance,
        and du/dt or u(x_s, s, r), which take as many. Where a schedule has alpha = 1, a step takes
        a forward pass less."""
        if self.constant_alpha != 1:
            return super().flops(network)
        return 3 * network.flops.forward + guidance_flops(
            self.guidance, network, network.flops.decode
        )


def average_velocity_and_target(
    objective: AlphaFlow,
    network: Network,
    params: Params,
    sample: PathSample,
    guided: GuidedVelocity,
    alpha: PerSample,
) -> tuple[Images, Images]:
    """u(x_t, t, r) and the target u - e without gradient, both [b, h, w, c].

    Args:
      objective: its `tangent`, `clip`, `constant_alpha` and `compute_sharing`.
      network, params: the flow map u.
      sample: where u is evaluated.
      guided: v_g as a function of the conditional velocity; without guidance it is v_t.
      alpha: [b] in [0, 1], the same number for all samples.
    """
    if objective.compute_sharing.shares_encoder(network, objective.tangent):
        u, target = _shared(objective, network, params, sample, guided, alpha)
        return u, jax.lax.stop_gradient(target)
    x_t, t, r, y = sample.x_t, sample.t, sample.r, sample.y
    fixed, conditional = jax.lax.stop_gradient(params), None
    if _needs_conditional(objective, guided):
        conditional = network.apply(fixed, x_t, t, t, y)

    def derivative(v: Images) -> Images:
        def flow_map(x_t: Images, t: jax.Array) -> Images:
            return network.apply(fixed, x_t, t, r, y)

        arguments = flow_map, (x_t, t), (v, jnp.ones_like(t))
        differentiate = (objective.tangent.central_difference
                         if objective.tangent.finite_difference else jax.jvp)
        return differentiate(*arguments)[1]

    u = network.apply(params, x_t, t, r, y)
    target = _target(objective, network, fixed, sample, guided, alpha, (u, conditional, derivative))
    return u, jax.lax.stop_gradient(target)


def _needs_conditional(objective: AlphaFlow, guided: GuidedVelocity) -> bool:
    """Whether the velocity u(x_t, t, t, y) is needed."""
    return guided.kappa is not None or objective.tangent.is_predicted


def _target(
    objective: AlphaFlow,
    network: Network,
    params: Params,
    sample: PathSample,
    guided: GuidedVelocity,
    alpha: PerSample,
    velocities: tuple[Images, Images | None, Callable[[Images], Images]],
) -> Images:
    """u - e, from u(x_t, t, r), the conditional velocity, and the derivative of u along (v, 1, 0)
    as a function of v. Only what this alpha needs is computed."""
    x_t, t, r, y = sample.x_t, sample.t, sample.r, sample.y
    u, conditional, derivative = velocities
    v_g = guided.at(conditional)
    v = conditional if objective.tangent.is_predicted else v_g

    def difference(target: Images, alpha: PerSample) -> Images:
        if objective.clip:
            bounded = jnp.clip(target, -objective.clip, objective.clip)
            target = jnp.where(per_sample(r < t, u), bounded, target)
        return u - (u - target) / per_sample(alpha, u)

    def trajectory() -> Images:
        return difference(v_g, jnp.ones_like(t))

    def jump() -> Images:
        span = alpha * (t - r)
        u_s = network.apply(params, x_t - per_sample(span, v) * v, t - span, r, y)
        # Where r = t every alpha has the same e; without the division it is exact.
        ours = jnp.where(r < t, alpha, 1.0)
        weight = per_sample(ours, u)
        return difference(weight * v_g + (1 - weight) * u_s, ours)

    def identity() -> Images:
        du_dt = objective.tangent.bound(derivative(v), sample.tangent_weight)
        return v_g - per_sample(t - r, u) * du_dt

    branches = (identity, jump, trajectory)
    if objective.constant_alpha is not None:
        return branches[(objective.constant_alpha > 0) + (objective.constant_alpha == 1)]()
    largest = jnp.max(alpha)  # alpha is one number
    return jax.lax.switch((largest > 0).astype(int) + (largest == 1), branches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _shared(*inputs: Any) -> tuple[Images, Images]:
    """u and its target from one pass of the encoder: the conditional velocity starts from its
    output, and du/dt is u's linearization, which the backward pass stores in any case, transposed
    twice. The gradient goes to the parameters through u alone, and to first order only."""
    return _forward(*inputs)[0]


def _forward(
    objective: AlphaFlow,
    network: Network,
    params: Params,
    sample: PathSample,
    guided: GuidedVelocity,
    alpha: PerSample,
) -> tuple[tuple[Images, Images], Any]:
    """u and the target, and the pullbacks of encoder and decoder."""
    x_t, t, r, y = sample.x_t, sample.t, sample.r, sample.y

    def encode(params: Params, x_t: Images, t: jax.Array) -> Any:
        return network.encode(params, x_t, t, y)

    def decode(params: Params, hidden: Any) -> Images:
        return network.decode(params, hidden, r, y)

    hidden, pull_back_encoder = jax.vjp(encode, params, x_t, t)
    u, pull_back_decoder = jax.vjp(decode, params, hidden)
    conditional = None
    if _needs_conditional(objective, guided):
        conditional = network.decode(params, hidden, t, y)

    def derivative(v: Images) -> Images:
        encoder = jax.linear_transpose(lambda cotangent: pull_back_encoder(cotangent)[1:], hidden)
        decoder = jax.linear_transpose(lambda cotangent: pull_back_decoder(cotangent)[1], u)
        return decoder(*encoder((v, jnp.ones_like(t))))[0]

    velocities = u, conditional, derivative
    target = _target(objective, network, params, sample, guided, alpha, velocities)
    return (u, target), (pull_back_encoder, pull_back_decoder)


def _backward(
    objective: AlphaFlow, network: Network, pullbacks: Any, cotangents: Any
) -> tuple[Any, ...]:
    """The cotangents of the parameters; nothing else is differentiated."""
    pull_back_encoder, pull_back_decoder = pullbacks
    decoder_params, hidden = pull_back_decoder(cotangents[0])
    encoder_params, *_ = pull_back_encoder(hidden)
    return jax.tree.map(jnp.add, encoder_params, decoder_params), None, None, None


_shared.defvjp(_forward, _backward)
