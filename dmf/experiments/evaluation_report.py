"""Several evaluations compared: a table and a plot of a metric against the sampling steps."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dmf.errors import InputError
from dmf.evaluation.metrics import find_metric
from dmf.evaluation.result_rows import guidance_name
from dmf.experiments.plots import new_figure, plain, to_png
from dmf.runtime.files import new_file, write_text
from dmf.runtime.paths import user_path

Evaluation = dict[str, Any]
# Rows of an evaluation by their number of sampling steps.
Curve = dict[int, Mapping[str, Any]]
# Beyond these are no scores and no numbers of sampling steps; plots could not show them either.
_LARGEST, _MAX_STEPS = 1e100, 2**31


def read_evaluation(path: epath.PathLike) -> Evaluation:
    """Reads the evaluation of a flow map that `dmf evaluate` wrote.

    Raises:
      InputError: the file is no evaluation, or has no numbers of sampling steps.
    """
    try:
        evaluation = json.loads(user_path(path).read_bytes().decode())
    except (ValueError, RecursionError):
        evaluation = None
    rows = evaluation["results"] if is_evaluation(evaluation) else []
    if rows and not any("steps" in row for row in rows):
        raise InputError(os.fspath(path), remedy="it measures a set of images, which has no "
                         "numbers of steps")
    if not rows or not all(is_flow_map_row(row) and isinstance(row.get("count"), int)
                           for row in rows):
        raise InputError(os.fspath(path), remedy="not a file that dmf evaluate wrote")
    return evaluation


def is_evaluation(value: Any) -> bool:
    """Whether JSON has the parts of an evaluation: a protocol, a reference, and rows of results,
    whose metrics are numbers."""
    parts = value if isinstance(value, dict) else {}
    protocol, reference, rows = (parts.get(f) for f in ("protocol", "reference", "results"))
    if not all(isinstance(part, dict) and isinstance(part.get("name"), str)
               for part in (protocol, reference)):
        return False
    metrics = protocol.get("metrics")
    if not isinstance(metrics, list) or not metrics or not all(isinstance(m, str) for m in metrics):
        return False
    return isinstance(rows, list) and all(
        isinstance(row, dict) and all(_is_number(row[m]) for m in metrics if m in row)
        for row in rows
    )


def _is_number(value: Any) -> bool:
    """Whether JSON has a number that a float holds; some whole numbers are too large."""
    return isinstance(value, int | float) and (abs(value) < _LARGEST or value != value)


def is_flow_map_row(row: Mapping[str, Any]) -> bool:
    """Whether a row names its EMA parameters, its number of sampling steps and, where guidance was
    searched, its scale and interval."""
    steps, interval = row.get("steps"), row.get("interval", [0, 1])
    numbers = [row.get("guidance", 1), *(interval if isinstance(interval, list) else [""])]
    return (isinstance(steps, int) and 0 < steps < _MAX_STEPS and isinstance(row.get("ema"), str)
            and ("guidance" in row) == ("interval" in row)
            and len(numbers) == 3 and all(map(_is_number, numbers)))


def check_comparable(evaluations: Mapping[str, Evaluation], metric: str) -> None:
    """Checks that the numbers of several evaluations mean the same.

    Raises:
      InputError: an evaluation lacks the metric, or two differ in the protocol, the number of
        samples, the reference or the feature networks. What an older file lacks is not compared.
    """
    for name, evaluation in evaluations.items():
        if not all(isinstance(row.get(metric), int | float) for row in evaluation["results"]):
            metrics = ", ".join(evaluation["protocol"]["metrics"])
            raise InputError("metric", metric, f"{name} has {metrics}")
    firsts: dict[str, tuple[str, Any]] = {}
    for name, evaluation in evaluations.items():
        for field, its in _settings(evaluation).items():
            first, value = firsts.setdefault(field, (name, its))
            if its != value:
                raise InputError(name, remedy=f"its {field} is {its}, and that of {first} is "
                                 f"{value}; only evaluations with the same {field} can be compared")


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    """What evaluations that are compared must share, by the name of the field. The metrics of the
    protocol need not be the same, nor the path of a network, whose parameters have a digest."""
    protocol, reference = evaluation["protocol"], evaluation["reference"]
    fields = {"protocol": protocol["name"], "reference": reference["name"],
              "number of samples": _counts(evaluation)}
    fields |= {f"protocol.{field}": value for field, value in protocol.items()
               if field not in ("name", "metrics")}
    if "fingerprint" in reference:
        fields["reference.fingerprint"] = reference["fingerprint"]
    networks = evaluation.get("networks")
    for network, its in networks.items() if isinstance(networks, dict) else ():
        fields |= {f"networks.{network}.{field}": value for field, value in its.items()
                   if field != "checkpoint"} if isinstance(its, dict) else {}
    return fields


def _counts(evaluation: Evaluation) -> str:
    return ", ".join(f"{n:,}" for n in sorted({row["count"] for row in evaluation["results"]}))


def _curves(evaluations: Mapping[str, Evaluation]) -> Iterator[tuple[str, Curve]]:
    """Yields a label and the rows of each evaluation, for each of its EMA parameters and each
    guidance that was searched."""
    for name, evaluation in evaluations.items():
        rows = evaluation["results"]
        several_emas = len({row["ema"] for row in rows}) > 1
        curves: dict[tuple[str, str], Curve] = {}
        for row in rows:
            curves.setdefault((row["ema"], guidance_name(row)), {})[row["steps"]] = row
        for (ema, guidance), curve in curves.items():
            parts = [ema or "parameters"] * several_emas + [guidance] * bool(guidance)
            label = f"{name} ({', '.join(parts)})" if parts else name
            yield label, dict(sorted(curve.items()))


def _steps(evaluations: Mapping[str, Evaluation]) -> list[int]:
    return sorted({row["steps"] for e in evaluations.values() for row in e["results"]})


def metric_title(name: str) -> str:
    """The title of a metric; its name if the metric is not registered."""
    metric = find_metric(name)
    return name if metric is None else metric.title


def format_score(name: str, value: float) -> str:
    """A score as tables show it."""
    metric = find_metric(name)
    return f"{value:.2f}" if metric is None else metric.format(value)


def markdown_table(evaluations: Mapping[str, Evaluation], metric: str) -> str:
    """A Markdown table: a row for each evaluation, a column for each number of sampling steps.

    Args:
      evaluations: evaluations that can be compared, by the name of their row.
      metric: name of the metric in the cells. The label agreement stands behind it, in parentheses.

    Returns:
      The table, and below it the protocol, the number of samples and the reference.
    """
    steps, curves = _steps(evaluations), dict(_curves(evaluations))
    agreement = any("label_agreement" in row for curve in curves.values() for row in curve.values())
    title = metric_title(metric)
    title += " (label agreement)" * (agreement and metric != "label_agreement")
    names = [f"{n} step" if n == 1 else f"{n} steps" for n in steps]
    lines = [f"| {title} | " + " | ".join(names) + " |", "|" + "---|" * (len(steps) + 1)]
    for name, curve in curves.items():
        cells = [_cell(curve[n], metric) if n in curve else "" for n in steps]
        escaped = name.replace("|", "\\|")
        lines.append(f"| {escaped} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", protocol_note(next(iter(evaluations.values())), metric)])


def protocol_note(evaluation: Evaluation, metric: str) -> str:
    """Lines that name the protocol, the number of samples and the reference of a table."""
    note = (f"Protocol {evaluation['protocol']['name']}, {_counts(evaluation)} samples, against "
            f"{evaluation['reference']['name']}.")
    baseline = _baseline(evaluation, metric)
    if baseline is not None:
        note += f"\nTwo random halves of the data differ by {baseline:.2f}."
    return note


def _baseline(evaluation: Evaluation, metric: str) -> float | None:
    """The metric between two random halves of the reference, where the evaluation has it."""
    known = find_metric(metric)
    has_baseline = known is not None and known.baseline is not None
    return evaluation["reference"].get("halves_distance") if has_baseline else None


def _cell(row: Mapping[str, Any], metric: str) -> str:
    agreement = row.get("label_agreement")
    share = "" if agreement is None or metric == "label_agreement" else f" ({agreement:.0%})"
    return format_score(metric, row[metric]) + share


def write_report(
    directory: epath.PathLike, evaluations: Mapping[str, Evaluation], metric: str = ""
) -> str:
    """Writes report.md and distance.png.

    Args:
      directory: directory of the report.
      evaluations: evaluations by their names in the report.
      metric: name of the metric; the first metric of the first evaluation if empty.

    Returns:
      The text of report.md.

    Raises:
      InputError: the evaluations cannot be compared, see `check_comparable`.
    """
    metric = metric or next(iter(evaluations.values()))["protocol"]["metrics"][0]
    check_comparable(evaluations, metric)
    directory = user_path(directory)
    text = markdown_table(evaluations, metric)
    write_text(directory / "report.md", text + "\n")
    plot_metric(directory / "distance.png", evaluations, metric)
    return text


def plot_metric(path: epath.Path, evaluations: Mapping[str, Evaluation], metric: str) -> None:
    """Plots a metric against the sampling steps, with a curve for each evaluation.

    Args:
      path: PNG file to write.
      evaluations: evaluations by the label of their curve.
      metric: name of the metric; its axis is logarithmic unless it is a share, or a value is not
        positive.
    """
    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    for name, curve in _curves(evaluations):
        axes.plot(list(curve), [row[metric] for row in curve.values()], marker="o",
                  label=plain(name))
    baseline = _baseline(next(iter(evaluations.values())), metric)
    if baseline is not None:
        axes.axhline(baseline, color="grey", linestyle=":", label="two halves of the data")
    values = [row[metric] for _, curve in _curves(evaluations) for row in curve.values()]
    _scale_axes(axes, _steps(evaluations), metric, positive=min(values) > 0)
    axes.set_xlabel("sampling steps")
    axes.set_ylabel(plain(metric_title(metric)))
    axes.legend()
    with new_file(path) as partial:
        partial.write_bytes(to_png(figure))


def _scale_axes(axes: Any, steps: list[int], metric: str, *, positive: bool) -> None:
    from matplotlib.ticker import LogLocator

    known = find_metric(metric)
    axes.set_xscale("log")
    if positive and (known is None or not known.is_share):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
