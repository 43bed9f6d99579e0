"""What a run says while it goes: metrics as JSON lines and TensorBoard events, and progress."""

import json
import os
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
    step stands once. In a bucket, where nothing can be added to a file, rows are kept back for a
    minute at most.
    """

    def __init__(self, workdir: epath.Path, start_step: int):
        from tensorboardX import SummaryWriter

        path = workdir / METRICS_FILE
        rows, bad = parsed_metrics(workdir)
        for number in bad:
            say(f"{path}, line {number}: it cannot be read, and is left out")
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= start_step)
        _replace(path, kept)
        self._file = _Rewritten(path, kept) if _remote(path) else path.open("a")
        self._events = SummaryWriter(str(workdir / "events"), purge_step=start_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one line; `scalars` become floats of 7 digits."""
        row = {"step": step} | {name: float(f"{value:.7g}") for name, value in scalars.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes what is kept back, for a checkpoint to be saved after its metrics."""
        if isinstance(self._file, _Rewritten):
            self._file.close()

    def close(self) -> None:
        """Flushes both files."""
        self._file.close()
        self._events.close()


def _remote(path: epath.Path) -> bool:
    """Whether a path is one of a bucket, gs://..."""
    return "://" in os.fspath(path)


def _replace(path: epath.Path, text: str) -> None:
    """Writes a file beside itself, and then in its place: whoever is killed here loses nothing."""
    partial = path.parent / f".{path.name}.partial"
    partial.write_text(text)
    partial.replace(path)


class _Rewritten:
    """A text file to which lines are added where files are written as a whole alone: they are kept
    here, and written every so often."""

    SECONDS = 60.0

    def __init__(self, path: epath.Path, text: str):
        """Begins with the text that the file has."""
        self._path, self._parts, self._written = path, [text], time.monotonic()

    def write(self, text: str) -> None:
        """Adds some text."""
        self._parts.append(text)

    def flush(self) -> None:
        """Writes the file unless that was done a short while ago."""
        if time.monotonic() - self._written >= self.SECONDS:
            self.close()

    def close(self) -> None:
        """Writes the file."""
        _replace(self._path, "".join(self._parts))
        self._written = time.monotonic()


class NoMetrics:
    """What the processes have that do not write."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's metrics; lines that cannot be read are left out."""
    return parsed_metrics(workdir)[0]


def parsed_metrics(workdir: epath.PathLike) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a run's metrics, and which lines, counted from 1, cannot be read.

    A last line that a kill cut short is neither.
    """
    path = epath.Path(workdir) / METRICS_FILE
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = [_row(line) for line in lines]
    bad = [number for number, (line, row) in enumerate(zip(lines, rows, strict=True), start=1)
           if row is None and line.strip() and number < len(lines)]
    return [row for row in rows if row is not None], bad


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics, a step and numbers by name; None if it is no such thing."""
    try:
        row = json.loads(line.decode())
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row if all(isinstance(value, int | float) for value in row.values()) else None


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
