"""Several evaluations side by side: a table of distance against steps, and its picture."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from dmf.typing import InputError

Evaluation = dict[str, Any]


def read(path: epath.PathLike) -> Evaluation:
    """An evaluation as `dmf evaluate` wrote it.

    Raises:
      InputError: the file is not one.
    """
    try:
        evaluation = json.loads(epath.Path(path).read_text())
    except json.JSONDecodeError:
        evaluation = {}
    wanted = {"results", "reference_halves_distance"}
    if not isinstance(evaluation, dict) or not wanted <= evaluation.keys():
        raise InputError(f"{path}: not a file that dmf evaluate wrote")
    return evaluation


def table(evaluations: Mapping[str, Evaluation]) -> str:
    """Markdown: a row an evaluation, a column a number of steps.

    A cell holds the Frechet distance and, where there are labels, the label agreement.
    """
    steps = sorted({row["steps"] for e in evaluations.values() for row in e["results"]})
    lines = [
        "| Frechet distance (label agreement) | " + " | ".join(map(_steps, steps)) + " |",
        "|" + "---|" * (len(steps) + 1),
    ]
    for name, evaluation in evaluations.items():
        rows = {row["steps"]: row for row in evaluation["results"]}
        cells = [_cell(rows[n]) if n in rows else "" for n in steps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    first = next(iter(evaluations.values()))
    lines += ["", f"Two random halves of the data differ by "
              f"{first['reference_halves_distance']:.2f}."]
    return "\n".join(lines)


def _steps(n: int) -> str:
    return f"{n} step" if n == 1 else f"{n} steps"


def _cell(row: Mapping[str, Any]) -> str:
    agreement = row.get("label_agreement")
    share = "" if agreement is None else f" ({agreement:.0%})"
    return f"{row['frechet_distance']:.2f}{share}"


def write(directory: epath.PathLike, evaluations: Mapping[str, Evaluation]) -> str:
    """Writes report.md and distance.png; returns the table."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = table(evaluations)
    (directory / "report.md").write_text(text + "\n")
    plot(directory / "distance.png", evaluations)
    return text


def plot(path: epath.Path, evaluations: Mapping[str, Evaluation]) -> None:
    """Distance against steps, both logarithmic, one curve an evaluation."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise InputError("distance.png: pictures need matplotlib; pip install "
                         "'dmf-jax[report]'") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, evaluation in evaluations.items():
        rows = sorted(evaluation["results"], key=lambda row: row["steps"])
        axes.loglog(
            [row["steps"] for row in rows],
            [row["frechet_distance"] for row in rows],
            marker="o",
            label=name,
        )
    halves = next(iter(evaluations.values()))["reference_halves_distance"]
    axes.axhline(halves, color="grey", linestyle=":", label="two halves of the data")
    ticks = sorted({row["steps"] for e in evaluations.values() for row in e["results"]})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("sampling steps")
    axes.set_ylabel("Frechet distance")
    axes.legend()
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=150)
