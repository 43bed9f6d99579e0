"""Progress on standard error: what is done, how fast, and the time left."""

import enum
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Verbosity(enum.Enum):
    """How much is printed to standard error."""

    QUIET = "errors alone"
    NORMAL = "progress, in a terminal as one live line"
    VERBOSE = "every line of progress, also in a terminal"


# Seconds between two states of the live line.
LIVE_SECONDS = 0.1
# Erases the line that the cursor is in.
_ERASE = "\r\x1b[K"


class _Screen:
    """What is shown in the terminal: the verbosity, and the text of the live line."""

    def __init__(self) -> None:
        self.verbosity, self.live, self.shown_at = Verbosity.NORMAL, "", -LIVE_SECONDS
        self._lock = threading.RLock()  # Handlers of signals print too.

    def write(self, line: str | None, live: str) -> None:
        """Prints a line above the live line, and replaces that; it never waits for long."""
        locked = self._lock.acquire(timeout=1.0)
        text = (_ERASE if self.live else "") + ("" if line is None else f"{line}\n") + live
        self.live = live
        # A full disk, a pipe without a reader, a closed file.
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                print(text, end="", file=sys.stderr, flush=True)
        if locked:
            self._lock.release()


_SCREEN = _Screen()


def set_verbosity(verbosity: Verbosity) -> None:
    """Sets how much this process prints."""
    _SCREEN.verbosity = verbosity


def verbosity() -> Verbosity:
    """How much this process prints."""
    return _SCREEN.verbosity


def log(line: str, *, always: bool = False) -> None:
    """Prints a line to standard error at once; a line that cannot be written ends no work.

    Args:
      line: the line.
      always: whether it is printed in spite of `Verbosity.QUIET`, as errors are.
    """
    if always or _SCREEN.verbosity is not Verbosity.QUIET:
        _SCREEN.write(line, _SCREEN.live)


def log_step(line: str) -> None:
    """Prints a line of a series about the same work, unless a live line shows it."""
    if not has_live_line() or _SCREEN.verbosity is Verbosity.VERBOSE:
        log(line)


def has_live_line() -> bool:
    """Whether standard error is a terminal in which a live line is shown."""
    try:
        is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        return False
    return is_terminal and _SCREEN.verbosity is not Verbosity.QUIET


def show(text: str) -> None:
    """Shows a text in the live line, the last line of a terminal, at most every `LIVE_SECONDS`;
    where standard error is no terminal, it does nothing."""
    now = time.perf_counter()
    if has_live_line() and now - _SCREEN.shown_at >= LIVE_SECONDS:
        _SCREEN.shown_at = now
        _SCREEN.write(None, text[: max(shutil.get_terminal_size().columns - 1, 1)])


def end_live_line() -> None:
    """Erases the live line."""
    if _SCREEN.live:
        _SCREEN.write(None, "")
        _SCREEN.shown_at = -LIVE_SECONDS


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
        """Adds units that are done; logs the progress if it is time to, and shows it in the live
        line of a terminal."""
        self._done += count
        now, is_complete = time.perf_counter(), self._done == self._total
        part = f"{self._name}: {self._done:,}/{self._total:,} {self._unit}"
        left = f"time left {self._clock.time_left(self._done)}"
        show(f"{part}  {left}")
        if now - self._logged_at >= self.INTERVAL_SECONDS or is_complete:
            self._logged_at = now
            line = f"{part}  {self._clock.rate(self._done):.1f} {self._unit}/s  {left}"
            if is_complete:
                end_live_line()
                log(line)
            else:
                log_step(line)
