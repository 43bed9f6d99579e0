"""The units of the work, each of which is done once: a training, or a measurement."""

import json
import pathlib
import time
from collections.abc import Callable, Iterator

from benchmarks.studies.plan import MEASURES, RUNS, Measure, Scale, config_of
from dmf.checkpoint import latest_step
from dmf.cli import evaluate
from dmf.training import train

# A line for each unit that was done here, with what it took.
TIMES = "times.jsonl"


def _trained(run: str, folder: pathlib.Path, seed: int, scale: Scale) -> bool:
    """Trains a run to its end; whether there was anything to do."""
    config = config_of(run, folder, seed, scale)
    if latest_step(folder / run) == config.run.steps:
        return False
    train(config, folder / run)
    return True


def _measured(name: str, measure: Measure, folder: pathlib.Path, seed: int, scale: Scale) -> bool:
    """Measures a run; whether there was anything to do."""
    output, step = folder / f"{name}.json", latest_step(folder / measure.run)
    if output.exists():
        found = json.loads(output.read_text())
        if (found["step"], found["count"]) == (step, scale.count):
            return False
    evaluate.main("evaluate", [
        f"--checkpoint={folder / measure.run}", f"--output={output}", f"--count={scale.count}",
        f"--steps={','.join(map(str, measure.steps))}", f"--config.evaluation.seed={seed}",
        *(f"--config.{field}={value}" for field, value in measure.seen.items()),
    ])
    return True


def units(
    folder: pathlib.Path, seed: int, scale: Scale
) -> Iterator[tuple[str, Callable[[], bool]]]:
    """The units of a seed in an order in which they can be done, by name.

    Args:
      folder: of this seed.
      seed: of all draws.
      scale: how long runs are.
    """
    for run in RUNS:
        yield f"train {run}", lambda run=run: _trained(run, folder, seed, scale)
    for name, measure in MEASURES.items():
        yield f"measure {name}", lambda name=name, measure=measure: _measured(
            name, measure, folder, seed, scale
        )


def work(folder: pathlib.Path, seed: int, scale: Scale) -> None:
    """Does what is left to do of a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, do in units(folder, seed, scale):
        start = time.perf_counter()
        if do():
            took = time.perf_counter() - start
            with open(folder / TIMES, "a") as file:
                file.write(json.dumps({"unit": name, "seconds": round(took, 1)}) + "\n")
            print(f"seed {seed}: {name}, {took:.0f} s", flush=True)


def seconds(folder: pathlib.Path) -> float:
    """What the units of a seed took, those of interrupted ones left out."""
    lines = (folder / TIMES).read_text().splitlines()
    return sum(json.loads(line)["seconds"] for line in lines)
