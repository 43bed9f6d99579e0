"""The time of a training step: compute sharing, scanned and unrolled blocks, rematerialisation.

    python -m benchmarks.train_step                                 # S/2, batch 8, as on a laptop
    python -m benchmarks.train_step --size=XL --dtype=bfloat16 --batch=64,128 --scan=1 \\
        --sharing=shared

It measures the whole step of Decoupled MeanFlow with model guidance (or of --objective), including
the optimizer and the EMA, on all devices of this machine. The variants take turns, --rounds times;
the table shows medians, and ratios to the plain step (without compute sharing) with the same scan
and remat. The operations that the objective needs at least (`Objective.flops`) are shown relative
to the published peak of the device, the MFU, and to the rate of one large matmul in the same
process. With --profile the fastest variant is traced, and its ten longest operations are printed.
A variant that does not fit into memory is left out, and one that would be compiled later than
--compile-within seconds after the first.
"""

import collections
import dataclasses
import glob
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks.machine import machine, start
from benchmarks.variants import HEAD, OBJECTIVES, Variant, config_of
from dmf.runtime.device_specs import DEVICE_SPECS, GIB, mfu
from dmf.runtime.sharding import make_mesh
from dmf.training import build
from dmf.training.abstract_inputs import abstract_inputs
from dmf.training.train_state import TrainState
from dmf.training.train_step import compiled_train_step, create_train_state

_SIZE = flags.DEFINE_string("size", "S", "size of the transformer; 32 x 32 x 4 latents, patch 2")
_SPLIT = flags.DEFINE_integer("split", 0, "split depth; 0: two thirds of the blocks")
_OBJECTIVE = flags.DEFINE_enum("objective", "decoupled_mean_flow",
                               OBJECTIVES, "objective")
_BATCH = flags.DEFINE_list("batch", ["8"], "batch sizes")
_DTYPE = flags.DEFINE_string("dtype", "float32", "dtype of the computation")
_SHARING = flags.DEFINE_list("sharing", ["plain", "shared"],
                             "plain, shared; sharedN: unconditional_microbatches=N")
_SCAN = flags.DEFINE_list("scan", ["1", "0"], "1: scanned blocks, 0: unrolled blocks")
_REMAT = flags.DEFINE_list("remat", ["none", "dots", "full"], "rematerialisation")
_ATTENTION = flags.DEFINE_list("attention", ["auto"], "implementations of attention")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "measurements of each variant")
_PROFILE = flags.DEFINE_boolean("profile", False, "also the longest operations of the fastest")
_COMPILE_WITHIN = flags.DEFINE_float("compile-within", float("inf"), "compile no further variant "
                                     "after so many seconds")
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table, and a .json beside it")


@dataclasses.dataclass
class Measurement:
    """A compiled step and its measurements.

    Attributes:
      run: runs the step on the train state in a list, and replaces it there.
      temporaries: bytes of temporary buffers.
      compile_seconds: time to compile.
      flops: operations that the objective needs at least for a step.
      seconds: wall-clock time of each run.
      cpu_seconds: CPU time of each run.
    """

    run: Callable[[list[TrainState]], Any]
    temporaries: int
    compile_seconds: float
    flops: float
    seconds: list[float]
    cpu_seconds: list[float]

    @property
    def median(self) -> float:
        """The median wall-clock time."""
        return statistics.median(self.seconds)


def _config(variant: Variant) -> ConfigDict:
    return config_of(variant, size=_SIZE.value, objective=_OBJECTIVE.value, dtype=_DTYPE.value,
                     split=_SPLIT.value)  # fmt: skip


def compile_variant(variant: Variant) -> Measurement:
    """Compiles the step of a variant, and makes its inputs."""
    recipe = build.recipe(_config(variant), make_mesh())
    abstract, batch, frozen = abstract_inputs(recipe)
    key = jax.random.key(1)
    start = time.perf_counter()
    step = compiled_train_step(recipe).lower(abstract, batch, frozen, key).compile()
    compile_seconds = time.perf_counter() - start

    draw = np.random.default_rng(0)
    rows = batch._replace(
        x=jax.device_put(draw.normal(size=batch.x.shape).astype(batch.x.dtype), batch.x.sharding),
        y=jax.device_put(draw.integers(0, 1000, batch.y.shape).astype("i4"), batch.y.sharding),
    )

    def run(states: list[TrainState]) -> Any:
        states[0], metrics = step(states[0], rows, frozen, key)
        return jax.block_until_ready(metrics)

    memory, flops = step.memory_analysis(), recipe.objective.flops(recipe.network) * variant.batch
    return Measurement(run, memory.temp_size_in_bytes, compile_seconds, flops, [], [])


def first_state(variant: Variant) -> TrainState:
    """The state before the first step, which is the same for all variants."""
    recipe = build.recipe(_config(variant), make_mesh())
    return create_train_state(recipe, jax.random.key(0), {})


def matmul_flops() -> float:
    """FLOP/s of a large matmul in --dtype on one device, the best of five."""
    on_cpu, is_float32 = jax.default_backend() == "cpu", _DTYPE.value == "float32"
    side = 8192 if not on_cpu else 2048 if is_float32 else 1024  # bfloat16 is slow on CPUs
    x = jnp.ones((side, side), _DTYPE.value)
    matmul = jax.jit(lambda x: x @ x)
    matmul(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        y = x
        for _ in range(4):
            y = matmul(y)
        y.block_until_ready()
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * side**3 / best


def longest_operations(run: Callable[[], Any], count: int = 10) -> list[tuple[str, float]]:
    """The longest operations of a step on the device, and their shares of its time."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = jax.profiler.ProfileData.from_file(path).planes
        durations: collections.Counter[str] = collections.Counter()
        for plane in planes:
            if "/device:" in plane.name:
                for line in plane.lines:
                    if "XLA Ops" in line.name or "Stream" in line.name:
                        for event in line.events:
                            durations[event.name] += event.duration_ns
    total = sum(durations.values())
    return [(name, nanoseconds / total) for name, nanoseconds in durations.most_common(count)]


def _compiled(variants: Sequence[Variant]) -> dict[Variant, Measurement]:
    """The variants that the compiler accepts, as far as there is time for them."""
    measured: dict[Variant, Measurement] = {}
    began = time.perf_counter()
    for variant in variants:
        if measured and time.perf_counter() - began > _COMPILE_WITHIN.value:
            _tell(variant, "left out, because compiling the others took too long")
            continue
        try:
            measured[variant] = compile_variant(variant)
        except jax.errors.JaxRuntimeError as error:
            _tell(variant, str(error))
    return measured


def _warm_up(measured: dict[Variant, Measurement], states: list[TrainState]) -> None:
    """Runs each variant once, and removes those for which the device has too little memory."""
    for variant in list(measured):
        began = time.perf_counter()
        try:
            measured[variant].run(states)
        except jax.errors.JaxRuntimeError as error:
            del measured[variant]
            states[0] = first_state(variant)  # It may have been donated.
            _tell(variant, str(error))
        else:
            _tell(variant, f"first step {time.perf_counter() - began:.2f} s")


def _tell(variant: Variant, text: str) -> None:
    """Prints a line at once, so that it is there if the measurement is ended early."""
    print(f"{variant}: {text.partition(chr(10))[0][:120]}", file=sys.stderr, flush=True)


def main(_: Sequence[str]) -> None:
    """Measures, prints and writes the table."""
    sharings = ["-"] if _OBJECTIVE.value == "flow_matching" else _SHARING.value
    variants = [
        Variant(int(batch), scan == "1", remat, attention, sharing)
        for batch, scan, remat, attention, sharing in itertools.product(
            _BATCH.value, _SCAN.value, _REMAT.value, _ATTENTION.value, sharings)
    ]
    measured = _compiled(variants)
    best_matmul, states = matmul_flops(), [first_state(variants[0])]
    _warm_up(measured, states)
    if not measured:
        raise SystemExit("no variant fits into the memory of the device")
    for _ in range(_ROUNDS.value):
        for measurement in measured.values():
            start, busy = time.perf_counter(), time.process_time()
            measurement.run(states)
            measurement.seconds.append(time.perf_counter() - start)
            measurement.cpu_seconds.append(time.process_time() - busy)
    _report(measured, best_matmul, states)


def _speedup(by_clock: float, by_cpu_time: float) -> str:
    """A ratio of wall-clock times; on a CPU also of CPU times, which other processes on the machine
    disturb less."""
    on_cpu = jax.default_backend() == "cpu"
    return f"{by_clock:.2f}" + (f" ({by_cpu_time:.2f} by CPU time)" if on_cpu else "")


def _report(
    measured: dict[Variant, Measurement], best_matmul: float, states: list[TrainState]
) -> None:
    devices, kind = jax.device_count(), jax.devices()[0].device_kind
    lines = [f"{HEAD} seconds | times as fast as plain | temporaries GiB | to plain | "
             "compiled in s | images/s | of a matmul | MFU |",
             "|" + "---|" * 13]
    for variant, measurement in measured.items():
        plain = measured.get(variant.plain)
        ratios = ["-", "-"]
        if plain is not None:
            speedups = [
                statistics.median(a / b for a, b in zip(slow, quick, strict=True))
                for slow, quick in ((plain.seconds, measurement.seconds),
                                    (plain.cpu_seconds, measurement.cpu_seconds))
            ]
            ratios = [_speedup(*speedups),
                      f"{measurement.temporaries / plain.temporaries:.2f}"]
        rate = measurement.flops / measurement.median
        of_peak = mfu(rate, kind, devices)
        lines.append(
            f"{variant.cells} {measurement.median:.3f} | {ratios[0]} | "
            f"{measurement.temporaries / GIB:.2f} | {ratios[1]} | "
            f"{measurement.compile_seconds:.0f} | {variant.batch / measurement.median:.1f} | "
            f"{rate / (best_matmul * devices):.1%} | "
            f"{'-' if of_peak is None else format(of_peak, '.1%')} |")
    per_sample = {m.flops / variant.batch for variant, m in measured.items()}
    specs = DEVICE_SPECS.get(kind)
    published = f", published {specs.flops / 1e12:.0f}" if specs else ""
    lines += ["", f"{_OBJECTIVE.value}, {_SIZE.value}/2 at 32 x 32 x 4, {_DTYPE.value}, medians of "
              f"{_ROUNDS.value} rounds in turn; {max(per_sample) / 1e9:.4g} GFLOP per sample; a "
              f"matmul reached {best_matmul / 1e12:.4g} TFLOP/s per device{published}. On "
              f"{machine()}."]
    print("\n".join(lines), flush=True)
    _write(lines, measured)
    if _PROFILE.value:  # Afterwards, because a device may refuse to be traced.
        fastest = min(measured, key=lambda v: measured[v].median / v.batch)
        longest = longest_operations(lambda: measured[fastest].run(states))
        table = ["", f"Longest operations of {fastest}:", "", "| operation | share |", "|---|---|",
                 *(f"| {name} | {share:.1%} |" for name, share in longest)]
        if not longest:
            table = ["", "The trace holds no operations of a device."]
        print("\n".join(table))
        _write([*lines, *table], measured)


def _write(lines: Sequence[str], measured: dict[Variant, Measurement]) -> None:
    """Writes the table, and the measurements beside it."""
    if not _OUTPUT.value:
        return
    path = Path(_OUTPUT.value)
    path.write_text("\n".join(lines) + "\n")
    rows = [v._asdict() | {"seconds": m.seconds, "cpu_seconds": m.cpu_seconds,
                           "temporaries": m.temporaries,
                           "compile_seconds": m.compile_seconds, "flops": m.flops}
            for v, m in measured.items()]
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    start(main)
