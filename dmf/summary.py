"""Tables of several runs: how they differ, how they stand, every number that they wrote.

Numbers stand as they were written. Those of evaluations are named by the measure that they are of,
protocol, number of samples and reference, so that numbers of two measures never share a column.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dmf.protocols import DISTANCES
from dmf.runs import Run

PREFIX = "evaluation/"
UNKNOWN = "protocol unknown"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells: text, numbers, or None for nothing."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def as_csv(self) -> str:
        """With a line of names; floats to their last digit."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return file.getvalue()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One number of an evaluation.

    Attributes:
      run: its name.
      step: of training that was evaluated.
      measure: protocol, samples and reference.
      metric, ema, steps, value: what was measured, of which average, in how many sampling steps.
    """

    run: str
    step: int
    measure: str
    metric: str
    ema: str
    steps: int
    value: float

    @property
    def column(self) -> str:
        """What its column is called."""
        count = f"{self.steps} step{'s' * (self.steps > 1)}"
        return f"{self.metric}, {count}, {self.ema or 'parameters'} [{self.measure}]"

    @property
    def is_distance(self) -> bool:
        """Whether less is better."""
        return self.metric in DISTANCES


def _identity(evaluation: Mapping[str, Any]) -> str:
    """All that must be equal for numbers to be compared."""
    parts = [evaluation.get(f) for f in ("protocol", "reference", "networks", "count")]
    return json.dumps(parts, sort_keys=True)


def _described(evaluation: Mapping[str, Any]) -> str:
    return (f"{evaluation['protocol']['name']}, {evaluation.get('count')} samples, against "
            f"{evaluation['reference']['name']}")


def measures(runs: Sequence[Run]) -> dict[tuple[str, int], str]:
    """What each evaluation, by run and step, measured by; in words, and where two that differ have
    the same words, by a digest too."""
    all_of_them = [e for run in runs for e in run.evaluations.values()]
    words: dict[str, set[str]] = {}
    for evaluation in all_of_them:
        words.setdefault(_described(evaluation), set()).add(_identity(evaluation))

    def told(evaluation: Mapping[str, Any]) -> str:
        digest = hashlib.sha256(_identity(evaluation).encode()).hexdigest()[:6]
        said = _described(evaluation)
        return said if len(words[said]) == 1 else f"{said}, variant {digest}"

    return {(run.name, step): told(e) for run in runs for step, e in run.evaluations.items()}


def scores(runs: Sequence[Run]) -> list[Score]:
    """Every number of every evaluation, in the order of runs and steps."""
    named = measures(runs)
    return [
        Score(run=run.name, step=step, measure=named[run.name, step], metric=metric,
              ema=row["ema"], steps=row["steps"], value=row[metric])
        for run in runs
        for step, evaluation in sorted(run.evaluations.items())
        for row in evaluation["results"]
        for metric in evaluation["protocol"].get("metrics", ()) if metric in row
    ]  # fmt: skip


def final_scores(runs: Sequence[Run]) -> list[Score]:
    """Those of each run's last evaluation."""
    last = {run.name: max(run.evaluations, default=None) for run in runs}
    return [score for score in scores(runs) if score.step == last[score.run]]


def differing(runs: Sequence[Run]) -> list[str]:
    """The fields that not all configs agree on; runs without one are left out."""
    configs = [run.config for run in runs if run.config]
    fields = sorted({field for config in configs for field in config})
    return [f for f in fields if len({json.dumps(c.get(f, "unset")) for c in configs}) > 1]


def of_runs(runs: Sequence[Run]) -> Table:
    """A row a run: where it differs, how far it came, its last numbers."""
    fields, final = differing(runs), final_scores(runs)
    columns = sorted({(s.measure, s.metric, s.ema, s.steps, s.column) for s in final})
    found = {(score.run, score.column): score.value for score in final}
    names = [name for *_, name in columns]
    return Table(
        columns=("run", *fields, "steps", "of", "status", "loss", "steps_per_second",
                 "images_per_second", "evaluated_at", *names, "note"),
        rows=tuple((
            run.name,
            *(_cell(run.config.get(field, "unset") if run.config else None) for field in fields),
            run.step,
            run.total,
            run.status,
            *map(run.last, ("loss", "steps_per_second", "images_per_second")),
            max(run.evaluations, default=None),
            *(found.get((run.name, name)) for name in names),
            _note(run),
        ) for run in runs),
    )  # fmt: skip


def _note(run: Run) -> str:
    missing = [] if run.metrics else ["no metrics yet"]
    if not run.config:
        missing.append("no config can be read" if run.damages else "it did not get as far as "
                       "writing its config")
    return "; ".join([*run.damages, *missing])


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float | str):
        return value
    return json.dumps(value)


def of_metrics(runs: Sequence[Run]) -> Table:
    """Every number of the runs' metrics: run, step, metric, value."""
    rows = tuple(
        (run.name, row["step"], metric, value)
        for run in runs for row in run.metrics
        for metric, value in row.items() if metric != "step"
    )
    return Table(columns=("run", "step", "metric", "value"), rows=rows)


def of_scores(runs: Sequence[Run]) -> Table:
    """Every number of the runs' evaluations, with what it is of."""
    fields = tuple(field.name for field in dataclasses.fields(Score))
    rows = tuple(tuple(getattr(score, field) for field in fields) for score in scores(runs))
    return Table(columns=fields, rows=rows)


def curves(runs: Sequence[Run]) -> Iterator[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """What is worth a picture, by title: for each run that has it, its values by step.

    An evaluation is drawn with others by the same measure alone.
    """
    named, panels = measures(runs), {"loss": {}, "gradient_norm": {}}
    for run in runs:
        for row in run.metrics:
            for metric, value in row.items():
                title = metric
                if metric.startswith(PREFIX):
                    measure = named.get((run.name, row["step"]), UNKNOWN)
                    title = f"{metric.removeprefix(PREFIX)}\n[{measure}]"
                elif metric not in panels:
                    continue
                lines = panels.setdefault(title, {})
                lines.setdefault(run.name, []).append((row["step"], value))
    return ((title, lines) for title, lines in panels.items() if lines)
