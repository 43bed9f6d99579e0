"""Sharing of computation between the formulas of a loss: the same values from fewer forward passes.

The published Decoupled MeanFlow step costs 11 forward passes F: a forward and a backward pass (3F)
and two velocities for the guidance (2F) in each loss, and the tangent (F). Shared, it costs 9 and a
fraction of one: the prediction of the flow-matching loss is its own conditional velocity, and in
the MeanFlow loss one pass of the encoder serves the conditional velocity, u and du/dt.

`dmf.objectives.mean_flow.average_velocity` is the formula that `shared_encoder_jvp` must equal.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dmf.errors import InputError
from dmf.objectives.guidance import GuidedVelocity, guided_velocity, unconditional_needed
from dmf.objectives.path_sample import PathSample
from dmf.objectives.tangent import Tangent
from dmf.runtime.sharding import constrain_batch, targets_one_cpu
from dmf.types import FlowMap, Images, Network, Params, Times

# Enough to skip most of what can be skipped, and few enough to leave each core its share.
_CPU_MICROBATCHES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeSharing:
    """Which computations of a loss are shared; the values of losses and gradients stay the same.

    Attributes:
      enabled: whether the flow-matching loss takes its prediction for the conditional velocity,
        the MeanFlow loss runs the encoder once, and that of improved MeanFlow runs both heads from
        one pass of the trunk. False computes each formula as it stands.
      unconditional_microbatches: 0 makes an unconditional pass for each loss of Decoupled MeanFlow;
        1 makes one for both. n > 1 cuts that one into n microbatches; samples that need the
        unconditional velocity come first, and microbatches in which no sample needs it (their
        labels are dropped, or t lies outside the guidance interval) are skipped. None takes 8, or
        the largest divisor of 8 that divides the samples, on one CPU, and 0 elsewhere. Improved
        MeanFlow joins the conditional and the unconditional velocity of its one loss.
    """

    enabled: bool = True
    unconditional_microbatches: int | None = None

    def __post_init__(self):
        if (self.unconditional_microbatches or 0) < 0:
            raise InputError(
                "unconditional_microbatches", self.unconditional_microbatches,
                "give 0, for a pass in each loss, or the number of microbatches",
            )

    def microbatches(self, count: int) -> int:
        """The number of unconditional microbatches of `count` samples, or 0.

        Small microbatches are as efficient as large ones on a CPU, but not on accelerators.
        """
        if self.unconditional_microbatches is not None:
            return self.unconditional_microbatches
        return math.gcd(_CPU_MICROBATCHES, count) if self.enabled and targets_one_cpu() else 0

    def shares_encoder(self, network: Network, tangent: Tangent) -> bool:
        """Whether the MeanFlow loss runs the encoder once.

        A central difference has nothing to share. With full remat the backward pass recomputes the
        encoder, so that no linearization of it is stored that could be shared.
        """
        return self.enabled and not (tangent.finite_difference or network.full_remat)


def guided_velocities(
    objective: Any,
    network: Network,
    params: Params,
    samples: Sequence[PathSample],
    frozen_params: Mapping[str, Params] | None = None, *, trained: bool = True,
) -> list[GuidedVelocity]:
    """v_g as a function of the conditional velocity, for each of several path samples.

    Args:
      objective: its `guidance` and `compute_sharing`, and its `teacher` where the guidance is a
        teacher's.
      network, params: whose velocities guide, without gradient, unless a teacher's do.
      samples: of one size, one for each term of the loss.
      frozen_params: holds the parameters of the teacher.
      trained: whether `params` are trained by the loss, which then has the conditional velocity;
        False, as for an EMA, computes it here where v_g contains it.

    Raises:
      InputError: the guidance is a teacher's, and there is none.
    """
    guidance = objective.guidance
    if guidance.uses_teacher:
        network, params = objective.teacher, (frozen_params or {}).get("teacher")
        if network is None or params is None:
            raise InputError("objective.guidance.name", "teacher", "name the teacher's checkpoint "
                             "in teacher.checkpoint")
    velocity = functools.partial(network.apply, jax.lax.stop_gradient(params))
    unconditional = _unconditional(objective, velocity, samples)
    guided = [
        guided_velocity(guidance, s.t, s.dropped, s.v_t, u_null, s.guidance)
        for s, u_null in zip(samples, unconditional, strict=True)
    ]
    if not guidance.needs_conditional or (trained and not guidance.uses_teacher):
        return guided
    # The conditional velocity is the teacher's or the EMA's, which is known already.
    return [GuidedVelocity(each.at(velocity(s.x_t, s.t, s.t, s.y)), None)
            for each, s in zip(guided, samples, strict=True)]


def _unconditional(
    objective: Any, velocity: FlowMap, samples: Sequence[PathSample]
) -> Sequence[Images | None]:
    """u(x_t, t, t, null) for each path sample, where the guidance gives it a coefficient."""
    guidance, count = objective.guidance, sum(len(s.t) for s in samples)
    if not guidance.needs_unconditional:
        return [None] * len(samples)

    def unconditional(x_t: Images, t: Times, null: Any) -> Images:
        return velocity(x_t, t, t, null)

    inputs = [(s.x_t, s.t, s.y.null()) for s in samples]
    needed = [unconditional_needed(guidance, s.t, s.dropped, s.guidance) for s in samples]
    return joined(unconditional, inputs, needed, objective.compute_sharing.microbatches(count))


def joined(
    function: Callable[..., jax.Array],
    inputs: Sequence[tuple[Any, ...]],
    needed: Sequence[jax.Array],
    microbatches: int,
) -> list[jax.Array]:
    """The values of a function at several inputs of one size, from one pass over the rows of all.

    Args:
      function: of pytrees of arrays [b, ...], row by row.
      inputs: the arguments of each call.
      needed: [b] bool for each call: the rows that are needed.
      microbatches: 0 makes a pass for each of the inputs; 1 one pass for all; n > 1 cuts that one
        into microbatches, of which those without a needed row are zeros and cost nothing.
    """
    if microbatches == 0:
        return [function(*each) for each in inputs]
    rows, row_needed = jax.tree.map(
        lambda *parts: constrain_batch(jnp.concatenate(parts)), *zip(inputs, needed, strict=True)
    )
    if microbatches > 1:
        function = only_where_needed(function, row_needed, microbatches)
    return jnp.split(function(*rows), len(inputs))


def only_where_needed(
    function: Callable[..., jax.Array], needed: jax.Array, microbatches: int
) -> Callable[..., jax.Array]:
    """The function (*rows) -> rows, computed a microbatch at a time, the rows that are needed
    first; a microbatch in which no row is needed is zeros and costs nothing.

    Args:
      function: of pytrees of arrays [b, ...], row by row.
      needed: [b] bool.
      microbatches: number of microbatches; it divides b.

    Raises:
      InputError: it does not divide b.
    """
    count = len(needed)
    if count % microbatches:
        raise InputError(
            "objective.compute_sharing.unconditional_microbatches", microbatches,
            f"it must divide the {count} samples of the unconditional pass",
        )
    order = jnp.argsort(~needed, stable=True)

    def split(x: jax.Array) -> jax.Array:
        shape = (microbatches, count // microbatches, *x.shape[1:])
        return constrain_batch(x[order].reshape(shape), axis=1)

    def mapped(*rows: Any) -> jax.Array:
        pieces = jax.tree.map(split, rows)
        shape = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], pieces))
        computed = jax.lax.map(
            lambda piece: jax.lax.cond(
                piece[0].any(),
                lambda: function(*piece[1]),
                lambda: jnp.zeros(shape.shape, shape.dtype),
            ),
            (split(needed), pieces),
        )
        return constrain_batch(computed.reshape(count, *computed.shape[2:])[jnp.argsort(order)])

    return mapped


def shared_encoder_jvp(
    network: Network,
    params: Params,
    sample: PathSample,
    guided: GuidedVelocity,
    tangent: Tangent,
) -> tuple[Images, Images, Images]:
    """(u, v_g, du/dt) from one pass of the encoder, at most two of the decoder (the conditional
    velocity and u), and one tangent.

    The gradient goes through u alone, and to first order only: a gradient of it has no gradient.
    """
    return _shared_encoder_jvp(
        network, tangent.is_predicted, params, sample.x_t, sample.t, sample.r, sample.y, *guided
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _shared_encoder_jvp(*inputs: Any) -> tuple[Images, Images, Images]:
    return _forward(*inputs)[0]


def _forward(
    network: Network,
    along_predicted: bool,
    params: Params,
    x_t: Images,
    t: Times,
    r: Times,
    y: Any,
    base: Images,
    kappa: jax.Array | None,
) -> tuple[tuple[Images, Images, Images], Any]:
    """(u, v_g, du/dt), and the pullbacks of encoder and decoder.

    The encoder runs before the direction of the tangent is known, as that takes the conditional
    velocity. Its pullback is a linear map, which transposed pushes the tangent forward. Asking for
    the tangent in any other way, by `jax.jvp` or `jax.linearize`, would store a second set of what
    the backward pass needs. The parameters do not move, so their part of the pullback is left out.
    The decoder gives value and tangent in one pass.
    """

    def encode(params: Params, x_t: Images, t: Times) -> Any:
        return network.encode(params, x_t, t, y)

    hidden, pull_back_encoder = jax.vjp(encode, params, x_t, t)
    needed = along_predicted or kappa is not None
    conditional = network.decode(params, hidden, t, y) if needed else None
    v_g = GuidedVelocity(base, kappa).at(conditional)
    v = conditional if along_predicted else v_g
    push_forward = jax.linear_transpose(lambda cotangent: pull_back_encoder(cotangent)[1:], hidden)
    (hidden_tangent,) = push_forward((v, jnp.ones_like(t)))

    def decode(params: Params, hidden: Any, r: Times) -> tuple[Images, Images]:
        def flow_map(hidden: Any, r: Times) -> Images:
            return network.decode(params, hidden, r, y)

        return jax.jvp(flow_map, (hidden, r), (hidden_tangent, jnp.zeros_like(r)))

    u, pull_back_decoder, du_dt = jax.vjp(decode, params, hidden, r, has_aux=True)
    return (u, v_g, du_dt), (pull_back_encoder, pull_back_decoder)


def _backward(
    network: Network, along_predicted: bool, pullbacks: Any, cotangents: Any
) -> tuple[Any, ...]:
    """The cotangents of the inputs; those of v_g and du/dt carry no gradient and are ignored."""
    pull_back_encoder, pull_back_decoder = pullbacks
    decoder_params, hidden, r = pull_back_decoder(cotangents[0])
    encoder_params, x_t, t = pull_back_encoder(hidden)
    params = jax.tree.map(jnp.add, encoder_params, decoder_params)
    return params, x_t, t, r, None, None, None


_shared_encoder_jvp.defvjp(_forward, _backward)
