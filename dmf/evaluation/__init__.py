"""How far samples are from images: protocols, features, statistics, metrics.

For those who report numbers. It imports `dmf.checkpoints` (frozen networks), `dmf.sampling`,
`dmf.data`, `dmf.models` and what lies below them.
"""

from dmf.evaluation.metric import Metric, MetricInput
from dmf.evaluation.protocols import PROTOCOLS, Protocol
from dmf.registry import define_kind

__all__ = ["Metric", "MetricInput", "Protocol"]

define_kind(
    "protocol", "A protocol of evaluation: which metrics of which images.", Protocol, **PROTOCOLS
)
