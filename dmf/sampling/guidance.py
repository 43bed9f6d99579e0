"""Guidance at sampling: from a flow map to the guided flow map."""

import dataclasses
from collections.abc import Callable
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

    @property
    def is_none(self) -> bool:
        """Whether the scale is 1."""
        return self.scale == 1

    @property
    def values(self) -> GuidanceInput:
        """The scale and the ends of the interval, as numbers."""
        return GuidanceInput(self.scale, *self.interval)

    @property
    def shared(self) -> "SamplingGuidance":
        """The guidance whose compiled program serves this one too, with `values` as an input. There
        are three programs: without guidance, guidance at all times, and inside an interval.

        >>> SamplingGuidance(scale=1.5, interval=(0.1, 0.8)).shared.interval
        (0.0, 0.0)
        """
        if self.is_none:
            return SamplingGuidance()
        interval = (0.0, 1.0) if self.is_everywhere else (0.0, 0.0)
        return dataclasses.replace(self, scale=0.0, interval=interval)

    @property
    def is_everywhere(self) -> bool:
        """Whether all times lie in the interval."""
        return tuple(self.interval) == (0, 1)

    def check_channels(self, count: int) -> None:
        """Checks that samples of `count` channels can be guided.

        Raises:
          InputError: there are fewer channels than are to be guided.
        """
        if self.channels > count:
            raise InputError("channels", self.channels, f"samples have {count} channels; give 0 to "
                             "guide all of them")


def classifier_free(
    flow_map: FlowMap, guidance: SamplingGuidance, values: GuidanceInput | None = None
) -> FlowMap:
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
      values: scalars to use in place of the scale and the interval, for example traced ones; the
        guidance then says only in which of its three programs they are used, see
        `SamplingGuidance.shared`.

    Returns:
      The guided flow map, whose y must be a `Condition`; `flow_map` itself where the scale is 1.

    Raises:
      InputError: y is no `Condition`, so that it has no null, or x_t has fewer channels than are to
        be guided; when the guided flow map is called.
    """
    def with_null(x_t: Images, t: Times, r: Times, y: Any) -> tuple[Images, Images]:
        # An array of labels would not tell which label is null.
        if not isinstance(y, Condition):
            raise InputError("y", type(y).__name__, "guidance needs a condition that has a null; "
                             "give ClassLabels(labels, num_classes), or network.condition(labels)")
        # One batch of twice the size reads the parameters once.
        twice = jax.tree.map(
            lambda *parts: jnp.concatenate(parts), (x_t, t, r, y), (x_t, t, r, y.null())
        )
        return tuple(jnp.split(flow_map(*twice), 2))

    return _extrapolated(flow_map, with_null, guidance, values)


def autoguidance(
    flow_map: FlowMap,
    guide: FlowMap,
    guidance: SamplingGuidance,
    values: GuidanceInput | None = None,
) -> FlowMap:
    """The flow map, guided by a worse version of itself (arXiv:2406.02507, equation 2):
    u_guide + scale (u - u_guide), both at the same (t, r, y), for t in the interval and u outside.

    The guide is a smaller network or an earlier checkpoint, and sees the same condition. Each call
    inside the interval costs a forward pass of both.

    >>> x_t, t = jnp.ones((1, 1, 1, 1)), jnp.ones(1)
    >>> guided = autoguidance(lambda x_t, t, r, y: 3 * x_t, lambda x_t, t, r, y: 2 * x_t,
    ...                       SamplingGuidance(scale=1.5))
    >>> guided(x_t, t, t, None).item()  # 2 + 1.5 (3 - 2)
    3.5

    Args:
      flow_map: u(x_t, t, r, y).
      guide: the flow map of the guide.
      guidance: scale and interval.
      values: as for `classifier_free`.

    Returns:
      The guided flow map; `flow_map` itself where the scale is 1.

    Raises:
      InputError: x_t has fewer channels than are to be guided; when the guided flow map is called.
    """
    def with_guide(x_t: Images, t: Times, r: Times, y: Any) -> tuple[Images, Images]:
        u = flow_map(x_t, t, r, y)
        return u, guide(x_t, t, r, y).astype(u.dtype)

    return _extrapolated(flow_map, with_guide, guidance, values)


def _extrapolated(
    flow_map: FlowMap,
    with_other: Callable[..., tuple[Images, Images]],
    guidance: SamplingGuidance,
    values: GuidanceInput | None,
) -> FlowMap:
    """u_other + scale (u - u_other) for t in the interval and u outside.

    Args:
      flow_map: u.
      with_other: the function (x_t, t, r, y) -> (u, u_other).
      guidance, values: as for `classifier_free`.
    """
    if guidance.is_none:
        return flow_map
    scale, *interval = guidance.values if values is None else values

    def alone(*inputs: Any) -> tuple[Images, Images]:
        u = flow_map(*inputs)
        return u, u

    def guided(*inputs: Any) -> Images:
        x_t, t, _, _ = inputs
        guidance.check_channels(x_t.shape[-1])
        active = in_interval(t, tuple(interval))
        # All samples of a step have the same t; in the whole interval one branch is enough.
        if guidance.is_everywhere:
            u, u_other = with_other(*inputs)
        else:
            u, u_other = jax.lax.cond(
                active.any(), lambda: with_other(*inputs), lambda: alone(*inputs)
            )
        factor = per_sample(jnp.where(active, scale, 1.0).astype(u.dtype), u)
        u_guided = u_other + factor * (u - u_other)
        if guidance.channels == 0:
            return u_guided
        guided_channels = slice(guidance.channels)
        return u.at[..., guided_channels].set(u_guided[..., guided_channels])

    return guided


def guidance_as_input(
    flow_map: FlowMap, guidance: SamplingGuidance, values: GuidanceInput | None = None
) -> FlowMap:
    """The flow map of a network that takes guidance as an input, asked for this guidance, at the
    cost of an unguided pass (improved MeanFlow, arXiv:2512.02012).

    Args:
      flow_map: u(x_t, t, r, y) of a network whose y may be a `GuidedCondition`.
      guidance: scale and interval.
      values: scalars to use in place of the scale and the interval, for example traced ones.

    Raises:
      InputError: the scale is below 1, or only some channels are to be guided.
    """
    if guidance.channels:
        raise InputError("channels", guidance.channels, "a network that takes its guidance as an "
                         "input guides all channels; give 0")
    if guidance.scale < 1:
        raise InputError("scale", guidance.scale, "a network that takes its guidance as an input "
                         "is trained with scales from 1 on; give 1, which is no guidance, or more")
    scalars = guidance.values if values is None else values

    def guided(x_t: Images, t: Times, r: Times, y: Any) -> Images:
        inputs = (jnp.full(t.shape, scalar, jnp.float32) for scalar in scalars)
        return flow_map(x_t, t, r, GuidedCondition(y, GuidanceInput(*inputs)))

    return guided
