"""What attention costs, by the formula and by kernels: output, gradient, tangent, and all three.

    python -m benchmarks.attention [--lengths=256,1024] [--heads=16] [--head_dim=72] [--batch=32]
        [--dtype=bfloat16] [--output=FILE.json]

First the errors against the formula in float32, for one sample; it stops where they are too large.
Then milliseconds for one call, the median of rounds in which all take turns, each a loop on the
device whose results are the next call's arguments. TFLOP/s count the products of matrices that
the mathematics asks for, 2 b n l^2 d each: 2 for the output, 4 more for a gradient, 4 more for a
tangent; what an implementation does again is its own loss.

On a CPU kernels are only interpreted, which says nothing of their speed: --interpret adds them.
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
from absl import app, flags

from benchmarks.machine import machine
from dmf.kernels.flash import flash_attention
from dmf.kernels.placement import platform
from dmf.kernels.tangent import attention_with_tangent
from dmf.models.attention import attention

State = tuple[jax.Array, ...]
Attention = Callable[..., jax.Array]
Work = Callable[[State], State]
# Relative, by norm; the formula's own errors are printed beside the kernels'.
ALLOWED = {"bfloat16": 2e-2, "float32": 1e-2}
ON_CPU = {"lengths": ["64", "128"], "heads": 2, "batch": 2}

_LENGTHS = flags.DEFINE_list("lengths", ["256", "1024"], "numbers of tokens")
_HEADS = flags.DEFINE_integer("heads", 16, "heads", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 72, "width of a head", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "samples", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", sorted(ALLOWED), "of all arrays")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "measurements of each, interleaved", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 0.05, "about how long one measurement takes")
_INTERPRET = flags.DEFINE_boolean("interpret", False, "kernels too, on a CPU")
_OUTPUT = flags.DEFINE_string("output", "", "a .json file for all numbers")


def output(attend: Attention, x: State) -> State:
    """o."""
    return (attend(*x[:3]),)


def gradient(attend: Attention, x: State) -> State:
    """o, and its gradient from a cotangent."""
    o, pull = jax.vjp(attend, *x[:3])
    return o, *pull(x[3])


def tangent(attend: Attention, x: State) -> State:
    """o, and its tangent."""
    return jax.jvp(attend, x[:3], x[3:])


def both(attend: Attention, x: State) -> State:
    """o, tangent and gradient of one linearisation, as in a step of MeanFlow."""
    o, pull = jax.vjp(attend, *x[:3])
    (do,) = jax.linear_transpose(pull, o)(x[3:])
    return o, do, *pull(do)


def _tangent_alone(x: State) -> State:
    """The same by our kernel alone, where `tangent` takes o from the library."""
    on = platform()
    return attention_with_tangent(*x, platform="tpu" if on == "cpu" else on, interpret=on == "cpu")


PRODUCTS = {output: 2, gradient: 6, tangent: 6, both: 10}
COUNTS = {what.__name__: count for what, count in PRODUCTS.items()}
ATTENTIONS = {"xla": attention, "flash": flash_attention}


def _cases(kernels: bool) -> dict[tuple[str, str], Work]:
    """What is measured, by its name and by whom."""
    cases = {
        (what.__name__, name): functools.partial(what, attend)
        for what in PRODUCTS
        for name, attend in ATTENTIONS.items()
        if kernels or name == "xla"
    }
    if kernels:
        cases["tangent", "kernel alone"] = _tangent_alone
    return cases


def _draw(batch: int, length: int) -> State:
    """q, k, v and three more, of unit variance."""
    shape = (6, batch, length, _HEADS.value, _HEAD_DIM.value)
    drawn = np.random.default_rng(0).standard_normal(shape, np.float32)
    return tuple(jnp.asarray(x, _DTYPE.value) for x in drawn)


def _error(found: State, expected: State) -> float:
    """The largest relative error by norm of any output."""
    pairs = [(np.asarray(a, np.float32), np.asarray(b)) for a, b in zip(found, expected,
                                                                        strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def _check(cases: dict[tuple[str, str], Work], length: int) -> list[dict[str, Any]]:
    """Errors of everything that is measured; prints them, and stops if one is too large."""
    x, rows = _draw(1, length), []
    with jax.default_matmul_precision("highest"):
        whole = tuple(a.astype(jnp.float32) for a in x)
        exact = {what.__name__: jax.jit(functools.partial(what, attention))(whole)
                 for what in PRODUCTS}  # fmt: skip
    for (what, name), work in cases.items():
        error = _error(jax.jit(work)(x), exact[what])
        rows.append({"length": length, "what": what, "by": name, "error": error})
        print(f"| {length} | {what} | {name} | {error:.2e} |", flush=True)
        # Written so that an error that is not a number stops it too.
        if not error < ALLOWED[_DTYPE.value]:
            raise SystemExit(f"{what} by {name} at {length}: wrong by {error:.2e}")
    return rows


def _loop(work: Work) -> Callable[[State, int], State]:
    """(x, count): so many calls, each of what the last one gave."""

    def step(_: Any, x: State) -> State:
        found = work(x)
        return (*found, *x[: 6 - len(found)])

    return jax.jit(lambda x, count: jax.lax.fori_loop(0, count, step, x))


def _seconds(run: Callable[..., State], x: State, count: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(x, count))
    return (time.perf_counter() - start) / count


def _measure(cases: dict[tuple[str, str], Work], length: int) -> list[dict[str, Any]]:
    """Median milliseconds of everything, all taking turns; prints a row each."""
    x = _draw(_BATCH.value, length)
    runs, counts = {case: _loop(work) for case, work in cases.items()}, {}
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
    sizes = {name: flags.FLAGS[name].value for name in ("batch", "heads", "head_dim", "dtype")}
    print(f"\n{json.dumps(sizes)}. On {machine()}.")
    if _OUTPUT.value:
        found = {"machine": machine(), **sizes, "errors": errors, "times": times}
        Path(_OUTPUT.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
