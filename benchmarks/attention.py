"""The time of attention in plain JAX and by kernels: output, gradient, tangent, and all three.

    python -m benchmarks.attention [--lengths=256,1024] [--heads=16] [--head-dim=72] [--batch=32]
        [--dtype=bfloat16] [--output=FILE.json]

The benchmark first prints the errors for one sample, compared with plain JAX in float32, and stops
if an error is too large. Then it prints the milliseconds of one call, as the median over rounds in
which all implementations take turns; a measurement is a loop on the device that feeds the results
of a call to the next. TFLOP/s count the matmuls of the mathematical definition, 2 b n l^2 d each:
2 for the output, 4 more for a gradient, 4 more for a tangent. Recomputed matmuls do not count.

On a CPU kernels are interpreted, so that their time means nothing: --interpret adds them.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.machine import machine, start
from dmf.models.attention.attention import attention, flash_attention
from dmf.models.attention.jvp_kernel import attention_jvp
from dmf.models.attention.kernel_sharding import target_platform

State = tuple[jax.Array, ...]
Attention = Callable[..., jax.Array]
Computation = Callable[[State], State]
# The largest relative error by norm. The errors of plain JAX are printed too.
MAX_ERROR = {"bfloat16": 2e-2, "float32": 1e-2}
ON_CPU = {"lengths": ["64", "128"], "heads": 2, "batch": 2}

_LENGTHS = flags.DEFINE_list("lengths", ["256", "1024"], "numbers of tokens")
_HEADS = flags.DEFINE_integer("heads", 16, "number of heads", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head-dim", 72, "width of a head", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "number of samples", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", sorted(MAX_ERROR), "dtype of all arrays")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "measurements of each implementation", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 0.05, "approximate seconds of one measurement")
_INTERPRET = flags.DEFINE_boolean("interpret", False, "measure interpreted kernels on a CPU")
_OUTPUT = flags.DEFINE_string("output", "", "a .json file for all numbers")


def output(attend: Attention, x: State) -> State:
    """The output o."""
    return (attend(*x[:3]),)


def gradient(attend: Attention, x: State) -> State:
    """The output and its gradient."""
    o, pull = jax.vjp(attend, *x[:3])
    return o, *pull(x[3])


def tangent(attend: Attention, x: State) -> State:
    """The output and its tangent."""
    return jax.jvp(attend, x[:3], x[3:])


def both(attend: Attention, x: State) -> State:
    """Output, tangent and gradient of one linearisation, as in a training step of MeanFlow."""
    o, pull = jax.vjp(attend, *x[:3])
    (do,) = jax.linear_transpose(pull, o)(x[3:])
    return o, do, *pull(do)


def _tangent_by_kernel(x: State) -> State:
    """Output and tangent by our kernel; `tangent` takes the output from the library's kernel."""
    platform = target_platform()
    cpu = platform == "cpu"
    return attention_jvp(*x, platform="tpu" if cpu else platform, interpret=cpu)


PRODUCTS = {output: 2, gradient: 6, tangent: 6, both: 10}
COUNTS = {what.__name__: count for what, count in PRODUCTS.items()}
ATTENTIONS = {"xla": attention, "flash": flash_attention}


def _cases(kernels: bool) -> dict[tuple[str, str], Computation]:
    """The computations by their name and implementation."""
    cases = {
        (what.__name__, name): functools.partial(what, attend)
        for what in PRODUCTS
        for name, attend in ATTENTIONS.items()
        if kernels or name == "xla"
    }
    if kernels:
        cases["tangent", "kernel alone"] = _tangent_by_kernel
    return cases


def _draw(batch: int, length: int) -> State:
    """q, k, v and their tangents, of unit variance."""
    shape = (6, batch, length, _HEADS.value, _HEAD_DIM.value)
    drawn = np.random.default_rng(0).standard_normal(shape, np.float32)
    return tuple(jnp.asarray(x, _DTYPE.value) for x in drawn)


def _error(actual: State, expected: State) -> float:
    """The largest relative error by norm of all outputs."""
    pairs = [(np.asarray(a, np.float32), np.asarray(b)) for a, b in zip(actual, expected,
                                                                        strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def _check(cases: dict[tuple[str, str], Computation], length: int) -> list[dict[str, Any]]:
    """Prints the error of each computation; stops if one is too large."""
    x, rows = _draw(1, length), []
    with jax.default_matmul_precision("highest"):
        whole = tuple(a.astype(jnp.float32) for a in x)
        exact = {what.__name__: jax.jit(functools.partial(what, attention))(whole)
                 for what in PRODUCTS}  # fmt: skip
    for (what, name), computation in cases.items():
        error = _error(jax.jit(computation)(x), exact[what])
        rows.append({"length": length, "what": what, "by": name, "error": error})
        print(f"| {length} | {what} | {name} | {error:.2e} |", flush=True)
        # An error that is not a number stops it too.
        if not error < MAX_ERROR[_DTYPE.value]:
            raise SystemExit(f"{what} by {name} at {length}: wrong by {error:.2e}")
    return rows


def _loop(computation: Computation) -> Callable[[State, int], State]:
    """A function of (x, count): that many calls, each with the results of the one before."""

    def step(_: Any, x: State) -> State:
        results = computation(x)
        return (*results, *x[: 6 - len(results)])

    return jax.jit(lambda x, count: jax.lax.fori_loop(0, count, step, x))


def _seconds(run: Callable[..., State], x: State, count: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(x, count))
    return (time.perf_counter() - start) / count


def _measure(cases: dict[tuple[str, str], Computation], length: int) -> list[dict[str, Any]]:
    """Prints the median milliseconds of each computation, all taking turns."""
    x = _draw(_BATCH.value, length)
    runs, counts = {case: _loop(computation) for case, computation in cases.items()}, {}
    for case, run in runs.items():
        _seconds(run, x, 1)  # compiles
        counts[case] = max(1, round(_SECONDS.value / _seconds(run, x, 2)))
    times: dict[Any, list[float]] = {case: [] for case in runs}
    for _ in range(_ROUNDS.value):
        for case, run in runs.items():
            times[case].append(_seconds(run, x, counts[case]) * 1e3)
    product = 2 * _BATCH.value * _HEADS.value * length**2 * _HEAD_DIM.value
    rows = []
    for (what, name), taken in times.items():
        low, median, high = (float(q) for q in np.quantile(taken, [0.25, 0.5, 0.75]))
        ratio = median / float(np.median(times[what, "xla"]))
        rate = COUNTS[what] * product / median / 1e9
        rows.append({"length": length, "what": what, "by": name, "milliseconds": median,
                     "quartiles": [low, high], "ratio": ratio, "tflops": rate})  # fmt: skip
        print(f"| {length} | {what} | {name} | {median:.3f} | {low:.3f} to {high:.3f} | "
              f"{ratio:.2f} | {rate:.2f} |", flush=True)  # fmt: skip
    return rows


def main(_: Sequence[str]) -> None:
    """Checks, measures, prints and writes."""
    on_cpu = jax.default_backend() == "cpu"
    for name, value in ON_CPU.items() if on_cpu else ():
        if not flags.FLAGS[name].present:
            flags.FLAGS[name].value = value
    cases = _cases(kernels=not on_cpu or _INTERPRET.value)
    lengths = [int(length) for length in _LENGTHS.value]
    print("| tokens | what | by | error |\n|---|---|---|---|")
    errors = [row for length in lengths for row in _check(cases, length)]
    print("\n| tokens | what | by | ms | quartiles | ratio to xla | TFLOP/s |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    times = [row for length in lengths for row in _measure(cases, length)]
    sizes = {name: flags.FLAGS[name].value for name in ("batch", "heads", "head-dim", "dtype")}
    print(f"\n{json.dumps(sizes)}. On {machine()}.")
    if _OUTPUT.value:
        report = {"machine": machine(), **sizes, "errors": errors, "times": times}
        Path(_OUTPUT.value).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    start(main)
