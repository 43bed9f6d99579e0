"""What the comparison of objectives costs: operations and seconds, and learning curves."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.studies import objectives
from benchmarks.studies.objectives import PARTS, RUNS
from benchmarks.studies.page import distances, spread
from benchmarks.studies.study import Plan, Rows
from dmf.checkpoints.load import read_config
from dmf.models.build import network
from dmf.objectives.build import objective

# One-step distances for which the table says how much compute reaches them.
TARGETS = (8.0, 4.0, 2.0, 1.0)
TEXT = """The operations of a training step, in forward passes of the network and by our count, the
number of steps, and the median time of a step on this machine. Then the compute and the seconds of
training until the distance at one step is below a number, mean over the seeds, interpolated between
{parts} evaluations of each run; those of fine-tunings include the flow model's. A dash: not reached
in any seed.
"""


class Cost(NamedTuple):
    """What a run costs.

    Attributes:
      steps: number of training steps.
      passes: operations of a step in forward passes of its network.
      flops: operations of a step for one sample.
      total: operations of the run.
      seconds: median seconds of a step.
    """

    steps: int
    passes: float
    flops: float
    total: float
    seconds: float


def cost_of(folder: pathlib.Path, run: str) -> Cost:
    """The cost of a run of a seed, from its config and its metrics."""
    config = read_config(folder / run)
    net = network(config.model)
    flops = objective(config.objective).flops(net)
    rows = map(json.loads, (folder / run / "metrics.jsonl").read_text().splitlines())
    rates = [row["steps_per_second"] for row in rows if "steps_per_second" in row]
    steps, total = config.run.steps, config.run.steps * config.data.batch_size * flops
    return Cost(steps, flops / net.flops.forward, flops, total, 1 / float(np.median(rates)))


def curve(run: str, results: Mapping[str, Rows]) -> np.ndarray:
    """One-step distances [parts, seeds] after equal shares of a run; a fine-tuning has that of its
    flow model in front."""
    names = [*([_start(run)] if _start(run) else []),
             *(f"{run}_{part}" for part in range(1, PARTS)), run]
    return np.stack([distances(results[name], 1) for name in names])


def _start(run: str) -> str:
    """The run that a run starts from; empty for none."""
    return "flow" if RUNS[run][1] else ""


def shares(run: str) -> np.ndarray:
    """The shares of a run at which its curve has values."""
    return np.arange(0 if _start(run) else 1, PARTS + 1) / PARTS


def reached(shares: np.ndarray, values: np.ndarray, target: float) -> float | None:
    """The share at which a curve first falls to a target, between two shares by the logarithms of
    its values; None if it does not.

    >>> reached(np.array([0.5, 1.0]), np.array([4.0, 1.0]), 2.0)
    0.75
    """
    below = np.flatnonzero(values <= target)
    if not len(below):
        return None
    last = below[0]
    if last == 0:
        return float(shares[0])
    ends = np.log(values[last - 1 : last + 1])
    part = (ends[0] - np.log(target)) / (ends[0] - ends[1])
    return float(shares[last - 1] + part * (shares[last] - shares[last - 1]))


def _to_reach(
    run: str, target: float, folders: Sequence[pathlib.Path], results: Mapping[str, Rows]
) -> str:
    """The cell of a run and a distance: compute and seconds."""
    found = []
    for folder, values in zip(folders, curve(run, results).T, strict=True):
        share = reached(shares(run), values, target)
        if share is not None:
            costs = [(cost_of(folder, run), share)]
            costs += [(cost_of(folder, "flow"), 1.0)] if _start(run) else []
            found.append([sum(c.total * s / 1e12 for c, s in costs),
                          sum(c.seconds * c.steps * s for c, s in costs)])
    if not found:
        return "-"
    compute, seconds = np.mean(found, axis=0)
    seeds = "" if len(found) == len(folders) else f", in {len(found)} of {len(folders)} seeds"
    return f"{compute:.2f} ({seconds:.0f} s{seeds})"


def table(folders: Sequence[pathlib.Path], results: Mapping[str, Rows]) -> str:
    """A row for each run: its cost, and the compute to reach each of the distances."""
    heads = ["", "passes a step", "MFLOP a sample", "steps", "ms a step", "TFLOP in all",
             *(f"TFLOP to {target:g}" for target in TARGETS)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for run in RUNS:
        costs = [cost_of(folder, run) for folder in folders]
        first, seconds = costs[0], np.mean([cost.seconds for cost in costs])
        cells = [objectives.label(run), f"{first.passes:.2f}", f"{first.flops / 1e6:.1f}",
                 f"{first.steps:,}", f"{1000 * seconds:.0f}", f"{first.total / 1e12:.2f}"]
        if run == "flow":
            cells += [""] * len(TARGETS)
        else:
            cells += [_to_reach(run, target, folders, results) for target in TARGETS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(
    path: pathlib.Path, folders: Sequence[pathlib.Path], results: Mapping[str, Rows]
) -> None:
    """Plots the one-step distance against the compute, from scratch and from the flow model."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    every = figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, title, from_flow in zip(
        every, ("from scratch", "from the flow model"), (False, True), strict=True
    ):
        for run in (run for run in RUNS if run != "flow" and RUNS[run][1] == from_flow):
            before = cost_of(folders[0], "flow").total if from_flow else 0.0
            spent = (before + shares(run) * cost_of(folders[0], run).total) / 1e12
            values = curve(run, results)
            name = RUNS[run][0]
            axes.errorbar(spent, values.mean(1), spread(values), marker="o",
                          color=f"C{list(objectives.METHODS).index(name)}",
                          label=objectives.METHODS[name].label)
        axes.set(title=title, xlabel="TFLOP of training", yscale="log")
    every[0].set_ylabel("Fréchet distance at one step")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside right upper",
                  fontsize="small")  # fmt: skip
    figure.savefig(path, dpi=100)


def sections(
    folders: Sequence[pathlib.Path], plots: pathlib.Path, results: Mapping[str, Rows]
) -> list[str]:
    """The section about compute."""
    plot(plots / "compute.png", folders, results)
    return ["## Compute to reach a distance\n", TEXT.format(parts=PARTS),
            table(folders, results) + "\n",
            f"![The distance at one step over compute]({plots.name}/compute.png)\n"]


COMPARISON = Plan(
    head=objectives.HEAD, runs=tuple(RUNS), config_of=objectives.config_of,
    measures=objectives.MEASURES, studies=objectives.STUDIES, sections=sections,
)
