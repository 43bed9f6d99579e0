"""Protocols of evaluation by name: which metrics are computed, of which images.

Published numbers of one model differ by how images are rounded to 8 bits, how labels are chosen and
which features are compared. The input of each network is the same in all protocols, see
`dmf.evaluation.feature_extractors`.
"""

import dataclasses
from collections.abc import Mapping

from dmf.data.pixels import ROUNDINGS
from dmf.errors import check_choice
from dmf.evaluation.metric import Metric
from dmf.evaluation.metrics import lookup_metric
from dmf.sampling.class_labels import LABEL_SAMPLING


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which metrics are computed, and how the samples are generated.

    Attributes:
      metrics: names of the metrics, the most important first; each is a registered metric, see
        `dmf.evaluation.metrics`.
      rounding: how images become 8 bits: nearest, half_up or down.
      label_sampling: how labels of samples are chosen: random draws each by itself, balanced takes
        all classes in turn.
    """

    metrics: tuple[str, ...]
    rounding: str
    label_sampling: str

    def __post_init__(self):
        for name in self.metrics:
            lookup_metric(name)
        for field, choices in (("rounding", ROUNDINGS), ("label_sampling", LABEL_SAMPLING)):
            check_choice(self, field, choices)

    @property
    def metrics_by_name(self) -> Mapping[str, Metric]:
        """The metrics by name, in the order of the protocol."""
        return {name: lookup_metric(name) for name in self.metrics}

    def metrics_that_need(self, need: str) -> Mapping[str, Metric]:
        """The metrics by name that need some statistics, see `Metric.needs`."""
        return {name: metric for name, metric in self.metrics_by_name.items()
                if need in metric.needs}

    @property
    def features(self) -> tuple[str, ...]:
        """The kinds of features that the metrics compare."""
        return tuple(sorted({metric.features for metric in self.metrics_by_name.values()}))

    @property
    def stored_features(self) -> tuple[str, ...]:
        """The kinds of features that must be stored for every image, not only their moments."""
        metrics = self.metrics_that_need("features").values()
        return tuple(sorted({metric.features for metric in metrics}))

    @property
    def stored_reference_features(self) -> tuple[str, ...]:
        """The kinds of features that must be stored of a reference: those of the baselines too."""
        baselines = {metric.features for metric in self.metrics_by_name.values() if metric.baseline}
        return tuple(sorted({*self.stored_features, *baselines}))


PROTOCOLS = {
    # The evaluator of guided diffusion (arXiv:2105.05233), as SiT and REPA use it.
    "adm": Protocol(
        metrics=("fid", "sfid", "inception_score", "precision", "recall"),
        rounding="down", label_sampling="random",
    ),
    # EDM2 (arXiv:2312.02696); the published numbers of Decoupled MeanFlow follow it.
    "edm2": Protocol(metrics=("fid", "fd_dinov2"), rounding="down", label_sampling="random"),
    # MeanFlow (arXiv:2505.13447); improved MeanFlow adds the Inception score.
    "meanflow": Protocol(
        metrics=("fid", "inception_score"), rounding="half_up", label_sampling="random"
    ),
    # Small images, compared pixel by pixel without a network.
    "pixels": Protocol(
        metrics=("fd_pixels", "label_agreement"), rounding="nearest", label_sampling="balanced"
    ),
}  # fmt: skip
