"""Progress on standard error: what is done, how fast, and the time left."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


def log(line: str) -> None:
    """Prints a line to standard error at once; a line that cannot be written ends no work."""
    with suppress(OSError, ValueError):  # A full disk, a pipe without a reader, a closed file.
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time as hours, minutes and seconds.

    >>> duration(3723.2), duration(123.0)
    ('1:02:03', '2:03')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def waiting(
    what: str, log: Callable[[str], None] = log, *, after: float = 10.0, every: float = 30.0
) -> Iterator[None]:
    """A context for one long call, which logs how long it has taken so far.

    Args:
      what: what is done, for example "compiling the training step".
      log: prints a line.
      after: seconds before the first line; a call that ends earlier logs nothing.
      every: seconds between two lines.
    """
    start, ended = time.perf_counter(), threading.Event()

    def report() -> None:
        pause = after
        while not ended.wait(pause):
            log(f"{what}: {duration(time.perf_counter() - start)} so far")
            pause = every

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Clock:
    """Measures the rate of some work, and estimates the time left."""

    def __init__(self, done: int, total: int):
        """Starts the clock.

        Args:
          done: number of units that are done already.
          total: number of units at the end.
        """
        self._start, self._first, self._total = time.perf_counter(), done, total
        self._last = (self._start, done)

    def rate(self, done: int) -> float:
        """Units per second since the last call.

        Args:
          done: number of units that are done now.
        """
        (last_time, last_done), now = self._last, time.perf_counter()
        self._last = (now, done)
        return (done - last_done) / max(now - last_time, 1e-9)

    def time_left(self, done: int) -> str:
        """The time left at the mean rate since the start, for example "1:02:03" or "2:03".

        Args:
          done: number of units that are done now.
        """
        worked = max(done - self._first, 1)
        seconds = (time.perf_counter() - self._start) / worked * (self._total - done)
        return duration(seconds)


class Progress:
    """Logs the progress of some work every few seconds, and at its end."""

    INTERVAL_SECONDS = 5.0

    def __init__(self, name: str, done: int, total: int, unit: str):
        """Starts the clock.

        Args:
          name: name of the work, for example "samples".
          done: number of units that are done already.
          total: number of units at the end.
          unit: name of the units, for example "images".
        """
        self._name, self._done, self._total, self._unit = name, done, total, unit
        self._clock, self._logged_at = Clock(done, total), time.perf_counter()

    def add(self, count: int) -> None:
        """Adds units that are done, and logs the progress if it is time to."""
        self._done += count
        now = time.perf_counter()
        if now - self._logged_at >= self.INTERVAL_SECONDS or self._done == self._total:
            self._logged_at = now
            log(f"{self._name}: {self._done:,}/{self._total:,} {self._unit}  "
                f"{self._clock.rate(self._done):.1f} {self._unit}/s  time left "
                f"{self._clock.time_left(self._done)}")
