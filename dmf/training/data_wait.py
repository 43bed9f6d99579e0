"""Batches for the training loop, and the time for which the devices wait for them."""

import collections
import time
from typing import Any

import jax

from dmf.data.data_loader import Batches
from dmf.types import Batch

# Number of steps that the devices have not computed when the next one is dispatched to them: one
# that they compute, and one that follows without a gap.
STEPS_IN_FLIGHT = 2


class DataWait:
    """Takes the batches of a data loader, and measures how long the devices wait for them.

    A step is dispatched while the devices compute the one before. Without a bound the loop would
    run far ahead of them, and wait for batches that they do not need yet.
    """

    def __init__(self, batches: Batches):
        """Starts without steps.

        Args:
          batches: the batches, which are read ahead.
        """
        self._batches = batches
        self._in_flight: collections.deque[Any] = collections.deque()
        self.restart()

    def restart(self) -> None:
        """Measures from now on."""
        self._since, self._waited = time.perf_counter(), 0.0

    def next_batch(self) -> Batch:
        """The batch of the next step.

        If it is not read yet, the devices first finish all steps that they have; what follows is
        time in which they have nothing to do.
        """
        if len(self._in_flight) == STEPS_IN_FLIGHT:
            jax.block_until_ready(self._in_flight.popleft())
        if self._batches.is_ready():
            return next(self._batches)
        jax.block_until_ready(list(self._in_flight))
        self._in_flight.clear()
        began = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - began
        return batch

    def dispatched(self, outputs: Any) -> None:
        """Adds a step that was dispatched.

        Args:
          outputs: arrays that the step computes, and that no later step takes over.
        """
        self._in_flight.append(outputs)

    def fraction(self) -> float:
        """The fraction of the time since the last call, in [0, 1], for which the devices of this
        process had nothing to do because a batch was not read."""
        fraction = self._waited / max(time.perf_counter() - self._since, 1e-9)
        self.restart()
        return fraction
