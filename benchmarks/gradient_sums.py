"""In which dtype gradients may be summed over devices: errors of the sums, and of Adam's update.

    python -m benchmarks.gradient_sums --output=benchmarks/results/gradient_sums.md

It trains a small diffusion transformer on the digits with Decoupled MeanFlow, in float32, until its
gradients are those of a network that has learned something. Then it takes the gradient of every
sample of some batches, as if every sample were the shard of a device. The gradients of the blocks'
kernels are summed over shards in several ways, in the order of a ring or of a 16 x 16 torus, and
compared with their sum in float64. Each way has moments of Adam of its own; all of them follow the
parameters of the float64 sums. Both errors stand beside the difference that other samples make.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from absl import flags
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

from benchmarks.machine import machine, start
from configs import digits_dmf
from dmf.runtime.sharding import make_mesh
from dmf.training import build
from dmf.training.train_step import accumulated_gradient, initial_state
from dmf.types import Batch, Params

_SHARDS = flags.DEFINE_integer("shards", 256, "number of shards, of a sample each; a square")
_WARMUP = flags.DEFINE_integer("warmup", 200, "training steps before the gradients are taken")
_STEPS = flags.DEFINE_integer("steps", 5, "training steps whose gradients are summed")
_WIDTH = flags.DEFINE_integer("width", 32, "width of the transformer")
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table")

Gradients = np.ndarray  # [shards, parameters] of the blocks' kernels


def ring(gradients: Gradients, dtype: Any) -> np.ndarray:
    """The sum in the order of the shards, rounded to `dtype` after every addition."""
    total = gradients[0].astype(dtype)
    for gradient in gradients[1:]:
        total = (total + gradient.astype(dtype)).astype(dtype)
    return total


def torus(gradients: Gradients, dtype: Any) -> np.ndarray:
    """Sums along the rows of a square of shards, and then their sum."""
    side = round(len(gradients) ** 0.5)
    rows = gradients.reshape(side, side, -1)
    return ring(np.stack([ring(row, dtype) for row in rows]), dtype)


def collected(sum_of: Callable[..., np.ndarray], dtype: Any) -> Callable[..., np.ndarray]:
    """A sum of gradients that each shard has rounded to bfloat16."""
    return lambda gradients: sum_of(gradients.astype(ml_dtypes.bfloat16), dtype)


WAYS = {
    "float32, collected in float32": lambda gradients: ring(gradients, np.float32),
    "float32, collected in bfloat16": collected(ring, np.float32),
    "bfloat16, torus": collected(torus, ml_dtypes.bfloat16),
    "bfloat16, ring": collected(ring, ml_dtypes.bfloat16),
}


def recipe_of(width: int, batch_size: int) -> build.Recipe:
    """The recipe of the digits, without a checkpoint to start from."""
    config = digits_dmf.get_config()
    config.init.checkpoint = ""
    config.model.update(width=width, heads=width // 32)
    config.data.batch_size = batch_size
    config.optimizer.learning_rate = 1e-3
    return build.recipe(config, make_mesh(devices=jax.devices()[:1]))


def batches(size: int) -> Iterator[Batch]:
    """Batches of digits in [-1, 1], drawn with replacement."""
    digits, draw = load_digits(), np.random.default_rng(0)
    images = np.float32(digits.images[..., None] / 8 - 1)
    while True:
        rows = draw.integers(0, len(images), size)
        yield Batch(jnp.asarray(images[rows]), jnp.asarray(digits.target[rows], jnp.int32))


def kernels(gradient: Params) -> jax.Array:
    """The gradients of the blocks' kernels as a vector."""
    leaves = jax.tree.leaves_with_path(gradient["blocks"])
    return ravel_pytree([leaf for path, leaf in leaves if path[-1].key == "kernel"])[0]


def gradients_of_shards(recipe: build.Recipe) -> Callable[..., tuple[Params, jax.Array]]:
    """(params, batch, key) -> the mean gradient, and those of the kernels by sample."""

    @jax.jit
    def gradients(params: Params, batch: Batch, key: jax.Array) -> tuple[Params, jax.Array]:
        draws = recipe.objective.draw(key, batch)

        def shard(total: Params, sample: Any) -> tuple[Params, jax.Array]:
            one = jax.tree.map(lambda x: x[None], sample)
            gradient, _ = accumulated_gradient(recipe, params, *one, {})
            return jax.tree.map(jnp.add, total, gradient), kernels(gradient)

        total, rows = jax.lax.scan(shard, jax.tree.map(jnp.zeros_like, params), (batch, draws))
        return jax.tree.map(lambda leaf: leaf / len(batch.x), total), rows

    return gradients


def trained(recipe: build.Recipe, steps: int, samples: Iterator[Batch]) -> tuple[Params, Any]:
    """Parameters and optimizer state after some steps."""
    state, optimizer = initial_state(recipe, jax.random.key(0), {}), recipe.optimizer.transform()

    @jax.jit
    def step(params: Params, opt_state: Any, batch: Batch, key: jax.Array) -> tuple[Params, Any]:
        draws = recipe.objective.draw(key, batch)
        gradient, _ = accumulated_gradient(recipe, params, batch, draws, {})
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = state.params, state.opt_state
    for i in range(steps):
        params, opt_state = step(params, opt_state, next(samples), jax.random.key(i))
    return params, opt_state


class Adam:
    """The update of Adam for one way to sum, in float64 but for the sum."""

    def __init__(self, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8):
        self.b1, self.b2, self.eps, self.steps = b1, b2, eps, 0
        self.mean = self.square = 0.0

    def update(self, gradient: np.ndarray) -> np.ndarray:
        """The update, in units of the learning rate."""
        self.steps += 1
        self.mean = self.b1 * self.mean + (1 - self.b1) * gradient
        self.square = self.b2 * self.square + (1 - self.b2) * gradient**2
        mean, square = (moment / (1 - decay**self.steps) for moment, decay in
                        ((self.mean, self.b1), (self.square, self.b2)))
        return mean / (np.sqrt(square) + self.eps)


def error(x: np.ndarray, exact: np.ndarray) -> float:
    """The norm of the difference, relative to that of the exact vector."""
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def compare(recipe: build.Recipe, warmup: int, steps: int) -> dict[str, list[np.ndarray]]:
    """By way to sum: [steps, 3] error of the sum, its scale relative to the exact one less 1, and
    error of the update."""
    samples, others = batches(recipe.batch_size), batches(recipe.batch_size)
    next(others)
    params, opt_state = trained(recipe, warmup, samples)
    gradients_of, optimizer = gradients_of_shards(recipe), recipe.optimizer.transform()
    adams = {name: Adam() for name in ("exact", "other samples", *WAYS)}
    rows: dict[str, list] = {name: [] for name in adams if name != "exact"}
    for i in range(steps):
        mean, shards = gradients_of(params, next(samples), jax.random.key(warmup + i))
        _, redrawn = gradients_of(params, next(others), jax.random.key(2 * warmup + steps + i))
        gradients, exact = np.asarray(shards), np.asarray(shards, np.float64).sum(axis=0)
        sums = {"other samples": np.asarray(redrawn, np.float64).sum(axis=0)}
        sums |= {name: np.asarray(way(gradients), np.float64) for name, way in WAYS.items()}
        update = adams["exact"].update(exact / len(gradients))
        for name, total in sums.items():
            scale = float(total @ exact / (exact @ exact)) - 1
            other = adams[name].update(total / len(gradients))
            rows[name].append([error(total, exact), scale, error(other, update)])
        updates, opt_state = optimizer.update(mean, opt_state, params)
        params = optax.apply_updates(params, updates)
    return {name: np.array(values) for name, values in rows.items()}


def table(rows: dict[str, np.ndarray], settings: str) -> str:
    """The medians over the steps, and the error of the last update, in markdown."""
    lines = ["| sum over shards | error of the sum | its scale less 1 | error of the update |",
             "|---|---|---|---|"]
    for name, values in rows.items():
        of_sum, scale, _ = np.median(values, axis=0)
        lines.append(f"| {name} | {of_sum:.2g} | {scale:.1g} | {values[-1, 2]:.2g} |")
    return "\n".join([*lines, "", settings])


def main(arguments: Sequence[str]) -> None:
    """Prints the table, and writes it with --output."""
    del arguments
    recipe = recipe_of(_WIDTH.value, _SHARDS.value)
    rows = compare(recipe, _WARMUP.value, _STEPS.value)
    text = table(rows, f"{_SHARDS.value} shards of one sample, {_STEPS.value} steps after "
                 f"{_WARMUP.value} of training, width {_WIDTH.value}. On {machine()}.")
    print(text)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(text + "\n")


if __name__ == "__main__":
    start(main)
