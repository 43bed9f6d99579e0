"""How losses are computed where that is a choice: nothing that formulas state twice is done twice.

The published Decoupled MeanFlow step costs 11 forward passes F: forward, backward (2F) and two
velocities for the guidance in each half, and the tangent. Shared, it costs 9 and a share of one:
the prediction of the flow-matching half is its own conditional velocity, and in the MeanFlow half
only the decoder runs again for it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dmf.guidance import Guidance, GuidedVelocity, guided_velocity, null_needed
from dmf.identity import Identity, Point, differentiated, linearized_once
from dmf.sharding import constrained
from dmf.tangents import Tangent
from dmf.typing import FlowMap, Images, InputError, Network, Params, Times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How the losses of MeanFlow and Decoupled MeanFlow are computed; their values are the same.

    Attributes:
      shared: the guidance of the flow-matching half takes the prediction for the network's own
        velocity, and the encoder of the MeanFlow half runs once (`dmf.identity`). Off, each
        formula is computed as it stands.
      null_parts: 0 makes an unconditional pass for each half of Decoupled MeanFlow, 1 one for
        both. More cut that one into parts; samples that need such a velocity come first, and
        parts without any are skipped (their label is dropped, or t lies outside the interval).
    """

    shared: bool = True
    null_parts: int = 0

    def __post_init__(self):
        if self.null_parts < 0:
            raise InputError(f"null_parts={self.null_parts}: give 0, for a pass in each half, or "
                             "the number of parts")

    def identity(
        self,
        network: Network,
        params: Params,
        point: Point,
        guided: GuidedVelocity,
        tangent: Tangent,
    ) -> Identity:
        """The MeanFlow identity along a guided velocity.

        A difference of values shares nothing; nor does an encoder that a backward pass computes
        again, of which no linearization is kept.
        """
        once = self.shared and not (tangent.difference or network.recomputes)
        form = linearized_once if once else differentiated
        return form(network, params, point, guided, tangent)

    def guides(
        self, guidance: Guidance, source: FlowMap, points: Sequence[Point], null_label: int
    ) -> list[GuidedVelocity]:
        """How the guided velocity follows from the network's own, at each point.

        Args:
          guidance: which coefficients, and whose velocities are meant.
          source: the network, or its teacher, without gradient.
          points: of one size, one for each half of the loss.
          null_label: the label that stands for none.
        """
        nulls = self._unconditional(guidance, source, points, null_label)
        guides = [
            guided_velocity(guidance, point.t, point.dropped, point.v_t, null, point.asked)
            for point, null in zip(points, nulls, strict=True)
        ]
        if not guidance.teacher:
            return guides
        # The velocity meant is not the network's but its teacher's, which is known here and now.
        return [
            GuidedVelocity(guide.at(source(point.x_t, point.t, point.t, point.y)), None)
            for guide, point in zip(guides, points, strict=True)
        ]

    def _unconditional(
        self, guidance: Guidance, source: FlowMap, points: Sequence[Point], null_label: int
    ) -> Sequence[Images | None]:
        """u(x_t, t, t, null) at each point, where the guidance gives it a weight."""
        if not guidance.needs_null:
            return [None] * len(points)

        def velocity(x_t: Images, t: Times) -> Images:
            return source(x_t, t, t, jnp.full(t.shape, null_label, jnp.int32))

        if self.null_parts == 0:
            return [velocity(point.x_t, point.t) for point in points]
        x_t, t, dropped, asked = jax.tree.map(
            lambda *rows: constrained(jnp.concatenate(rows)),
            *((point.x_t, point.t, point.dropped, point.asked) for point in points),
        )
        if self.null_parts > 1:
            needed = null_needed(guidance, t, dropped, asked)
            velocity = where_needed(velocity, needed, self.null_parts)
        return jnp.split(velocity(x_t, t), len(points))


def where_needed(
    function: Callable[..., jax.Array], needed: jax.Array, parts: int
) -> Callable[..., jax.Array]:
    """The function (*rows) -> rows, a part of the rows at a time, those that are needed first; a
    part in which none is needed is zeros and costs nothing.

    Args:
      function: of arrays [b, ...], row by row.
      needed: [b] bool.
      parts: how many; it divides b.

    Raises:
      InputError: it does not.
    """
    count = len(needed)
    if count % parts:
        raise InputError(f"objective.work.null_parts={parts}: it must divide the {count} rows that "
                         "the guidance looks at")
    order = jnp.argsort(~needed, stable=True)

    def cut(x: jax.Array) -> jax.Array:
        return constrained(x[order].reshape(parts, count // parts, *x.shape[1:]), axis=1)

    def mapped(*rows: jax.Array) -> jax.Array:
        pieces = tuple(cut(x) for x in rows)
        like = jax.eval_shape(function, *(x[0] for x in pieces))
        made = jax.lax.map(
            lambda part: jax.lax.cond(
                part[0].any(),
                lambda: function(*part[1]),
                lambda: jnp.zeros(like.shape, like.dtype),
            ),
            (cut(needed), pieces),
        )
        return constrained(made.reshape(count, *made.shape[2:])[jnp.argsort(order)])

    return mapped
