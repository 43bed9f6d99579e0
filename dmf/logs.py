"""What a run says while it goes: metrics as JSON lines and TensorBoard events, and progress."""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

METRICS_FILE = "metrics.jsonl"
# Folders of a run: what was measured, and grids of samples, each a file by its step.
EVALUATIONS = "evaluations"
SAMPLES = "samples"


def evaluation_file(workdir: epath.Path, step: int) -> epath.Path:
    """What was measured after a step."""
    return workdir / EVALUATIONS / f"{step:08}.json"


class MetricsWriter:
    """Scalars by step in `metrics.jsonl` and in TensorBoard's event files.

    A run that resumes at a step drops what an earlier process wrote from there on, so that every
    step stands once.
    """

    def __init__(self, workdir: epath.Path, start_step: int):
        from tensorboardX import SummaryWriter

        self._path = workdir / METRICS_FILE
        kept = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        # Beside it, and then in its place: whoever is killed here loses nothing.
        partial = self._path.parent / f".{METRICS_FILE}.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self._path)
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(workdir / "events"), purge_step=start_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one line; `scalars` become floats of 7 digits."""
        row = {"step": step} | {name: float(f"{value:.7g}") for name, value in scalars.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both files."""
        self._file.close()
        self._events.close()


class NoMetrics:
    """What the processes have that do not write."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's metrics; a last line that a kill cut short is left out."""
    path = epath.Path(workdir) / METRICS_FILE
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def say(line: str) -> None:
    """Prints a line of progress at once."""
    print(line, file=sys.stderr, flush=True)


class Clock:
    """Rate and time left of work that counts from `done` to `total`."""

    def __init__(self, done: int, total: int):
        self._start, self._first, self._total = time.perf_counter(), done, total
        self._mark = (self._start, done)

    def rate(self, done: int) -> float:
        """Units a second since the last call."""
        (then, before), now = self._mark, time.perf_counter()
        self._mark = (now, done)
        return (done - before) / max(now - then, 1e-9)

    def left(self, done: int) -> str:
        """Time left at the average rate so far, as 1:02:03."""
        worked = max(done - self._first, 1)
        seconds = (time.perf_counter() - self._start) / worked * (self._total - done)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Says how far some work is, every few seconds and at its end."""

    SECONDS = 5.0

    def __init__(self, what: str, done: int, total: int, unit: str):
        """Begins at `done` of `total` units."""
        self._what, self._done, self._total, self._unit = what, done, total, unit
        self._clock, self._said = Clock(done, total), time.perf_counter()

    def add(self, count: int) -> None:
        """Takes note of `count` more units."""
        self._done += count
        now = time.perf_counter()
        if now - self._said >= self.SECONDS or self._done == self._total:
            self._said = now
            say(f"{self._what}: {self._done:,}/{self._total:,} {self._unit}  "
                f"{self._clock.rate(self._done):.1f}/s  left {self._clock.left(self._done)}")
