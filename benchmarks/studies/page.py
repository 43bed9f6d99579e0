"""The page: for each study a table, a picture, and whether the paper's direction holds."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks.studies.plan import MEASURES, STUDIES, Claim, Study

METRIC = "fd_pixels"
# For each seed, the rows of an evaluation by their number of steps.
Rows = list[dict[int, Mapping[str, float]]]
_HEAD = """# Studies on the digits

What the papers report of ImageNet, looked for on the 8 x 8 digits, where a run takes a minute.
Tables show the Fréchet distance to the data in pixel space, and in parentheses the share of
samples that a plain classifier gives the label they were made for: mean and standard deviation over
{seeds} seeds. Each seed has one flow model, from which all of its flow maps start. Whether a
direction holds is computed: it holds if it does in every seed, and is open if it does in some. This
says nothing of other data.

    {command}

wrote this page: {minutes:.0f} minutes in all, {count:,} samples a number, on {machine}.
Two random halves of the data differ by {halves:.2f}.
"""


def read(folders: Sequence[pathlib.Path]) -> dict[str, Rows]:
    """The results of all seeds, by measure."""
    return {
        name: [
            {row["steps"]: row for row in json.loads((f / f"{name}.json").read_text())["results"]}
            for f in folders
        ]
        for name in MEASURES
    }


def distances(rows: Rows, steps: int) -> np.ndarray:
    """Of each seed, at a number of steps."""
    return np.array([seed[steps][METRIC] for seed in rows])


def verdict(claim: Claim, results: Mapping[str, Rows]) -> str:
    """Whether a claim holds, seed by seed, and by how much the means differ."""
    lower = distances(results[claim.lower], claim.steps)
    higher = np.min([distances(results[name], claim.steps) for name in claim.higher], axis=0)
    held, seeds = int(np.sum(lower < higher)), len(lower)
    said = {seeds: "**holds**", 0: "**does not hold**"}.get(held, "**open**")
    return (f"{said} at {claim.steps} step{'s' * (claim.steps > 1)}, in {held} of {seeds} seeds "
            f"({lower.mean():.2f} against {higher.mean():.2f})")


def spread(values: np.ndarray) -> np.ndarray:
    """Standard deviation over seeds [..., seeds], of the distribution they were drawn from; 0 for
    one seed."""
    return values.std(axis=-1, ddof=1) if values.shape[-1] > 1 else np.zeros(values.shape[:-1])


def _cell(rows: Rows, steps: int) -> str:
    if steps not in rows[0]:
        return ""
    found = distances(rows, steps)
    agreement = np.mean([seed[steps]["label_agreement"] for seed in rows])
    return f"{found.mean():.2f} ± {spread(found):.2f} ({agreement:.0%})"


def table(study: Study, results: Mapping[str, Rows]) -> str:
    """A row a measure, a column a number of steps."""
    steps = sorted({n for name in study.measures for n in MEASURES[name].steps})
    heads = [f"{n} step{'s' * (n > 1)}" for n in steps]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(steps) + 1) + "|"]
    for name in study.measures:
        cells = [_cell(results[name], n) for n in steps]
        lines.append(f"| {MEASURES[name].label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: pathlib.Path, study: Study, results: Mapping[str, Rows]) -> None:
    """The distance against steps, a curve a measure, both logarithmic."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in study.measures:
        steps = MEASURES[name].steps
        found = np.array([distances(results[name], n) for n in steps])
        axes.errorbar(steps, found.mean(1), spread(found), marker="o", label=MEASURES[name].label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("sampling steps")
    axes.set_ylabel("Fréchet distance")
    axes.legend()
    figure.savefig(path, dpi=100)


def write(
    output: pathlib.Path, folders: Sequence[pathlib.Path], *, command: str, minutes: float,
    machine: str,
) -> None:
    """Writes the page, and the pictures into a folder of its name beside it.

    Args:
      output: a .md file.
      folders: of the seeds.
      command: that makes the page.
      minutes: that it took.
      machine: that it ran on.
    """
    results, pictures = read(folders), output.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    first = json.loads((folders[0] / "flow.json").read_text())
    parts = [_HEAD.format(
        seeds=len(folders), command=command, count=first["count"], minutes=minutes,
        machine=machine, halves=first["reference"]["halves_distance"],
    )]
    for name, study in STUDIES.items():
        plot(pictures / f"{name}.png", study, results)
        claims = [f"- {claim.text}: {verdict(claim, results)}" for claim in study.claims]
        parts += [f"## {study.title}\n", study.text + "\n", table(study, results) + "\n",
                  "\n".join(claims) + "\n",
                  f"![{study.title}]({pictures.name}/{name}.png)\n"]
    output.write_text("\n".join(parts))
