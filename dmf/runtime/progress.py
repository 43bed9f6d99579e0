"""Progress on standard error: what is done, how fast, and the time left."""

import sys
import time
from contextlib import suppress


def log(line: str) -> None:
    """Prints a line to standard error at once; a line that cannot be written ends no work."""
    with suppress(OSError, ValueError):  # A full disk, a pipe without a reader, a closed file.
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)


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
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


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
