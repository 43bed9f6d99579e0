"""Runs as their directories describe them: config, progress, metrics and evaluations.

Nothing is computed: everything comes from the files of a run. Files that cannot be read are listed,
and the other files are used.
"""

import dataclasses
import json
import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from dmf.checkpoints import params as stored_params
from dmf.errors import InputError, RunError
from dmf.experiments import evaluation_report, local_launcher
from dmf.runtime.files import absolute
from dmf.training.metrics_writer import (
    EVALUATIONS,
    METRICS_FILE,
    SAMPLES,
    evaluation_file,
    parse_metrics,
)

# The file that `dmf evaluate` writes into a run by default. It is read if training evaluated
# nothing.
EVALUATION_FILE = "evaluation.json"


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
    step = stored_params.latest_step(directory)
    if step is None or step < steps:
        return False
    return step > steps or not evaluates or evaluation_file(epath.Path(directory), steps).exists()


def find_runs(directories: Iterable[epath.PathLike]) -> list[Run]:
    """Reads the runs that are among some directories, or right below one of them, as in a sweep.

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
    top = posixpath.commonpath(paths) if len(paths) > 1 else posixpath.dirname(next(iter(paths)))
    return [read_run(path, posixpath.relpath(name, top)) for name, path in paths.items()]


def _is_run(path: epath.Path) -> bool:
    """Whether a directory has a config and is no export, or has a log: a run that failed early."""
    if (path / stored_params.PARAMS).exists():
        return False
    return any((path / f).exists() for f in (stored_params.CONFIG_FILE, local_launcher.LOG_FILE))


def _runs_below(directory: epath.Path) -> list[epath.Path]:
    children = directory.iterdir() if directory.is_dir() else ()
    return sorted(filter(_is_run, children), key=lambda path: _natural_order(path.name))


def _natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that puts split_depth=10 after split_depth=9."""
    return [(int(p), "") if p.isdigit() else (0, p) for p in re.split(r"(\d+)", name)]


def read_run(directory: epath.Path, name: str) -> Run:
    """Reads a run from its directory, as far as its files can be read."""
    damages: list[str] = []
    config = _config(directory, damages)
    return Run(
        name=name,
        directory=directory,
        config=config,
        step=stored_params.latest_step(directory) or 0,
        metrics=_metrics(directory, damages),
        evaluations=_evaluations(directory, damages),
        grid=_newest_grid(directory),
        completion=_completion(directory, config),
        damages=tuple(damages),
    )


def _newest_grid(directory: epath.Path) -> epath.Path | None:
    folder = directory / SAMPLES
    grids = folder.glob("*.png") if folder.exists() else ()
    return max(grids, default=None, key=lambda path: path.name)


def _completion(directory: epath.Path, config: Mapping[str, Any]) -> str:
    evaluates = config.get("evaluation.every", 0) > 0
    if "run.steps" in config and is_complete(directory, config["run.steps"], evaluates=evaluates):
        return "complete"
    lines = _text(directory / local_launcher.LOG_FILE).splitlines()
    failed = bool(lines) and lines[-1].startswith(local_launcher.FAILURE_LINE)
    return "failed" if failed else "unfinished"


def _config(directory: epath.Path, damages: list[str]) -> dict[str, Any]:
    if not (directory / stored_params.CONFIG_FILE).exists():
        return {}
    try:
        return flatten_dict(stored_params.read_config(directory), sep=".")
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
    return path.read_bytes().decode(errors="replace") if path.exists() else ""


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _evaluations(directory: epath.Path, damages: list[str]) -> dict[int, dict[str, Any]]:
    folder, evaluations = directory / EVALUATIONS, {}
    paths = sorted(folder.glob("[0-9]*.json")) if folder.exists() else []
    for path in paths or [directory / EVALUATION_FILE] * (directory / EVALUATION_FILE).exists():
        evaluation = _parse_json(_text(path))
        if not _is_flow_map_evaluation(evaluation):
            damages.append(f"{path.relative_to(directory)}: it is no evaluation, or of another "
                           "version")
        else:
            evaluations[int(evaluation.get("step") or 0)] = evaluation
    return evaluations


def _is_flow_map_evaluation(value: Any) -> bool:
    return evaluation_report.is_evaluation(value) and all(
        {"steps", "ema"} <= row.keys() for row in value["results"]
    )
