"""What a metric is: a number that says how far samples are from a reference."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from dmf.errors import InputError
from dmf.evaluation.running_statistics import Moments, RunningInceptionScore, RunningMoments
from dmf.registry import define_kind

NEEDS = ("moments", "inception_score", "features", "labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricInput:
    """Statistics of one kind of features of a set of images. What was not collected is None.

    Attributes:
      moments: mean and covariance of the features of all images.
      inception_score: sums over the class probabilities of all images.
      features: float32 features of the images [n, d], or of some of them where the images are a
        reference.
      labels: the label of each image whose features are there [n].
    """

    moments: Moments | RunningMoments | None = None
    inception_score: RunningInceptionScore | None = None
    features: Float[np.ndarray, "n d"] | None = None
    labels: Int[np.ndarray, "n"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that says how far samples are from a reference.

    A metric is registered under the name that `--metrics` takes, see `dmf.evaluation.metrics`;
    a plugin registers its own with `dmf.registry.register("metric", NAME=Metric(...))`.

    Attributes:
      description: one sentence that says what the metric measures.
      title: name of the metric in tables and plots.
      features: kind of features that are compared: pool3, spatial or probabilities (Inception),
        dinov2, or pixels.
      needs: statistics of these features that must be collected: "moments" (mean and covariance),
        "inception_score" (of the samples alone), "features" (of every image), "labels" (of every
        image).
      higher_is_better: whether a larger number is better.
      compute: function (reference, samples) -> number, from two `MetricInput`s.
      is_share: whether the number is a share, from 0 to 1, and is shown as a percentage.
      decimals: decimal places that tables show of a number that is not a share.
      baseline: function (reference) -> number that the metric takes between two random halves of
        the reference, which is what chance alone amounts to; None for metrics without one. It has
        the features of the reference.
    """

    description: str
    title: str
    features: str
    needs: tuple[str, ...]
    higher_is_better: bool
    compute: Callable[[MetricInput, MetricInput], float]
    is_share: bool = False
    decimals: int = 2
    baseline: Callable[[MetricInput], float] | None = None

    def __post_init__(self):
        for need in self.needs:
            if need not in NEEDS:
                raise InputError("needs", need, f"choose of {', '.join(NEEDS)}")

    def format(self, value: float) -> str:
        """The number as tables show it."""
        return f"{value:.0%}" if self.is_share else f"{value:.{self.decimals}f}"


def score(name: str, value: object) -> float:
    """What the metric of a name computed, as a number.

    >>> score("fid", np.float32(3.5))
    3.5
    >>> score("brightness", "high")
    Traceback (most recent call last):
    dmf.errors.InputError: metric brightness='high': it must compute one number, and computed a str

    Raises:
      InputError: it is no number.
    """
    array = np.asarray(value)
    if array.shape or array.dtype.kind not in "biuf":
        what = f"an array of shape {array.shape}" if array.shape else f"a {type(value).__name__}"
        raise InputError(f"metric {name}", repr(value)[:60],
                         f"it must compute one number, and computed {what}")
    return float(array)


define_kind("metric", "A number that says how far samples are from a reference.", Metric)
