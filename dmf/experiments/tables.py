"""Tables of several runs: how their configs differ, their progress, and all their numbers.

Numbers keep every digit that was written. Evaluations are labelled with their protocol, number of
samples and reference, so that numbers that cannot be compared never share a column.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dmf.evaluation.metrics import find_metric
from dmf.evaluation.result_rows import guidance_name
from dmf.experiments.runs import Run
from dmf.training.metrics_writer import WALL_TIME

EVALUATION_PREFIX = "evaluation/"
UNKNOWN_PROTOCOL = "protocol unknown"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Attributes:
      columns: names of the columns.
      rows: cells of each row: text, numbers, or None for an empty cell.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def to_csv(self) -> str:
        """The table as CSV, with a line of column names and floats to their last digit.

        >>> Table(columns=("run", "loss"), rows=(("a", 0.5), ("b", None))).to_csv()
        'run,loss\\na,0.5\\nb,\\n'
        """
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return file.getvalue()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One number of an evaluation.

    Attributes:
      run: name of the run.
      step: training step that was evaluated.
      protocol: protocol, number of samples and reference of the evaluation.
      metric: name of the metric.
      ema: name of the EMA parameters; empty for the raw parameters.
      steps: number of sampling steps.
      guidance: guidance scale and interval, where they were searched; empty otherwise.
      value: the number.
    """

    run: str
    step: int
    protocol: str
    metric: str
    ema: str
    steps: int
    guidance: str
    value: float

    @property
    def column(self) -> str:
        """The name of its column in the table of runs."""
        count = f"{self.steps} step{'s' * (self.steps > 1)}"
        parts = (self.metric, count, self.ema or "parameters", self.guidance)
        return f"{', '.join(filter(None, parts))} [{self.protocol}]"

    @property
    def higher_is_better(self) -> bool:
        """Whether the metric is known and a larger number is better."""
        return higher_is_better(self.metric)


def higher_is_better(metric: str) -> bool:
    """Whether a name is that of a registered metric of which a larger number is better."""
    found = find_metric(metric)
    return found is not None and found.higher_is_better


def _identity(evaluation: Mapping[str, Any]) -> str:
    """All settings that two evaluations must share to be compared, as JSON."""
    parts = [evaluation.get(f) for f in ("protocol", "reference", "networks", "count")]
    return json.dumps(parts, sort_keys=True)


def _short_label(evaluation: Mapping[str, Any]) -> str:
    return (f"{evaluation['protocol']['name']}, {evaluation.get('count')} samples, against "
            f"{evaluation['reference']['name']}")


def protocol_labels(runs: Sequence[Run]) -> dict[tuple[str, int], str]:
    """Labels of the protocol of each evaluation, by the name of the run and the step.

    Two evaluations have the same label if and only if they can be compared: if different settings
    would have the same words, a digest of the settings is added.
    """
    identities: dict[str, set[str]] = {}
    for evaluation in [e for run in runs for e in run.evaluations.values()]:
        identities.setdefault(_short_label(evaluation), set()).add(_identity(evaluation))

    def label(evaluation: Mapping[str, Any]) -> str:
        digest = hashlib.sha256(_identity(evaluation).encode()).hexdigest()[:6]
        short = _short_label(evaluation)
        return short if len(identities[short]) == 1 else f"{short}, variant {digest}"

    return {(run.name, step): label(e) for run in runs for step, e in run.evaluations.items()}


def scores(runs: Sequence[Run]) -> list[Score]:
    """Every number of every evaluation, in the order of runs and steps."""
    labels = protocol_labels(runs)
    return [
        Score(run=run.name, step=step, protocol=labels[run.name, step], metric=metric,
              ema=row["ema"], steps=row["steps"], guidance=guidance_name(row), value=row[metric])
        for run in runs
        for step, evaluation in sorted(run.evaluations.items())
        for row in evaluation["results"]
        for metric in evaluation["protocol"].get("metrics", ()) if metric in row
    ]  # fmt: skip


def final_scores(runs: Sequence[Run]) -> list[Score]:
    """The numbers of each run's last evaluation."""
    last = {run.name: max(run.evaluations, default=None) for run in runs}
    return [score for score in scores(runs) if score.step == last[score.run]]


def differing_fields(runs: Sequence[Run]) -> list[str]:
    """The dotted fields in which the configs differ; runs without a config are left out."""
    configs = [run.config for run in runs if run.config]
    fields = sorted({field for config in configs for field in config})
    return [f for f in fields if len({json.dumps(c.get(f, "unset")) for c in configs}) > 1]


def runs_table(runs: Sequence[Run]) -> Table:
    """A row for each run: the fields in which it differs, its last scores, its progress."""
    fields, final = differing_fields(runs), final_scores(runs)
    columns = sorted({(s.protocol, s.metric, s.ema, s.steps, s.column) for s in final})
    values = {(score.run, score.column): score.value for score in final}
    names = [name for *_, name in columns]
    return Table(
        columns=("run", *fields, *names, "loss", "steps", "of", "status", "steps_per_second",
                 "images_per_second", "evaluated_at", "note"),
        rows=tuple((
            run.name,
            *(_cell(run.config.get(field, "unset") if run.config else None) for field in fields),
            *(values.get((run.name, name)) for name in names),
            run.last_value("loss"),
            run.step,
            run.total_steps,
            run.status,
            *map(run.last_value, ("steps_per_second", "images_per_second")),
            max(run.evaluations, default=None),
            _note(run),
        ) for run in runs),
    )  # fmt: skip


def _note(run: Run) -> str:
    missing = [] if run.metrics else ["no metrics yet"]
    if not run.config:
        missing.append("no config can be read" if run.damages else "it ended before it wrote its "
                       "config")
    return "; ".join([*run.damages, *missing])


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float | str):
        return value
    return json.dumps(value)


def metrics_table(runs: Sequence[Run]) -> Table:
    """Every number of the runs' metrics: run, step, metric, value."""
    rows = tuple(
        (run.name, row["step"], metric, value)
        for run in runs for row in run.metrics
        for metric, value in row.items() if metric != "step"
    )
    return Table(columns=("run", "step", "metric", "value"), rows=rows)


def scores_table(runs: Sequence[Run]) -> Table:
    """Every number of the runs' evaluations, a row for each `Score`."""
    fields = tuple(field.name for field in dataclasses.fields(Score))
    rows = tuple(tuple(getattr(score, field) for field in fields) for score in scores(runs))
    return Table(columns=fields, rows=rows)


def curves(runs: Sequence[Run]) -> Iterator[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """Yields (title, lines) of the panels of metrics by training step: the loss, the gradient norm,
    and all others. Only evaluations with the same protocol share a panel; its label follows the
    name of the metric after a line break."""
    labels = protocol_labels(runs)
    panels: dict[str, dict[str, list]] = {"loss": {}, "gradient_norm": {}}
    for run in runs:
        for row in run.metrics:
            for metric, value in row.items():
                if metric in ("step", WALL_TIME):
                    continue
                title = metric
                if metric.startswith(EVALUATION_PREFIX):
                    label = labels.get((run.name, row["step"]), UNKNOWN_PROTOCOL)
                    title = f"{metric.removeprefix(EVALUATION_PREFIX)}\n[{label}]"
                lines = panels.setdefault(title, {})
                lines.setdefault(run.name, []).append((row["step"], value))
    return ((title, lines) for title, lines in panels.items() if lines)
