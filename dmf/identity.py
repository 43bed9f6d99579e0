"""The MeanFlow identity, u = v_g + (r - t) du/dt, in two forms that give the same numbers.

`differentiated` is the formula as it stands: `jax.jvp` of the flow map, differentiated once more by
whoever takes a gradient. `linearized_once` does no part of it twice: the encoder's output serves
the conditional velocity of the guidance, u and du/dt, and one linearization of the encoder, in
reverse, serves the gradient and, transposed, the tangent. Where the backward pass keeps nothing of
the encoder but computes it again, there is nothing to share, and the first form is no dearer.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmf.flow import per_sample
from dmf.guidance import GuidedVelocity
from dmf.tangents import Tangent
from dmf.typing import Condition, FlowMap, GuidedLabels, Images, Network, Params, Times

GUIDED = Tangent()


class Point(NamedTuple):
    """Where on its path each sample is: x_t, the path's velocity there, times, kept labels; and
    how much of du/dt counts, None for all of it."""

    x_t: jax.Array
    v_t: jax.Array
    t: jax.Array
    r: jax.Array
    y: Any
    dropped: jax.Array
    strength: jax.Array | None = None

    @property
    def asked(self) -> GuidedLabels | None:
        """The guidance that was drawn for each sample, if any was."""
        return self.y if isinstance(self.y, GuidedLabels) else None


class Identity(NamedTuple):
    """u, the target it is regressed on, and du/dt.

    Only u carries a gradient.
    """

    u: jax.Array
    target: jax.Array
    du_dt: jax.Array


def _identity(point: Point, tangent: Tangent, u: Images, v_g: Images, du_dt: Images) -> Identity:
    bounded = tangent.bounded(du_dt, point.strength)
    target = v_g + per_sample(point.r - point.t, u) * bounded
    return Identity(u, *jax.lax.stop_gradient((target, du_dt)))


def no_gradient(network: Network, params: Params) -> FlowMap:
    """The flow map of a network whose parameters are held fixed."""
    return functools.partial(network.apply, jax.lax.stop_gradient(params))


def along_path(
    flow_map: FlowMap,
    point: Point,
    v_g: Images,
    tangent: Tangent = GUIDED,
    own: Images | None = None,
) -> Identity:
    """The identity of any flow map, with d/dt along (v, 1, 0) for (x_t, t, r).

    MeanFlow, arXiv:2505.13447, the MeanFlow identity (equation 6) and its training target.

    Args:
      flow_map: that is differentiated.
      point: where.
      v_g: the guided velocity.
      tangent: how; v is v_g, or `own` where it says so.
      own: the network's own velocity.
    """
    x_t, _, t, r, y, *_ = point
    u, du_dt = tangent.differential(
        lambda x_t, t, r: flow_map(x_t, t, r, y),
        (x_t, t, r),
        (own if tangent.own else v_g, jnp.ones_like(t), jnp.zeros_like(r)),
    )
    return _identity(point, tangent, u, v_g, du_dt)


def differentiated(
    network: Network,
    params: Params,
    point: Point,
    guided: GuidedVelocity,
    tangent: Tangent = GUIDED,
) -> Identity:
    """The identity by `jax.jvp`, along a velocity that costs a pass of its own."""
    own = None
    if guided.kappa is not None or tangent.own:
        own = no_gradient(network, params)(point.x_t, point.t, point.t, point.y)
    flow_map = functools.partial(network.apply, params)
    return along_path(flow_map, point, guided.at(own), tangent, own)


def linearized_once(
    network: Network,
    params: Params,
    point: Point,
    guided: GuidedVelocity,
    tangent: Tangent = GUIDED,
) -> Identity:
    """The identity from one pass through the encoder, two of the decoder at most (the network's
    own velocity and u), and one tangent; to first order only: a gradient of it has no gradient."""
    x_t, _, t, r, y, *_ = point
    found = _linearized(network, tangent.own, params, x_t, t, r, y, *guided)
    return _identity(point, tangent, *found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linearized(*inputs: Any) -> tuple[Images, Images, Images]:
    return _linearize(*inputs)[0]


def _linearize(
    network: Network,
    along_own: bool,
    params: Params,
    x_t: Images,
    t: Times,
    r: Times,
    y: Condition,
    base: Images,
    kappa: jax.Array | None,
) -> tuple[tuple[Images, Images, Images], Any]:
    """(u, v_g, du/dt), and the pullbacks of encoder and decoder.

    The encoder runs before it is known which way the tangent goes. Its pullback is a linear map;
    transposed it pushes tangents forward. Asking for the tangent in any other way, by `jax.jvp` or
    `jax.linearize`, keeps a second set of what the backward pass needs. The part of the pullback
    that goes to the parameters is left out, as they do not move. The decoder gives value and
    tangent in one pass.
    """
    encode = lambda params, x_t, t: network.encode(params, x_t, t, y)  # noqa: E731
    hidden, to_inputs = jax.vjp(encode, params, x_t, t)
    needed = along_own or kappa is not None
    own = network.decode(params, hidden, t, y) if needed else None
    v_g = GuidedVelocity(base, kappa).at(own)
    transposed = jax.linear_transpose(lambda cotangent: to_inputs(cotangent)[1:], hidden)
    (along,) = transposed((own if along_own else v_g, jnp.ones_like(t)))

    def decode(params: Params, hidden: Any, r: Times) -> tuple[Images, Images]:
        flow_map = lambda hidden, r: network.decode(params, hidden, r, y)  # noqa: E731
        return jax.jvp(flow_map, (hidden, r), (along, jnp.zeros_like(r)))

    u, to_hidden, du_dt = jax.vjp(decode, params, hidden, r, has_aux=True)
    return (u, v_g, du_dt), (to_inputs, to_hidden)


def _pull_back(
    network: Network, along_own: bool, pullbacks: Any, cotangents: Any
) -> tuple[Any, ...]:
    """The cotangents of the inputs; those of v_g and du/dt, which carry no gradient, are lost."""
    to_inputs, to_hidden = pullbacks
    of_decoder, of_hidden, of_r = to_hidden(cotangents[0])
    of_encoder, of_x_t, of_t = to_inputs(of_hidden)
    of_params = jax.tree.map(jnp.add, of_encoder, of_decoder)
    return of_params, of_x_t, of_t, of_r, None, None, None


_linearized.defvjp(_linearize, _pull_back)
