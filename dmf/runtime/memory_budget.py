"""A bound of the memory that threads take together."""

import contextlib
import threading
from collections.abc import Iterator


class MemoryBudget:
    """A number of bytes that threads share: who asks for more than is left waits.

    >>> budget = MemoryBudget(100)
    >>> with budget.hold(80):
    ...     pass
    """

    def __init__(self, total: int):
        """Nothing is held yet.

        Args:
          total: number of bytes that are held at once, unless one thread alone holds more.
        """
        self._total, self._held = total, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Holds some bytes within the context, which a thread must not nest.

        Args:
          size: number of bytes; more than the total are held by one thread at a time.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._total)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()
