"""One random sample of the path for each training sample: what is drawn, and where it leads.

`Draws` holds all randomness of a loss, so that a loss is a pure function of its inputs. A
`PathSample` follows from it: the point x_t on the path, the velocity v_t there, the times, and the
condition after label dropout.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmf.errors import InputError
from dmf.objectives.guidance import Guidance
from dmf.objectives.interpolants import LINEAR, Interpolant, ScaledLinear, per_sample
from dmf.objectives.tangent import Tangent
from dmf.types import (
    Batch,
    Dropped,
    GuidanceInput,
    GuidedCondition,
    Images,
    Network,
    PerSample,
    PRNGKey,
)

# Folded into the key of a step for the drawn guidance; the other draws split that key.
_GUIDANCE_KEY = 2**31 - 2


class Draws(NamedTuple):
    """The randomness of a loss.

    Attributes:
      noise: [b, h, w, c] standard normal.
      t: [b] times, r <= t <= 1.
      r: [b] times, 0 <= r <= t; equal to t in the flow-matching loss.
      dropped: [b] bool, where the condition is replaced by the null condition.
      guidance: the guidance scale and interval drawn for each sample; None unless the guidance is
        drawn.
      tangent_weight: [b] in [0, 1], the weight of du/dt during its warm-up; None after it.
    """

    noise: jax.Array
    t: jax.Array
    r: jax.Array
    dropped: jax.Array
    guidance: GuidanceInput | None = None
    tangent_weight: jax.Array | None = None


class DecoupledDraws(NamedTuple):
    """The randomness of the two losses of Decoupled MeanFlow: the same dropped labels, independent
    noise and times."""

    flow_matching: Draws
    mean_flow: Draws


class FlowMapDraws(NamedTuple):
    """The randomness of a flow-matching loss and of a loss at r < t: the same noise and dropped
    labels, independent times."""

    flow_matching: Draws
    flow_map: Draws


class PathSample(NamedTuple):
    """A point of the path for each training sample, and what the network is told there.

    Attributes:
      x_t: [b, h, w, c] points of the path at t.
      v_t: [b, h, w, c] velocities of the path there; of a network that predicts data, what that
        makes of the data.
      t, r: [b] times.
      y: the condition after label dropout, guided where guidance was drawn.
      dropped: [b] bool, where the condition is null.
      tangent_weight: as in `Draws`.
    """

    x_t: jax.Array
    v_t: jax.Array
    t: jax.Array
    r: jax.Array
    y: Any
    dropped: jax.Array
    tangent_weight: jax.Array | None = None

    @property
    def guidance(self) -> GuidanceInput | None:
        """The guidance scale and interval drawn for each sample, if they are drawn."""
        return self.y.guidance if isinstance(self.y, GuidedCondition) else None


def path_sample(
    interpolant: Interpolant, network: Network, batch: Batch, draws: Draws
) -> PathSample:
    """The points of the path that `draws` choose, with their velocities and conditions.

    Args:
      interpolant: the path.
      network: makes the condition of what the dataset says of the samples.
      batch: data x [b, h, w, c] and y.
      draws: noise, times and dropped labels of this loss.

    Raises:
      InputError: the network predicts data or noise, and the path is not linear.
    """
    check_prediction(interpolant, network)
    y = network.condition(batch.y).drop(draws.dropped)
    x_t = interpolant.interpolate(batch.x, draws.noise, draws.t)
    return PathSample(
        x_t=x_t,
        v_t=_velocity(interpolant, network, batch, draws, x_t),
        t=draws.t,
        r=draws.r,
        y=y if draws.guidance is None else GuidedCondition(y, draws.guidance),
        dropped=draws.dropped,
        tangent_weight=draws.tangent_weight,
    )


def _velocity(
    interpolant: Interpolant, network: Network, batch: Batch, draws: Draws, x_t: Images
) -> Images:
    """v_t. Of a network that predicts data it is what that makes of the data themselves:
    (x_t - x) / max(t, min_time), which on the linear path is v_t from min_time on (pixel MeanFlow,
    arXiv:2601.22158). Of one that predicts noise it is v_t at all times: what that makes of the
    noise would be 0 at t = 1, where sampling starts."""
    if network.prediction == "data":
        return (x_t - batch.x) / per_sample(jnp.maximum(draws.t, network.min_time), x_t)
    return interpolant.velocity(batch.x, draws.noise, draws.t)


def check_prediction(interpolant: Interpolant, network: Network) -> None:
    """Raises InputError where the network predicts data or noise and the path is not linear."""
    straight = interpolant == LINEAR or isinstance(interpolant, ScaledLinear)
    if network.prediction != "velocity" and not straight:
        formula = "(x_t - x) / t" if network.prediction == "data" else "(noise - x_t) / (1 - t)"
        raise InputError("model.prediction", network.prediction, f"{formula} is the velocity of "
                         "the linear path alone; set objective.interpolant=linear (or "
                         "scaled_linear), or this to velocity")


def check_label_dropout(probability: float) -> None:
    """Raises InputError where the probability of label dropout is none."""
    if not 0 <= probability <= 1:
        raise InputError("label_dropout", probability, "a probability lies in [0, 1]")


def draw_noise(key: PRNGKey, batch: Batch) -> jax.Array:
    """Standard normal noise of the shape and dtype of the data."""
    return jax.random.normal(key, batch.x.shape, batch.x.dtype)


def draw_label_dropout(key: PRNGKey, probability: float, batch: Batch) -> Dropped:
    """[b] bool: for which samples the condition is replaced by the null condition."""
    return jax.random.bernoulli(key, probability, (len(batch.x),))


def draw_guidance(
    guidance: Guidance, tangent: Tangent, key: PRNGKey, batch: Batch, step: jax.Array | None
) -> tuple[GuidanceInput | None, PerSample | None]:
    """The last two fields of `Draws`: the drawn guidance of each sample, and the weight of du/dt at
    this training step; each is None where the settings do not ask for it."""
    drawn, weight = None, tangent.weight(step)
    if guidance.is_drawn:
        drawn = guidance.draw(jax.random.fold_in(key, _GUIDANCE_KEY), len(batch.x))
    if weight is not None:
        weight = jnp.full(len(batch.x), weight)
    return drawn, weight
