"""What is random in one look at a batch, and where on its path it puts each sample."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmf.flow import Interpolant
from dmf.guidance import Guidance
from dmf.identity import Point
from dmf.tangents import Tangent
from dmf.typing import Batch, Dropped, GuidedLabels, InputError, PRNGKey

# Folded into the key of a step's draws for the guidance; the other draws split that key.
_ASKED = 2**31 - 2


class Draws(NamedTuple):
    """The randomness of one look at a batch.

    Attributes:
      noise: [b, h, w, c] standard normal.
      t, r: [b] with 0 <= r <= t <= 1.
      dropped: [b] bool, whether the label is replaced by the null label.
      asked: labels with the guidance drawn for each, where it is drawn.
      strength: [b], how much of du/dt counts while it is faded in.
    """

    noise: jax.Array
    t: jax.Array
    r: jax.Array
    dropped: jax.Array
    asked: GuidedLabels | None = None
    strength: jax.Array | None = None


class DecoupledDraws(NamedTuple):
    """Decoupled MeanFlow looks at a batch twice: same dropped labels, independent noise."""

    flow_matching: Draws
    mean_flow: Draws


def check_rate(rate: float) -> None:
    """Raises InputError where a rate of dropped labels is no probability."""
    if not 0 <= rate <= 1:
        raise InputError(f"objective.label_dropout={rate}: a probability lies in [0, 1]")


def drop(key: PRNGKey, rate: float, batch: Batch) -> Dropped:
    """Which labels of a batch are replaced by the null label, each with a probability."""
    return jax.random.bernoulli(key, rate, batch.y.shape)


def point_of(interpolant: Interpolant, batch: Batch, draws: Draws, null_label: int) -> Point:
    """Where on its path each sample of a batch is put."""
    y = jnp.where(draws.dropped, null_label, batch.y)
    return Point(
        x_t=interpolant.mix(batch.x, draws.noise, draws.t),
        v_t=interpolant.velocity(batch.x, draws.noise, draws.t),
        t=draws.t,
        r=draws.r,
        y=y if draws.asked is None else draws.asked._replace(label=y),
        dropped=draws.dropped,
        strength=draws.strength,
    )


def beside(
    guidance: Guidance, tangent: Tangent, key: PRNGKey, batch: Batch, step: jax.Array | None
) -> tuple[GuidedLabels | None, jax.Array | None]:
    """What only some settings ask for: the guidance drawn for each sample, and how much of du/dt
    counts at this step."""
    asked, strength = None, tangent.strength(step)
    if guidance.drawn:
        asked = guidance.draw(jax.random.fold_in(key, _ASKED), batch.y)
    if strength is not None:
        strength = jnp.full(len(batch.x), strength)
    return asked, strength
