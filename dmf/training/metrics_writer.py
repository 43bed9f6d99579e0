"""The metrics of a run as JSON lines, and where a run keeps its results."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from dmf.runtime.files import is_regular_file, write_text
from dmf.runtime.progress import log
from dmf.training.writers import Writer, WriterRun

METRICS_FILE = "metrics.jsonl"
# The name of the wall time among the values of a row.
WALL_TIME = "wall_time"
# Folders of a run: evaluations as STEP.json, and grids of samples as STEP.png.
EVALUATIONS = "evaluations"
SAMPLES = "samples"


def evaluation_file(workdir: epath.Path, step: int) -> epath.Path:
    """The file of the evaluation after a training step."""
    return workdir / EVALUATIONS / f"{step:08}.json"


def read_evaluation(path: epath.Path) -> dict[str, Any] | None:
    """The evaluation in a file, with one row of results or more; None if the file holds none, for
    example because it was cut short."""
    try:
        evaluation = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    rows = evaluation.get("results") if isinstance(evaluation, dict) else None
    is_one = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    return evaluation if is_one else None


class JsonLinesWriter(Writer):
    """The file metrics.jsonl in the workdir: a line for each step, with its wall time.

    A run that resumes at a step drops the rows of later steps that an earlier process wrote, so
    that every step has one row. In a bucket, whose files cannot be appended to, rows are buffered
    for at most a minute. `dmf report` reads this file.
    """

    def __init__(self, run: WriterRun):
        path = run.workdir / METRICS_FILE
        rows, invalid_lines = parse_metrics(run.workdir)
        for number in invalid_lines:
            log(f"{path}, line {number}: it cannot be read, and is left out")
        text = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= run.start_step)
        write_text(path, text)
        self._file = _BufferedFile(path, text) if _is_remote(path) else path.open("a")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step, rounded to 7 digits, and the wall time (seconds since 1970,
        UTC) as one row."""
        row = {"step": step, WALL_TIME: round(time.time(), 3)}
        row |= {name: float(f"{value:.7g}") for name, value in scalars.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def flush(self) -> None:
        if isinstance(self._file, _BufferedFile):
            self._file.close()

    def close(self) -> None:
        self._file.close()


def _is_remote(path: epath.Path) -> bool:
    """Whether a path is in a bucket, for example gs://..."""
    return "://" in os.fspath(path)


class _BufferedFile:
    """A text file in a bucket: lines are buffered; the whole file is rewritten once a minute."""

    INTERVAL_SECONDS = 60.0

    def __init__(self, path: epath.Path, text: str):
        """Starts with the current text of the file."""
        self._path, self._parts, self._written_at = path, [text], time.monotonic()

    def write(self, text: str) -> None:
        """Appends text to the buffer."""
        self._parts.append(text)

    def flush(self) -> None:
        """Rewrites the file if the last time was at least a minute ago."""
        if time.monotonic() - self._written_at >= self.INTERVAL_SECONDS:
            self.close()

    def close(self) -> None:
        """Rewrites the file; more text may follow."""
        write_text(self._path, "".join(self._parts))
        self._written_at = time.monotonic()


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of the metrics file of a run, without lines that cannot be read.

    Args:
      workdir: the workdir of the run.

    Returns:
      For each row a dictionary of `step` and scalars by name; [] without a file.
    """
    return parse_metrics(workdir)[0]


def parse_metrics(workdir: epath.PathLike) -> tuple[list[dict[str, Any]], list[int]]:
    """Parses the metrics file of a run.

    Returns:
      The rows, and the numbers (from 1) of the lines that cannot be read. A last line that is
      incomplete, because the run was killed, is neither.
    """
    path = epath.Path(workdir) / METRICS_FILE
    lines = path.read_bytes().split(b"\n") if is_regular_file(path) else []
    rows = [_parse_row(line) for line in lines]
    invalid = [number for number, (line, row) in enumerate(zip(lines, rows, strict=True), start=1)
               if row is None and line.strip() and number < len(lines)]
    return [row for row in rows if row is not None], invalid


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """A row, a dictionary of an integer `step` and numbers by name; None if the line is no row."""
    try:
        row = json.loads(line.decode())
        for name, value in row.items():
            name.encode()
            float(value if isinstance(value, int | float) else None)
        return row if isinstance(row["step"], int) else None
    except (ValueError, RecursionError, AttributeError, TypeError, OverflowError, KeyError):
        return None
