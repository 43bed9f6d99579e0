"""A search of guidance at sampling: a table and a plot of a metric over the guidance scale, with a
line for each interval."""

from collections.abc import Mapping

from etils import epath

from dmf.evaluation.result_rows import best_row, interval_name, row_name
from dmf.experiments.evaluation_report import (
    Evaluation,
    format_score,
    metric_title,
    protocol_note,
)
from dmf.experiments.plots import plot_panels
from dmf.runtime.files import new_file

# What separates columns, within a cell.
_ESCAPED = "\\|"


def is_searched(evaluation: Evaluation) -> bool:
    """Whether the rows of an evaluation have guidance scales and intervals."""
    return all("guidance" in row for row in evaluation["results"])


def markdown_table(evaluation: Evaluation, metric: str) -> str:
    """A Markdown table: a row for each EMA, number of steps and interval, a column for each scale.

    Args:
      evaluation: an evaluation in which guidance was searched.
      metric: name of the metric in the cells; the best of them is bold.

    Returns:
      The table, and below it the best row, the protocol, the number of samples and the reference.
    """
    rows = evaluation["results"]
    best = best_row(rows, metric)
    scales = sorted({row["guidance"] for row in rows})
    lines: dict[tuple[str, ...], dict[float, str]] = {}
    emas = list(dict.fromkeys(row["ema"] for row in rows))
    for row in sorted(rows, key=lambda row: (emas.index(row["ema"]), row["steps"])):
        score = format_score(metric, row[metric])
        place = (row["ema"] or "parameters", str(row["steps"]), interval_name(row))
        lines.setdefault(place, {})[row["guidance"]] = f"**{score}**" if row is best else score
    head = ["EMA", "steps", "interval", *(f"scale {scale:g}" for scale in scales)]
    body = [[*place, *(cells.get(scale, "") for scale in scales)] for place, cells in lines.items()]
    table = [f"| {' | '.join(cell.replace('|', _ESCAPED) for cell in line)} |"
             for line in (head, ["---"] * len(head), *body)]  # fmt: skip
    note = f"{metric_title(metric)}."
    if best is not None:
        note += f" The best row is {row_name(best)}: {format_score(metric, best[metric])}."
    return "\n".join([*table, "", note, protocol_note(evaluation, metric)])


def plot_search(path: epath.Path, evaluations: Mapping[str, Evaluation], metric: str) -> None:
    """Plots a metric over the guidance scale: a panel for each EMA and number of steps, with a line
    for each interval.

    Args:
      path: PNG file to write.
      evaluations: evaluations in which guidance was searched, by their name in the titles.
      metric: name of the metric.

    Raises:
      InputError: matplotlib is not installed.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, evaluation in evaluations.items():
        for row in evaluation["results"]:
            without = {"ema": row["ema"], "steps": row["steps"]}
            title = ", ".join(filter(None, (name, row_name(without))))
            lines = panels.setdefault(f"{metric_title(metric)}, {title}", {})
            points = lines.setdefault(f"interval {interval_name(row)}", [])
            points.append((row["guidance"], row[metric]))
    for lines in panels.values():
        for points in lines.values():
            points.sort()
    intervals = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    picture = plot_panels(panels, intervals, "guidance scale")
    with new_file(path) as partial:
        partial.write_bytes(picture)
