"""The page: for each study a table, a plot, and whether the claims of the papers hold."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks.studies.study import Claim, Measure, Plan, Rows, Study

METRIC = "fd_pixels"
COLORS = 10  # of the cycle of matplotlib


def read_results(plan: Plan, folders: Sequence[pathlib.Path]) -> dict[str, Rows]:
    """Reads the results of all seeds, by measure."""
    return {
        name: [
            {row["steps"]: row for row in json.loads((f / f"{name}.json").read_text())["results"]}
            for f in folders
        ]
        for name in plan.measures
    }


def distances(rows: Rows, steps: int) -> np.ndarray:
    """The distances of all seeds [seeds] at a number of sampling steps."""
    return np.array([seed[steps][METRIC] for seed in rows])


def verdict(claim: Claim, results: Mapping[str, Rows]) -> str:
    """Whether a claim holds, in how many seeds, and the means over seeds."""
    lower = distances(results[claim.lower], claim.steps)
    higher = np.min([distances(results[name], claim.steps) for name in claim.higher], axis=0)
    count, seeds = int(np.sum(lower < higher)), len(lower)
    outcome = {seeds: "**holds**", 0: "**does not hold**"}.get(count, "**open**")
    steps = f"{claim.steps} step{'s' * (claim.steps > 1)}"
    return (f"{outcome} at {steps}, in {count} of {seeds} seeds "
            f"({lower.mean():.2f} against {higher.mean():.2f})")


def spread(values: np.ndarray) -> np.ndarray:
    """The unbiased standard deviation over seeds, the last axis of [..., seeds]; 0 for one seed."""
    return values.std(axis=-1, ddof=1) if values.shape[-1] > 1 else np.zeros(values.shape[:-1])


def _cell(rows: Rows, steps: int) -> str:
    if steps not in rows[0]:
        return ""
    values = distances(rows, steps)
    agreement = np.mean([seed[steps]["label_agreement"] for seed in rows])
    return f"{values.mean():.2f} ± {spread(values):.2f} ({agreement:.0%})"


def table(study: Study, measures: Mapping[str, Measure], results: Mapping[str, Rows]) -> str:
    """A table with a row for each measure and a column for each number of sampling steps."""
    steps = sorted({n for name in study.measures for n in measures[name].steps})
    heads = [f"{n} step{'s' * (n > 1)}" for n in steps]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(steps) + 1) + "|"]
    for name in study.measures:
        cells = [_cell(results[name], n) for n in steps]
        lines.append(f"| {measures[name].label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(
    path: pathlib.Path, study: Study, measures: Mapping[str, Measure], results: Mapping[str, Rows]
) -> None:
    """Plots the distance against sampling steps, with a curve for each measure."""
    many = len(study.measures) > 6
    figure = Figure(figsize=(9 if many else 6, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(study.measures):
        steps = measures[name].steps
        values = np.array([distances(results[name], n) for n in steps])
        axes.errorbar(steps, values.mean(1), spread(values), label=measures[name].label,
                      marker="o" if i < COLORS else "s", linestyle="-" if i < COLORS else "--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("sampling steps")
    axes.set_ylabel("Fréchet distance")
    if many:  # They would hide the curves.
        figure.legend(loc="outside right upper", fontsize="small")
    else:
        axes.legend()
    figure.savefig(path, dpi=100)


def write_page(
    plan: Plan, output: pathlib.Path, folders: Sequence[pathlib.Path], *, command: str,
    minutes: float, machine: str,
) -> None:
    """Writes the page, and its plots into a folder of the same name beside it.

    Args:
      plan: the plan of the runs.
      output: the .md file.
      folders: folders of the seeds.
      command: command that writes the page.
      minutes: minutes that the runs and evaluations took.
      machine: machine that they ran on.
    """
    results, plots = read_results(plan, folders), output.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    first = json.loads((folders[0] / f"{next(iter(plan.measures))}.json").read_text())
    parts = [plan.head.format(
        seeds=len(folders), command=command, count=first["count"], minutes=minutes,
        machine=machine, halves=first["reference"]["halves_distance"],
    )]
    for name, study in plan.studies.items():
        plot(plots / f"{name}.png", study, plan.measures, results)
        claims = [f"- {claim.text}: {verdict(claim, results)}" for claim in study.claims]
        parts += [f"## {study.title}\n", study.text + "\n",
                  table(study, plan.measures, results) + "\n", "\n".join(claims) + "\n",
                  f"![{study.title}]({plots.name}/{name}.png)\n"]
    output.write_text("\n".join([*parts, *plan.sections(folders, plots, results)]))
