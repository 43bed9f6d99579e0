"""Time of a training step beside the same step in PyTorch, on the CPU and in one process.

    pip install -e '.[pytorch]'
    python -m benchmarks.pytorch_step --output=benchmarks/results/pytorch_step.md

Decoupled MeanFlow with model guidance, float32, S/2 with 32 x 32 x 4 latents, with the defaults of
every setting that a config has, against `benchmarks/pytorch_network.py`, eager and by
`torch.compile`. All start from the same random parameters and take the same draws in their first
step, and the benchmark ends if their first losses differ. The steps take turns, --rounds times.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import torch
from absl import flags

from benchmarks.machine import machine, start
from benchmarks.pytorch_network import Network, Step, Term
from benchmarks.variants import Variant, config_of
from dmf.models.dit import DiT
from dmf.runtime.sharding import make_mesh
from dmf.training import build
from dmf.training.abstract_inputs import abstract_inputs
from dmf.training.build import Recipe
from dmf.training.train_state import TrainState
from dmf.training.train_step import compiled_train_step, create_train_state, drawn
from dmf.types import Batch, Params

_SIZE = flags.DEFINE_string("size", "S", "size of the transformer")
_DEPTH = flags.DEFINE_integer("depth", 0, "number of blocks; 0: that of the size")
_BATCH = flags.DEFINE_integer("batch", 8, "batch size")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "measurements of each step")
_COMPILED = flags.DEFINE_boolean("compiled", True, "also PyTorch by torch.compile")
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table")

# Relative difference of the losses of the first step; float32 sums differ by some 1e-6.
_TOLERANCE = 1e-4


def _recipe() -> Recipe:
    """Decoupled MeanFlow with the defaults of the network, the objective and the optimizer."""
    scan, remat = (DiT.__dataclass_fields__[name].default for name in ("scan", "remat"))
    variant = Variant(_BATCH.value, scan, remat, "auto", "shared")
    depth = {"split": round(_DEPTH.value * 2 / 3)} if _DEPTH.value else {}
    config = config_of(variant, size=_SIZE.value, objective="decoupled_mean_flow",
                       dtype="float32", **depth)  # fmt: skip
    if _DEPTH.value:
        config.model.depth = _DEPTH.value
    return build.recipe(config, make_mesh())


def _random(params: Params) -> Params:
    """Random parameters, so that no part of the network is zero as at initialisation."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda p: random.normal(0, 0.05, p.shape).astype("f4"), params)


def _ours(
    recipe: Recipe, params: Params, rows: Batch, key: jax.Array
) -> Callable[[], float]:
    abstract, _, frozen = abstract_inputs(recipe)
    step = compiled_train_step(recipe).lower(abstract, rows, frozen, key).compile()
    states: list[TrainState] = [create_train_state(recipe, jax.random.key(0), params)]

    def run() -> float:
        states[0], metrics = step(states[0], rows, frozen, key)
        jax.block_until_ready(states[0])
        return float(metrics["loss"])

    return run


def _theirs(
    recipe: Recipe, params: Params, rows: Batch, key: jax.Array, compiled: bool
) -> Callable[[], float]:
    batch, draws = drawn(recipe, rows, key, 0)

    def tensor(x: jax.Array) -> torch.Tensor:
        return torch.from_numpy(np.array(x))

    terms = [Term(*(tensor(x) for x in (each.noise, each.t, each.r, each.dropped)))
             for each in draws]  # fmt: skip
    x, y = tensor(batch.x), tensor(batch.y).long()
    guidance = recipe.objective.guidance
    step = Step(
        Network(recipe.network, params), vars(recipe.optimizer), vars(guidance),
        recipe.emas["main"].decay, compiled,
    )  # fmt: skip
    return lambda: step(x, y, terms)


def _rows(recipe: Recipe) -> Batch:
    _, batch, _ = abstract_inputs(recipe)
    random = np.random.default_rng(0)
    return batch._replace(
        x=jax.device_put(random.normal(size=batch.x.shape).astype(batch.x.dtype),
                         batch.x.sharding),
        y=jax.device_put(random.integers(0, 1000, batch.y.shape).astype("i4"), batch.y.sharding),
    )  # fmt: skip


def main(_: Sequence[str]) -> None:
    """Measures, prints and writes the table."""
    recipe, key = _recipe(), jax.random.key(1)
    rows, params = _rows(recipe), _random(abstract_inputs(recipe)[0].params)
    steps = {"PyTorch": _theirs(recipe, params, rows, key, False)}
    if _COMPILED.value:
        steps["PyTorch, torch.compile"] = _theirs(recipe, params, rows, key, True)
    steps["ours"] = _ours(recipe, params, rows, key)
    losses = {name: run() for name, run in steps.items()}  # the first step also compiles
    print(", ".join(f"{name}: loss {loss:.7f}" for name, loss in losses.items()), flush=True)
    if max(losses.values()) - min(losses.values()) > _TOLERANCE * abs(losses["ours"]):
        sys.exit(f"the losses of the first step differ: {losses}")
    _report(_measure(steps))


def _measure(steps: dict[str, Callable[[], float]]) -> dict[str, list[tuple[float, float]]]:
    """By step, the wall-clock time and the CPU time of each round."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(_ROUNDS.value):
        for name, run in steps.items():
            clock, busy = time.perf_counter(), time.process_time()
            run()
            measured[name].append((time.perf_counter() - clock, time.process_time() - busy))
    return measured


def _report(measured: dict[str, list[tuple[float, float]]]) -> None:
    lines = ["| step | seconds | CPU seconds | ours is faster by, clock | by CPU time |",
             "|---|---|---|---|---|"]
    for name, times in measured.items():
        clock, busy = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [
            statistics.median(
                theirs[i] / ours[i] for theirs, ours in zip(times, measured["ours"], strict=True)
            )
            for i in (0, 1)
        ]
        lines.append(f"| {name} | {clock:.2f} | {busy:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    depth = f" with {_DEPTH.value} blocks" if _DEPTH.value else ""
    lines += ["", f"Decoupled MeanFlow, {_SIZE.value}/2{depth}, 32 x 32 x 4, batch {_BATCH.value}, "
              f"float32; medians of {_ROUNDS.value} rounds in turn, ratios within a round. On "
              f"{machine()}, torch {torch.__version__} with {torch.get_num_threads()} threads."]
    text = "\n".join(lines)
    print(text)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(text + "\n")


if __name__ == "__main__":
    start(main)
