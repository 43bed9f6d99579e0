"""What the steps of a run gave: metrics fetched late from the device, checked, and averaged."""

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dmf import bins
from dmf.typing import Metrics, RunError


class Report(NamedTuple):
    """What the steps since the last report gave.

    Attributes:
      step: the last of them.
      means: over those that were not skipped; `skipped_steps` is a count over the whole run.
      skipped: their numbers.
    """

    step: int
    means: dict[str, float]
    skipped: Sequence[int]


class Watch:
    """Metrics on the device, fetched late and averaged over the steps since the last report; stops
    the run at the first loss that is not finite and may not be skipped.

    Args:
      due: whether a report is due after a step.
      saved: the step of the newest checkpoint.
      limit: how many steps in a row may be skipped.
    """

    def __init__(
        self, due: Callable[[int], bool], saved: Callable[[], int | None], limit: int = 0
    ):
        self._due, self._saved, self._limit = due, saved, limit
        self._waiting: collections.deque[tuple[int, Metrics]] = collections.deque()
        self._seen: list[Mapping[str, Any]] = []
        self._skipped: list[int] = []

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes note of a step that is under way."""
        self._waiting.append((step, metrics))

    def read(self, last: int) -> Iterator[Report]:
        """Fetches all steps up to `last`; gives a report where one is due.

        Raises:
          RunError: a loss or a gradient is not finite.
        """
        count = sum(step <= last for step, _ in self._waiting)
        taken = [self._waiting.popleft() for _ in range(count)]
        values = jax.device_get([metrics for _, metrics in taken])
        for (step, _), row in zip(taken, values, strict=True):
            if _finite(row):
                self._seen.append(row)
            else:
                self._skip(step, row)
            if self._due(step):
                totals = {name: float(row[name]) for name in ("skipped_steps",) if name in row}
                yield Report(step, _means(self._seen) | totals, self._skipped)
                self._seen, self._skipped = [], []

    def _skip(self, step: int, row: Mapping[str, Any]) -> None:
        """Takes note of a step that was skipped, or ends the run."""
        self._skipped.append(step)
        in_a_row = int(row.get("skipped_in_a_row", 0))
        if 0 < in_a_row <= self._limit:
            return
        saved = self._saved()
        kept = f"the checkpoint of step {saved}" if saved is not None else "no checkpoint"
        before = ""
        if self._limit:
            before = (f", as at the {in_a_row - 1} before it, all that optimizer.skip_nonfinite="
                      f"{self._limit} lets be skipped in a row")
        raise RunError(f"the loss is not finite at step {step} (loss {row['loss']}, gradient norm "
                       f"{row['gradient_norm']}){before}: stopped, {kept} is kept; try a lower "
                       "optimizer.learning_rate or a longer warm-up")


def _finite(row: Mapping[str, Any]) -> bool:
    return all(math.isfinite(row[name]) for name in ("loss", "gradient_norm"))


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over steps by name, of cells one by one; none without steps."""
    means: dict[str, float] = {}
    for name in rows[0] if rows else ():
        mean = np.mean([row[name] for row in rows], axis=0)
        means |= bins.named(name, mean) if mean.ndim else {name: float(mean)}
    means.pop("skipped_in_a_row", None)
    return means
