"""The metrics of training steps: fetched late from the device, checked, and averaged."""

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dmf.errors import RunError
from dmf.objectives import time_bins
from dmf.types import Metrics


class Report(NamedTuple):
    """The metrics of all steps since the last report.

    Attributes:
      step: number of the last of these steps.
      means: means over the steps that were not skipped; `skipped_steps` is the count since the
        start of the run instead.
      skipped: numbers of the steps that were skipped.
    """

    step: int
    means: dict[str, float]
    skipped: Sequence[int]


class MetricAccumulator:
    """Averages metrics over the steps between two reports.

    It ends the run at the first loss or gradient that is not finite and may not be skipped.
    """

    def __init__(
        self,
        latest_checkpoint: Callable[[], int | None],
        max_consecutive_skips: int = 0,
    ):
        """Starts without steps.

        Args:
          latest_checkpoint: returns the step of the newest checkpoint, for error messages.
          max_consecutive_skips: number of consecutive steps that may be skipped.
        """
        self._latest_checkpoint = latest_checkpoint
        self._max_consecutive_skips = max_consecutive_skips
        self._pending: collections.deque[tuple[int, Metrics, bool]] = collections.deque()
        self._finite_rows: list[Mapping[str, Any]] = []
        self._skipped: list[int] = []

    def add(self, step: int, metrics: Metrics, *, report: bool) -> None:
        """Adds the metrics of a step, which the device may not have computed yet.

        Args:
          step: number of the step.
          metrics: its metrics.
          report: whether a report is due after it.
        """
        self._pending.append((step, metrics, report))

    def read(self, last: int) -> Iterator[Report]:
        """Fetches the metrics of all steps up to `last`, and yields the reports that are due.

        Raises:
          RunError: the loss or gradient of a step is not finite, and the step may not be skipped.
        """
        count = sum(step <= last for step, _, _ in self._pending)
        ready = [self._pending.popleft() for _ in range(count)]
        rows = jax.device_get([metrics for _, metrics, _ in ready])
        for (step, _, report), row in zip(ready, rows, strict=True):
            if _is_finite(row):
                self._finite_rows.append(row)
            else:
                self._skip(step, row)
            if report:
                totals = {name: float(row[name]) for name in ("skipped_steps",) if name in row}
                yield Report(step, _means(self._finite_rows) | totals, self._skipped)
                self._finite_rows, self._skipped = [], []

    def _skip(self, step: int, row: Mapping[str, Any]) -> None:
        """Records a skipped step; raises RunError if it may not be skipped."""
        self._skipped.append(step)
        limit = self._max_consecutive_skips
        consecutive = int(row.get("consecutive_skipped_steps", 0))
        if 0 < consecutive <= limit:
            return
        saved = self._latest_checkpoint()
        checkpoint = "no checkpoint" if saved is None else f"the checkpoint of step {saved}"
        history = ""
        if limit:
            history = (f" after {consecutive - 1} consecutive skipped steps, the maximum of "
                       f"optimizer.skip_nonfinite={limit}")
        raise RunError(f"the loss is not finite at step {step} (loss {row['loss']}, gradient norm "
                       f"{row['gradient_norm']}){history}: stopped, {checkpoint} is kept; try a "
                       "lower optimizer.learning_rate or a longer warm-up")


def _is_finite(row: Mapping[str, Any]) -> bool:
    return all(math.isfinite(row[name]) for name in ("loss", "gradient_norm"))


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over steps by metric name, {} without steps; a metric by time bins has a mean for each
    bin."""
    means: dict[str, float] = {}
    for name in rows[0] if rows else ():
        mean = np.mean([row[name] for row in rows], axis=0)
        means |= time_bins.bin_means(name, mean) if mean.ndim else {name: float(mean)}
    means.pop("consecutive_skipped_steps", None)
    return means
