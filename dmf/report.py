"""Several evaluations side by side: a table of a metric against steps, and its picture."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dmf.figures import blank, png
from dmf.typing import InputError

Evaluation = dict[str, Any]
Curve = dict[int, Mapping[str, Any]]
# What a metric is called in a table; others go by their names.
_TITLES = {"fid": "FID", "sfid": "sFID", "fd_dinov2": "FD-DINOv2", "fd_pixels": "Frechet distance",
           "inception_score": "Inception score"}  # fmt: skip
_SHARES = ("label_agreement", "precision", "recall")


def read(path: epath.PathLike) -> Evaluation:
    """An evaluation as `dmf evaluate` wrote it.

    Raises:
      InputError: the file is not one, or has no numbers of steps.
    """
    try:
        evaluation = json.loads(epath.Path(path).read_bytes().decode())
    except ValueError:
        evaluation = None
    rows = evaluation["results"] if is_evaluation(evaluation) else []
    if rows and not any("steps" in row for row in rows):
        raise InputError(f"{path}: it measures a set of images, which has no numbers of steps")
    if not rows or not all(map(_is_of_steps, rows)):
        raise InputError(f"{path}: not a file that dmf evaluate wrote")
    return evaluation


def is_evaluation(value: Any) -> bool:
    """Whether JSON has what every evaluation has: a protocol, a reference, and rows of numbers."""
    parts = value if isinstance(value, dict) else {}
    protocol, reference, rows = (parts.get(f) for f in ("protocol", "reference", "results"))
    if not all(isinstance(part, dict) and "name" in part for part in (protocol, reference)):
        return False
    metrics = protocol.get("metrics")
    named = isinstance(metrics, list) and metrics and all(isinstance(m, str) for m in metrics)
    return bool(named) and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def _is_of_steps(row: Mapping[str, Any]) -> bool:
    """Whether a row says of which average, in how many steps, from how many samples it is."""
    numbers = all(isinstance(row.get(field), int) for field in ("steps", "count"))
    return numbers and isinstance(row.get("ema"), str)


def check(evaluations: Mapping[str, Evaluation], metric: str) -> None:
    """Raises InputError where evaluations cannot stand side by side."""
    first, *others = evaluations
    for name, evaluation in evaluations.items():
        if not all(isinstance(row.get(metric), int | float) for row in evaluation["results"]):
            raise InputError(f"metric={metric}: {name} has "
                             f"{', '.join(evaluation['protocol']['metrics'])}")
    for field in ("protocol", "reference"):
        for name in others:
            a, b = (evaluations[n][field]["name"] for n in (first, name))
            if a != b:
                raise InputError(f"{name}: its {field} is {b}, and that of {first} is {a}; numbers "
                                 "of two cannot be compared")


def _curves(evaluations: Mapping[str, Evaluation]) -> Iterator[tuple[str, Curve]]:
    """The rows of each evaluation, and of each of its averages, by their number of steps."""
    for name, evaluation in evaluations.items():
        rows = evaluation["results"]
        emas = list(dict.fromkeys(row["ema"] for row in rows))
        for ema in emas:
            label = name if len(emas) == 1 else f"{name} ({ema or 'parameters'})"
            found = {row["steps"]: row for row in rows if row["ema"] == ema}
            yield label, dict(sorted(found.items()))


def _steps(evaluations: Mapping[str, Evaluation]) -> list[int]:
    return sorted({row["steps"] for e in evaluations.values() for row in e["results"]})


def table(evaluations: Mapping[str, Evaluation], metric: str) -> str:
    """Markdown: a row an evaluation, a column a number of steps, and what the numbers are.

    A cell holds the metric and, where there are labels, the label agreement.
    """
    steps, curves = _steps(evaluations), dict(_curves(evaluations))
    agreement = any("label_agreement" in row for curve in curves.values() for row in curve.values())
    title = _TITLES.get(metric, metric)
    title += " (label agreement)" * (agreement and metric != "label_agreement")
    names = [f"{n} step" if n == 1 else f"{n} steps" for n in steps]
    lines = [f"| {title} | " + " | ".join(names) + " |", "|" + "---|" * (len(steps) + 1)]
    for name, curve in curves.items():
        cells = [_cell(curve[n], metric) if n in curve else "" for n in steps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _note(next(iter(evaluations.values())), metric)])


def _note(evaluation: Evaluation, metric: str) -> str:
    counts = sorted({row["count"] for row in evaluation["results"]})
    said = (f"Protocol {evaluation['protocol']['name']}, {', '.join(f'{n:,}' for n in counts)} "
            f"samples, against {evaluation['reference']['name']}.")
    halves = evaluation["reference"].get("halves_distance")
    if metric == "fd_pixels" and halves is not None:
        said += f"\nTwo random halves of the data differ by {halves:.2f}."
    return said


def _cell(row: Mapping[str, Any], metric: str) -> str:
    agreement = row.get("label_agreement")
    share = "" if agreement is None or metric == "label_agreement" else f" ({agreement:.0%})"
    shown = f"{row[metric]:.0%}" if metric in _SHARES else f"{row[metric]:.2f}"
    return shown + share


def write(
    directory: epath.PathLike, evaluations: Mapping[str, Evaluation], metric: str = ""
) -> str:
    """Writes report.md and distance.png; returns the table.

    Args:
      directory: to write to.
      evaluations: by the names that they have in the report.
      metric: that is shown; the first of the first evaluation if empty.

    Raises:
      InputError: an evaluation lacks the metric, or they are of several protocols or references.
    """
    metric = metric or next(iter(evaluations.values()))["protocol"]["metrics"][0]
    check(evaluations, metric)
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = table(evaluations, metric)
    (directory / "report.md").write_text(text + "\n")
    plot(directory / "distance.png", evaluations, metric)
    return text


def plot(path: epath.Path, evaluations: Mapping[str, Evaluation], metric: str) -> None:
    """The metric against steps, one curve an evaluation; distances and steps logarithmic."""
    figure = blank(6, 4)
    from matplotlib.ticker import LogLocator

    axes = figure.add_subplot()
    for name, curve in _curves(evaluations):
        axes.plot(list(curve), [row[metric] for row in curve.values()], marker="o", label=name)
    first = next(iter(evaluations.values()))
    halves = first["reference"].get("halves_distance")
    if metric == "fd_pixels" and halves is not None:
        axes.axhline(halves, color="grey", linestyle=":", label="two halves of the data")
    axes.set_xscale("log")
    if metric not in _SHARES:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    ticks = _steps(evaluations)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("sampling steps")
    axes.set_ylabel(_TITLES.get(metric, metric))
    axes.legend()
    path.write_bytes(png(figure))
