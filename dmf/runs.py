"""What the directories of runs tell of them: configs, how far they came, what they measured.

Nothing is computed here but from the files that a run wrote. What cannot be read is told, and the
rest is taken.
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

from dmf import checkpoint, launching, report
from dmf.files import absolute
from dmf.logs import EVALUATIONS, METRICS_FILE, SAMPLES, evaluation_file, parsed_metrics
from dmf.typing import InputError, RunError

# What `dmf evaluate` writes into a run by default; taken where training evaluated nothing.
EVALUATION_FILE = "evaluation.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its directory tells it.

    Attributes:
      name: to tell it from the others.
      directory: its workdir.
      config: by dotted field; empty where there is none.
      step: of its newest checkpoint, 0 without one.
      metrics: the rows of its metrics, those of evaluations among them.
      evaluations: as they were written, by the step that was evaluated.
      grid: the newest picture of samples.
      ended: "complete", "failed" or "unfinished".
      damages: what could not be read, a line each.
    """

    name: str
    directory: epath.Path
    config: Mapping[str, Any]
    step: int
    metrics: tuple[Mapping[str, Any], ...]
    evaluations: Mapping[int, Mapping[str, Any]]
    grid: epath.Path | None
    ended: str
    damages: tuple[str, ...]

    @property
    def status(self) -> str:
        """How the run stands: as it ended, or "damaged"."""
        return "damaged" if self.damages else self.ended

    @property
    def total(self) -> int | None:
        """Steps that it is to take; None where no config says so."""
        return self.config.get("run.steps")

    def last(self, metric: str) -> float | None:
        """The newest value of a metric, None without one."""
        return next((row[metric] for row in reversed(self.metrics) if metric in row), None)


def complete(directory: epath.PathLike, steps: int, *, evaluates: bool) -> bool:
    """Whether a run has taken its steps, and evaluated the last one if it evaluates at all."""
    step = checkpoint.latest_step(directory)
    if step is None or step < steps:
        return False
    return step > steps or not evaluates or evaluation_file(epath.Path(directory), steps).exists()


def find(directories: Iterable[epath.PathLike]) -> list[Run]:
    """The runs that are directories, or lie right below them, as the runs of a sweep do.

    Raises:
      InputError: there is none in one of the directories.
    """
    found: dict[str, epath.Path] = {}
    for directory in map(absolute, directories):
        inside = [directory] if _is_run(directory) else _below(directory)
        if not inside:
            raise InputError(f"{directory}: it is no run, nor does it hold any; give the workdir "
                             "of dmf train or dmf sweep")
        found |= {os.fspath(path): path for path in inside}
    top = posixpath.commonpath(found) if len(found) > 1 else posixpath.dirname(next(iter(found)))
    return [read(path, posixpath.relpath(name, top)) for name, path in found.items()]


def _is_run(path: epath.Path) -> bool:
    """A run has a config, and is no export; one that failed early has but a log."""
    if (path / checkpoint.LIVE).exists():
        return False
    return any((path / f).exists() for f in (checkpoint.CONFIG_FILE, launching.LOG_FILE))


def _below(directory: epath.Path) -> list[epath.Path]:
    children = directory.iterdir() if directory.is_dir() else ()
    return sorted(filter(_is_run, children), key=lambda path: _natural(path.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """Orders split_depth=10 after split_depth=9."""
    return [(int(p), "") if p.isdigit() else (0, p) for p in re.split(r"(\d+)", name)]


def read(directory: epath.Path, name: str) -> Run:
    """A run as its directory tells it."""
    damages: list[str] = []
    config = _config(directory, damages)
    step = checkpoint.latest_step(directory) or 0
    return Run(
        name=name,
        directory=directory,
        config=config,
        step=step,
        metrics=_metrics(directory, damages),
        evaluations=_evaluations(directory, damages),
        grid=max((directory / SAMPLES).glob("*.png"), default=None, key=lambda path: path.name)
        if (directory / SAMPLES).exists() else None,
        ended=_ended(directory, config),
        damages=tuple(damages),
    )


def _ended(directory: epath.Path, config: Mapping[str, Any]) -> str:
    evaluates = config.get("evaluation.every", 0) > 0
    if "run.steps" in config and complete(directory, config["run.steps"], evaluates=evaluates):
        return "complete"
    log = directory / launching.LOG_FILE
    lines = _text(log).splitlines()
    return "failed" if lines and lines[-1].startswith(launching.FAILED) else "unfinished"


def _config(directory: epath.Path, damages: list[str]) -> dict[str, Any]:
    if not (directory / checkpoint.CONFIG_FILE).exists():
        return {}
    try:
        return flatten_dict(checkpoint.read_config(directory), sep=".")
    except (InputError, RunError) as error:
        damages.append(str(error))
        return {}


def _metrics(directory: epath.Path, damages: list[str]) -> tuple[dict[str, Any], ...]:
    """All rows that can be read; a last line that a kill cut short is no damage."""
    rows, bad = parsed_metrics(directory)
    damages += [f"{METRICS_FILE}, line {number}: it cannot be read" for number in bad]
    return tuple(rows)


def _text(path: epath.Path) -> str:
    """All of a file, whatever became of its characters; empty without one."""
    return path.read_bytes().decode(errors="replace") if path.exists() else ""


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _evaluations(directory: epath.Path, damages: list[str]) -> dict[int, dict[str, Any]]:
    folder, found = directory / EVALUATIONS, {}
    paths = sorted(folder.glob("[0-9]*.json")) if folder.exists() else []
    for path in paths or [directory / EVALUATION_FILE] * (directory / EVALUATION_FILE).exists():
        evaluation = _parsed(_text(path))
        if not _is_evaluation(evaluation):
            damages.append(f"{path.relative_to(directory)}: it is no evaluation, or of another "
                           "version")
        else:
            found[int(evaluation.get("step") or 0)] = evaluation
    return found


def _is_evaluation(value: Any) -> bool:
    """Whether it is of a flow map, and can be reported."""
    return report.is_evaluation(value) and all(
        {"steps", "ema"} <= row.keys() for row in value["results"]
    )
