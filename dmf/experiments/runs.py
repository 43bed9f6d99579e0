"""Runs as their directories describe them: config, progress, metrics and evaluations.

Nothing is computed: everything comes from the files of a run. Files that cannot be read are listed,
and the other files are used.
"""

import dataclasses
import json
import math
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from dmf.checkpoints import params as stored_params
from dmf.errors import InputError, RunError
from dmf.experiments import evaluation_report, local_launcher
from dmf.runtime.files import absolute, is_regular_file
from dmf.training.metrics_writer import (
    EVALUATIONS,
    METRICS_FILE,
    SAMPLES,
    WALL_TIME,
    evaluation_file,
    parse_metrics,
    read_evaluation,
)

# The file that `dmf evaluate` writes into a run by default. It is read if training evaluated
# nothing.
EVALUATION_FILE = "evaluation.json"
# The name of a grid of samples without its suffix, its first bytes, and far more than it has.
_STEP, _PNG, _MAX_GRID_BYTES = re.compile(r"[0-9]{1,18}"), b"\x89PNG\r\n\x1a\n", 2**26
_DECIMAL = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its directory describes it.

    Attributes:
      name: name that distinguishes the run from the others.
      directory: its workdir.
      config: values by dotted field; empty without a readable config.
      step: step of its newest checkpoint; 0 without one.
      metrics: rows of its metrics, including those of evaluations.
      evaluations: evaluations by the step that was evaluated.
      grid: newest grid of samples; None without one.
      completion: "complete", "failed" or "unfinished".
      damages: a line for each file that could not be read.
    """

    name: str
    directory: epath.Path
    config: Mapping[str, Any]
    step: int
    metrics: tuple[Mapping[str, Any], ...]
    evaluations: Mapping[int, Mapping[str, Any]]
    grid: epath.Path | None
    completion: str
    damages: tuple[str, ...]

    @property
    def status(self) -> str:
        """Its completion, or "damaged" if a file could not be read."""
        return "damaged" if self.damages else self.completion

    @property
    def hours(self) -> dict[int, float]:
        """Wall-clock hours since the first row of metrics, by step; empty if rows have no time."""
        times = {row["step"]: row[WALL_TIME] for row in self.metrics
                 if math.isfinite(row.get(WALL_TIME, math.nan))}  # fmt: skip
        first = min(times.values(), default=0.0)
        return {step: (time - first) / 3600 for step, time in times.items()}

    @property
    def total_steps(self) -> int | None:
        """Number of training steps in its config; None without a config."""
        return self.config.get("run.steps")

    def last_value(self, metric: str) -> float | None:
        """The newest value of a metric; None without one."""
        return next((row[metric] for row in reversed(self.metrics) if metric in row), None)


def is_complete(directory: epath.PathLike, steps: int, *, evaluates: bool) -> bool:
    """Whether a run has taken all its steps, and has evaluated the last one if it evaluates.

    Args:
      directory: workdir of the run.
      steps: number of training steps in its config.
      evaluates: whether its config evaluates while training.
    """
    step = stored_params.latest_step(directory) or 0
    return _is_complete(epath.Path(directory), step, steps, evaluates=evaluates)


def _is_complete(directory: epath.Path, step: int, steps: int, *, evaluates: bool) -> bool:
    if not step or step < steps:
        return False
    done = step > steps or not evaluates
    return done or read_evaluation(evaluation_file(directory, steps)) is not None


def find_runs(directories: Iterable[epath.PathLike]) -> list[Run]:
    """Reads the runs that are among some directories, or right below one of them, as in a sweep;
    in the order of their names, in which 0.002 precedes 0.01.

    Raises:
      InputError: one of the directories holds no run.
    """
    paths: dict[str, epath.Path] = {}
    for directory in map(absolute, directories):
        inside = [directory] if _is_run(directory) else _runs_below(directory)
        if not inside:
            raise InputError(os.fspath(directory), remedy="it is no run and holds none; give the "
                             "workdir of dmf train or dmf sweep")
        paths |= {os.fspath(path): path for path in inside}
    by_name = dict(zip(_names(list(paths)), paths.values(), strict=True))
    return [read_run(by_name[name], name) for name in sorted(by_name, key=_natural_order)]


def _names(paths: Sequence[str]) -> list[str]:
    """The paths from the folder that has all of them; whole ones where some are in buckets, and
    others are not.

    >>> _names(["/runs/a/1", "/runs/b/1"]), _names(["gs://bucket/a", "/runs/a"])
    (['a/1', 'b/1'], ['gs://bucket/a', '/runs/a'])
    """
    if len({"://" in path for path in paths}) > 1:
        return list(paths)
    top = posixpath.commonpath(paths) if len(paths) > 1 else posixpath.dirname(paths[0])
    return [posixpath.relpath(path, top) for path in paths]


def _is_run(path: epath.Path) -> bool:
    """Whether a directory has a config and is no export, or has a log: a run that failed early."""
    if (path / stored_params.PARAMS).exists():
        return False
    return any((path / f).exists() for f in (stored_params.CONFIG_FILE, local_launcher.LOG_FILE))


def _runs_below(directory: epath.Path) -> list[epath.Path]:
    children = directory.iterdir() if directory.is_dir() else ()
    return list(filter(_is_run, children))


def _natural_order(name: str) -> list[tuple[float, str]]:
    """A sort key that puts split_depth=10 after split_depth=9, and lr=0.002 between 0.001 and 0.01.

    >>> sorted(["lr=0.01", "lr=0.002", "lr=1e-05", "lr=10"], key=_natural_order)
    ['lr=1e-05', 'lr=0.002', 'lr=0.01', 'lr=10']
    """
    parts = enumerate(_DECIMAL.split(name))
    return [(float(part), part) if i % 2 else (0.0, part) for i, part in parts]


def read_run(directory: epath.Path, name: str) -> Run:
    """Reads a run from its directory, as far as its files can be read."""
    damages: list[str] = []
    config = _config(directory, damages)
    step = _step(directory, damages)
    return Run(
        name=_printable(name),
        directory=directory,
        config=config,
        step=step,
        metrics=_metrics(directory, damages),
        evaluations=_evaluations(directory, damages),
        grid=_newest_grid(directory, damages),
        completion=_completion(directory, config, step),
        damages=tuple(map(_printable, damages)),
    )


def _printable(text: str) -> str:
    """A text whose bytes that are no UTF-8, as file names may have, are written as \\xNN."""
    return os.fsencode(text).decode(errors="backslashreplace")


def _step(directory: epath.Path, damages: list[str]) -> int:
    """The step of the newest checkpoint; 0 without one."""
    try:
        return stored_params.latest_step(directory) or 0
    except (OSError, ValueError) as error:
        damages.append(f"{stored_params.CHECKPOINTS}: it cannot be read ({error})")
        return 0


def _newest_grid(directory: epath.Path, damages: list[str]) -> epath.Path | None:
    folder = directory / SAMPLES
    paths = sorted(folder.glob("*.png"), reverse=True) if folder.is_dir() else []
    for path in paths:
        if _is_grid(directory, path):
            return path
        damages.append(f"{path.relative_to(directory)}: it is no grid of this run, and is left out")
    return None


def _is_grid(directory: epath.Path, path: epath.Path) -> bool:
    """Whether a path is a grid of samples that lies in the run itself: a link could put any file of
    this machine into the report."""
    inside = os.path.join(os.path.realpath(directory), SAMPLES, path.name)
    is_inside = os.path.realpath(path) == inside and is_regular_file(path)
    if not is_inside or not _STEP.fullmatch(path.stem):
        return False
    return path.stat().length <= _MAX_GRID_BYTES and path.read_bytes().startswith(_PNG)


def _completion(directory: epath.Path, config: Mapping[str, Any], step: int) -> str:
    total, evaluates = config.get("run.steps"), config.get("evaluation.every", 0) > 0
    if total is not None and _is_complete(directory, step, total, evaluates=evaluates):
        return "complete"
    lines = _text(directory / local_launcher.LOG_FILE).splitlines()
    failed = bool(lines) and lines[-1].startswith(local_launcher.FAILURE_LINE)
    return "failed" if failed else "unfinished"


def _config(directory: epath.Path, damages: list[str]) -> dict[str, Any]:
    if not (directory / stored_params.CONFIG_FILE).exists():
        return {}
    try:
        config = flatten_dict(stored_params.read_config(directory), sep=".")
        for field in ("run.steps", "evaluation.every"):
            if not isinstance(config.get(field, 0), int):
                damages.append(f"{stored_params.CONFIG_FILE}: {field}={config.pop(field)!r:.80} is "
                               "no whole number")
        return config
    except (InputError, RunError) as error:
        damages.append(str(error))
        return {}


def _metrics(directory: epath.Path, damages: list[str]) -> tuple[dict[str, Any], ...]:
    """All rows that can be read; a last line that a kill cut short is no damage."""
    rows, invalid_lines = parse_metrics(directory)
    damages += [f"{METRICS_FILE}, line {number}: it cannot be read" for number in invalid_lines]
    return tuple(rows)


def _text(path: epath.Path) -> str:
    """The text of a file, with damaged characters replaced; empty without the file."""
    return path.read_bytes().decode(errors="replace") if is_regular_file(path) else ""


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _evaluations(directory: epath.Path, damages: list[str]) -> dict[int, dict[str, Any]]:
    folder, evaluations = directory / EVALUATIONS, {}
    paths = sorted(folder.glob("[0-9]*.json")) if folder.is_dir() else []
    for path in paths or [directory / EVALUATION_FILE] * (directory / EVALUATION_FILE).exists():
        evaluation = _parse_json(_text(path))
        if not _is_flow_map_evaluation(evaluation):
            damages.append(f"{path.relative_to(directory)}: it is no evaluation, or of another "
                           "version")
        else:
            evaluations[evaluation.get("step") or 0] = evaluation
    return evaluations


def _is_flow_map_evaluation(value: Any) -> bool:
    if not evaluation_report.is_evaluation(value):
        return False
    step = value.get("step")
    rows = all(map(evaluation_report.is_flow_map_row, value["results"]))
    return rows and (step is None or (isinstance(step, int) and 0 <= step < 2**63))
