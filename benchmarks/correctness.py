"""Whether this accelerator computes what the CPU of the same machine computes.

    python -m benchmarks.correctness [--lengths=256,1024] [--head-dims=64,72] [--output=FILE.md]

It compares the attention kernels (output, tangent, and gradient of one linearisation) in bfloat16
with plain JAX in float32, and two training steps of Decoupled MeanFlow of a small transformer, in
float32 and in bfloat16, with those in float32. Errors are relative, by norm. The exit code is 1 if
one is not below its bar. On a machine without an accelerator, the kernels are interpreted, and
training steps in bfloat16 are compared with those in float32.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from benchmarks.machine import machine, start
from benchmarks.variants import Variant, config_of
from dmf.models.attention.attention import attention, flash_attention
from dmf.runtime.sharding import batch_sharding, make_mesh
from dmf.training import build
from dmf.training.train_step import abstract_state, compiled_train_step, create_train_state
from dmf.types import Batch

STEPS, BATCH, DEPTH = 2, 2, 2
# Bars of relative errors by norm, by dtype. Losses after the first step also hold the differences
# of the parameters, of which Adam makes a whole step each.
BARS = {
    "float32": {"gradient": 1e-3, "loss": 1e-3},
    "bfloat16": {"attention": 2e-2, "gradient": 2e-2, "loss": 5e-3},
}

_LENGTHS = flags.DEFINE_list("lengths", ["256", "1024"], "numbers of tokens of the attention")
_HEAD_DIMS = flags.DEFINE_list("head-dims", ["64", "72"], "widths of a head of the attention")
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table, and a .json beside it")


class Check(NamedTuple):
    """One comparison.

    Attributes:
      what: what is compared.
      error: relative error by norm.
      bar: the error must be below.
    """

    what: str
    error: float
    bar: float

    @property
    def passed(self) -> bool:
        """Whether the error is below the bar; an error that is not a number is not."""
        return self.error < self.bar


def relative_error(actual: Any, expected: Any) -> float:
    """The norm of the difference of two trees of arrays, relative to the norm of the second."""
    actual, expected = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
        for tree in (actual, expected)
    )
    difference = sum(np.sum((a - b) ** 2) for a, b in zip(actual, expected, strict=True))
    return float(np.sqrt(difference / sum(np.sum(b**2) for b in expected)))


def linearised(attend: Callable[..., jax.Array], *x: jax.Array) -> dict[str, Any]:
    """Output, tangent and gradient of one linearisation, as in a step of MeanFlow."""
    output, pull = jax.vjp(attend, *x[:3])
    (tangent,) = jax.linear_transpose(pull, output)(x[3:])
    return {"output": output, "tangent": tangent, "gradient": pull(tangent)}


def check_attention(length: int, head_dim: int) -> Iterator[Check]:
    """The kernels on the accelerator, compared with plain JAX on the CPU."""
    drawn = np.random.default_rng(0).standard_normal((6, 1, length, 2, head_dim), np.float32)
    inputs = [x.astype(jnp.bfloat16) for x in drawn]
    computed = jax.jit(functools.partial(linearised, flash_attention))(*inputs)
    on_cpu = jax.device_put([x.astype(np.float32) for x in inputs], jax.devices("cpu")[0])
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(functools.partial(linearised, attention))(*on_cpu)
    for name, expected in exact.items():
        error = relative_error(computed[name], expected)
        yield Check(f"attention, {name}, {length} tokens, heads of {head_dim}", error,
                    BARS["bfloat16"]["attention"])


def train(device: jax.Device, dtype: str) -> tuple[Any, list[float]]:
    """The gradient of the first step, as Adam's first moment holds it, and the losses of all."""
    variant = Variant(BATCH, True, "none", "auto" if dtype == "bfloat16" else "xla", "shared")
    config = config_of(variant, size="S", objective="decoupled_mean_flow", dtype=dtype, split=1)
    config.model.depth = DEPTH
    recipe = build.recipe(config, make_mesh(devices=[device]))
    draw = np.random.default_rng(0)
    # At the start of a run most parameters have no gradient, because others are zero.
    params = jax.tree.map(
        lambda leaf: 0.05 * draw.standard_normal(leaf.shape, np.float32),
        abstract_state(recipe).params,
    )
    x = draw.standard_normal((BATCH, 1, 32, 32, 8), np.float32).astype(np.float16)
    y = draw.integers(0, 1000, BATCH, np.int32)
    rows = jax.device_put(Batch(x=x, y=y), batch_sharding(recipe.mesh))
    step, key = compiled_train_step(recipe), jax.random.key(1)
    state, losses, gradient = create_train_state(recipe, jax.random.key(0), params), [], None
    for _ in range(STEPS):
        # In float32 NVIDIA GPUs would otherwise compute matmuls in TF32.
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            state, metrics = step(state, rows, {}, key)
        losses.append(float(metrics["loss"]))
        gradient = gradient or jax.device_get(optax.tree.get(state.opt_state, "mu"))
    return gradient, losses


def check_training() -> Iterator[Check]:
    """Training steps on the accelerator, compared with those on the CPU in float32."""
    gradient, losses = train(jax.devices("cpu")[0], "float32")
    on_cpu = jax.default_backend() == "cpu"
    for dtype, bars in BARS.items():
        if on_cpu and dtype == "float32":
            continue
        computed, computed_losses = train(jax.devices()[0], dtype)
        yield Check(f"training step, gradient, {dtype}", relative_error(computed, gradient),
                    bars["gradient"])
        for i, (a, b) in enumerate(zip(computed_losses, losses, strict=True)):
            yield Check(f"training step, loss {i + 1}, {dtype}", relative_error(a, b), bars["loss"])


def all_checks() -> Iterator[Check]:
    """All comparisons, of the attention first."""
    for length in map(int, _LENGTHS.value):
        for head_dim in map(int, _HEAD_DIMS.value):
            yield from check_attention(length, head_dim)
    yield from check_training()


def main(_: Sequence[str]) -> None:
    """Compares, prints, and writes the table."""
    lines = ["| what | relative error | bar | |", "|---|---|---|---|"]
    print("\n".join(lines))
    checks = []
    for check in all_checks():
        lines.append(f"| {check.what} | {check.error:.1e} | {check.bar:.0e} | "
                     f"{'passed' if check.passed else 'FAILED'} |")
        print(lines[-1], flush=True)
        checks.append(check)
    lines += ["", f"On {machine()}."]
    print("\n".join(lines[-2:]))
    if _OUTPUT.value:
        path = Path(_OUTPUT.value)
        path.write_text("\n".join(lines) + "\n")
        path.with_suffix(".json").write_text(json.dumps([c._asdict() for c in checks], indent=1))
    failed = [check.what for check in checks if not check.passed]
    if failed:
        sys.exit(f"wrong: {'; '.join(failed)}")


if __name__ == "__main__":
    start(main)
