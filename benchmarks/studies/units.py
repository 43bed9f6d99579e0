"""The units of a study, each of which is done once: a training run or an evaluation."""

import json
import pathlib
import time
from collections.abc import Callable, Iterator

from benchmarks.studies.study import Measure, Plan, Scale
from dmf.checkpoints.params import CHECKPOINTS, latest_step
from dmf.cli import evaluate
from dmf.training.loop import train

# A line for each unit that is done, with its seconds.
TIMES = "times.jsonl"


def _train(plan: Plan, run: str, folder: pathlib.Path, seed: int, scale: Scale) -> bool:
    """Trains a run to its end; returns whether it was not done before."""
    config = plan.config_of(run, folder, seed, scale)
    if latest_step(folder / run) == config.run.steps:
        return False
    train(config, folder / run)
    return True


def _evaluate(name: str, measure: Measure, folder: pathlib.Path, seed: int, scale: Scale) -> bool:
    """Evaluates a run; returns whether it was not done before."""
    checkpoint, step = folder / measure.run, latest_step(folder / measure.run)
    if measure.share != 1:
        step = round(measure.share * step)
        checkpoint /= f"{CHECKPOINTS}/{step}"
    output = folder / f"{name}.json"
    if output.exists():
        evaluation = json.loads(output.read_text())
        if (evaluation["step"], evaluation["count"]) == (step, scale.count):
            return False
    evaluate.main("evaluate", [
        f"--checkpoint={checkpoint}", f"--output={output}", f"--count={scale.count}",
        f"--steps={','.join(map(str, measure.steps))}", f"--config.evaluation.seed={seed}",
        *(f"--config.{field}={value}" for field, value in measure.overrides.items()),
    ])
    return True


def units(
    plan: Plan, folder: pathlib.Path, seed: int, scale: Scale
) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yields the name and the function of each unit of a seed, in an order in which they can run.

    Args:
      plan: the runs and the evaluations.
      folder: folder of the seed.
      seed: random seed of training and evaluation.
      scale: length of the runs.
    """
    for run in plan.runs:
        yield f"train {run}", lambda run=run: _train(plan, run, folder, seed, scale)
    for name, measure in plan.measures.items():
        yield f"measure {name}", lambda name=name, measure=measure: _evaluate(
            name, measure, folder, seed, scale
        )


def run_units(plan: Plan, folder: pathlib.Path, seed: int, scale: Scale) -> None:
    """Runs the units of a seed that are not done."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, run in units(plan, folder, seed, scale):
        start = time.perf_counter()
        if run():
            elapsed = time.perf_counter() - start
            with open(folder / TIMES, "a") as file:
                file.write(json.dumps({"unit": name, "seconds": round(elapsed, 1)}) + "\n")
            print(f"seed {seed}: {name}, {elapsed:.0f} s", flush=True)


def seconds(folder: pathlib.Path) -> float:
    """The seconds of all units of a seed, without interrupted attempts."""
    lines = (folder / TIMES).read_text().splitlines()
    return sum(json.loads(line)["seconds"] for line in lines)
