"""The quickstart for several seeds, with MeanFlow from scratch at equal total compute.

    python -m benchmarks.digits --seeds=0,1,2 --output=runs/benchmark

It prints a table of the Frechet distance against sampling steps, as mean and standard deviation
over seeds, and writes it to OUTPUT/digits.md. The same command resumes runs that were interrupted.

Compute is counted in forward passes of the network: a training step costs 3 for flow matching (one
forward pass, and a backward pass that costs two), 4 for MeanFlow (one more for the tangent) and 7
for Decoupled MeanFlow (both losses), all without guidance.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks.machine import machine, start
from configs import digits_dmf, digits_sit

FORWARD_PASSES = {"flow_matching": 3, "mean_flow": 4, "decoupled_mean_flow": 7}
AS_FLOW_MAP = ("--config.model.conditioning=decoupled", "--config.model.split_depth=4")
ROWS = {
    "flow model": "sit.json",
    "flow map, untrained": "untrained.json",
    "flow map, trained": "dmf.json",
    "MeanFlow from scratch": "meanflow.json",
}

_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "random seeds of training and evaluation")
_OUTPUT = flags.DEFINE_string("output", "runs/benchmark", "directory of the runs and the table")


def mean_flow_steps() -> int:
    """Training steps of MeanFlow that cost as much as the flow model and the flow map together."""
    parts = [digits_sit.get_config(), digits_dmf.get_config()]
    passes = sum(c.run.steps * FORWARD_PASSES[c.objective.name] for c in parts)
    return passes // FORWARD_PASSES["mean_flow"]


def _dmf(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dmf", *arguments], check=True)


def _train(config: str, folder: Path, seed: str, *more: str) -> None:
    _dmf("train", f"--config=configs/{config}.py", f"--workdir={folder}",
         f"--config.seed={seed}", "--config.run.sample_every=0", *more)


def _evaluate(checkpoint: Path, output: Path, seed: str, *more: str) -> None:
    if not output.exists():
        _dmf("evaluate", f"--checkpoint={checkpoint}", f"--output={output}",
             f"--config.evaluation.seed={seed}", *more)


def run(folder: Path, seed: str) -> None:
    """Trains and evaluates everything for one seed."""
    sit, dmf, meanflow = folder / "sit", folder / "dmf", folder / "meanflow"
    steps = mean_flow_steps()
    _train("digits_sit", sit, seed)
    _evaluate(sit, folder / "sit.json", seed, "--steps=1,2,4,8,32")
    _evaluate(sit, folder / "untrained.json", seed, "--steps=1,2,4,8", *AS_FLOW_MAP)
    _train("digits_dmf", dmf, seed, f"--config.init.checkpoint={sit}")
    _evaluate(dmf, folder / "dmf.json", seed, "--steps=1,2,4,8")
    _train("digits_meanflow", meanflow, seed, f"--config.run.steps={steps}",
           f"--config.optimizer.decay_steps={steps}")
    _evaluate(meanflow, folder / "meanflow.json", seed, "--steps=1,2,4,8")


def table(folders: Sequence[Path]) -> str:
    """Mean and standard deviation over seeds, with the mean label agreement in parentheses."""
    columns = (1, 2, 4, 8, 32)
    lines = ["| Frechet distance (label agreement) | "
             + " | ".join(f"{n} step{'s' * (n > 1)}" for n in columns) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for name, file in ROWS.items():
        evaluations = [json.loads((folder / file).read_text()) for folder in folders]
        cells = []
        for n in columns:
            rows = [row for e in evaluations for row in e["results"] if row["steps"] == n]
            distances = [row["fd_pixels"] for row in rows]
            agreement = np.mean([row["label_agreement"] for row in rows]) if rows else 0
            cells.append(f"{np.mean(distances):.2f} ± {np.std(distances):.2f} ({agreement:.0%})"
                         if rows else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Runs all seeds, then prints and writes the table."""
    output = Path(_OUTPUT.value)
    folders = [output / f"seed_{seed}" for seed in _SEEDS.value]
    for folder, seed in zip(folders, _SEEDS.value, strict=True):
        run(folder, seed)
    reference = json.loads((folders[0] / "sit.json").read_text())
    text = "\n".join([
        table(folders), "",
        f"Two random halves of the data differ by {reference['reference']['halves_distance']:.2f}. "
        f"{len(folders)} seeds, {reference['count']} samples each; MeanFlow trained "
        f"for {mean_flow_steps()} steps, the compute of the flow model and the flow map together. "
        f"On {machine()}.",
    ])
    (output / "digits.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    start(main)
