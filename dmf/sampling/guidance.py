"""Guidance at sampling: from a flow map to the guided flow map."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dmf.errors import InputError, check_at_least, check_between
from dmf.objectives.guidance import LARGEST_SCALE
from dmf.objectives.interpolants import check_interval, in_interval, per_sample
from dmf.types import Condition, FlowMap, GuidanceInput, GuidedCondition, Images, Times


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingGuidance:
    """Guidance at sampling, with a scale inside a closed interval of times.

    >>> SamplingGuidance(scale=1.5, interval=(0.1, 0.8)).scale
    1.5

    Attributes:
      scale: guidance scale; 1 for none.
      interval: (start, end) of the closed interval of times t that are guided, in [0, 1].
      channels: number of channels that are guided, the first ones; 0 for all. The published
        sampling of DiT and SiT guides 3 of the 4 channels of its latents.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int = 0

    def __post_init__(self):
        check_interval("interval", self.interval)
        check_between(self, 0, LARGEST_SCALE, "scale")
        check_at_least(self, 0, "channels")

    def check_channels(self, count: int) -> None:
        """Checks that samples of `count` channels can be guided.

        Raises:
          InputError: there are fewer channels than are to be guided.
        """
        if self.channels > count:
            raise InputError("channels", self.channels, f"samples have {count} channels; give 0 to "
                             "guide all of them")


def classifier_free(flow_map: FlowMap, guidance: SamplingGuidance) -> FlowMap:
    """The flow map under classifier-free guidance (arXiv:2207.12598, arXiv:2404.07724):
    u_null + scale (u_cond - u_null), both at the same (t, r), for t in the interval and u_cond
    outside; u_cond also in channels that are not guided.

    It costs a forward pass of twice the batch; with scale 1, or where no t of the batch lies in the
    interval, one of the batch itself.

    >>> def flow_map(x_t, t, r, y):  # label 1 moves samples by 1; the null label 2 by 2
    ...     return jnp.zeros_like(x_t) + y.labels.reshape(-1, 1, 1, 1)
    >>> from dmf.types import ClassLabels
    >>> guided = classifier_free(flow_map, SamplingGuidance(scale=3.0))
    >>> y, t = ClassLabels(jnp.array([1]), num_classes=2), jnp.ones(1)
    >>> guided(jnp.zeros((1, 1, 1, 1)), t, t, y).item()  # 2 + 3 (1 - 2)
    -1.0

    Args:
      flow_map: u(x_t, t, r, y).
      guidance: scale and interval.

    Returns:
      The guided flow map, whose y must be a `Condition`; `flow_map` itself where the scale is 1.

    Raises:
      InputError: y is no `Condition`, so that it has no null, or x_t has fewer channels than are to
        be guided; when the guided flow map is called.
    """
    if guidance.scale == 1:
        return flow_map
    # No time lies outside the whole interval, so that one program is enough.
    always = tuple(guidance.interval) == (0, 1)

    def guided(x_t: Images, t: Times, r: Times, y: Any) -> Images:
        # An array of labels would not tell which label is null.
        if not isinstance(y, Condition):
            raise InputError("y", type(y).__name__, "guidance needs a condition that has a null; "
                             "give ClassLabels(labels, num_classes), or network.condition(labels)")
        guidance.check_channels(x_t.shape[-1])

        def both() -> tuple[Images, Images]:
            # One batch of twice the size reads the parameters once.
            twice = jax.tree.map(
                lambda *parts: jnp.concatenate(parts), (x_t, t, r, y), (x_t, t, r, y.null())
            )
            return tuple(jnp.split(flow_map(*twice), 2))

        def conditional() -> tuple[Images, Images]:
            u = flow_map(x_t, t, r, y)
            return u, u

        active = in_interval(t, guidance.interval)
        # All samples of a step have the same t.
        u, u_null = both() if always else jax.lax.cond(active.any(), both, conditional)
        scale = jnp.where(active, guidance.scale, 1.0)
        u_guided = u_null + per_sample(scale, u) * (u - u_null)
        if guidance.channels == 0:
            return u_guided
        guided_channels = slice(guidance.channels)
        return u.at[..., guided_channels].set(u_guided[..., guided_channels])

    return guided


def guidance_as_input(flow_map: FlowMap, guidance: SamplingGuidance) -> FlowMap:
    """The flow map of a network that takes guidance as an input, asked for this guidance, at the
    cost of an unguided pass (improved MeanFlow, arXiv:2512.02012).

    Args:
      flow_map: u(x_t, t, r, y) of a network whose y may be a `GuidedCondition`.
      guidance: scale and interval.

    Raises:
      InputError: the scale is not positive, or only some channels are to be guided.
    """
    if guidance.channels:
        raise InputError("channels", guidance.channels, "a network that takes its guidance as an "
                         "input guides all channels; give 0")
    if not 0 < guidance.scale < math.inf:
        raise InputError("scale", guidance.scale, "a network that takes its guidance as an input "
                         "needs a positive scale; 1 is none")

    def guided(x_t: Images, t: Times, r: Times, y: Any) -> Images:
        values = (jnp.full(t.shape, value, jnp.float32)
                  for value in (guidance.scale, *guidance.interval))
        return flow_map(x_t, t, r, GuidedCondition(y, GuidanceInput(*values)))

    return guided
