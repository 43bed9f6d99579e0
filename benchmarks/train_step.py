"""What a training step costs: shared and plain work, scanned and unrolled blocks, each remat.

    python -m benchmarks.train_step                                 # S/2, batch 8, as on a laptop
    python -m benchmarks.train_step --size=XL --dtype=bfloat16 --batch=64,128 --scan=1 --work=shared

The whole step of Decoupled MeanFlow with model guidance (or of --objective), optimizer and averages
with it, on all devices of this machine. The variants run in turn, --rounds times; the table gives
medians, and ratios to plain work under the same scan and remat. The share of peak counts what the
objective takes at least (`Objective.flops`), against the rate of one large matrix product measured
in the same run. With --profile the fastest variant is traced, and its ten longest operations told.
"""

import collections
import dataclasses
import glob
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks.machine import machine
from benchmarks.variants import HEAD, OBJECTIVES, Variant, config_of
from dmf import build, chips
from dmf import state as states
from dmf.sharding import make_mesh
from dmf.state import TrainState
from dmf.step import abstract_inputs, initial_state, training_step

_SIZE = flags.DEFINE_string("size", "S", "of the transformer, at 32 x 32 x 4 with patches of 2")
_SPLIT = flags.DEFINE_integer("split", 0, "blocks that see t; 0 is two thirds of them")
_OBJECTIVE = flags.DEFINE_enum("objective", "decoupled_mean_flow",
                               OBJECTIVES, "what is minimised")
_BATCH = flags.DEFINE_list("batch", ["8"], "batch sizes")
_DTYPE = flags.DEFINE_string("dtype", "float32", "of the computation")
_WORK = flags.DEFINE_list("work", ["plain", "shared"], "plain, shared; sharedN: null_parts=N")
_SCAN = flags.DEFINE_list("scan", ["1", "0"], "1 is scanned, 0 unrolled")
_REMAT = flags.DEFINE_list("remat", ["none", "dots", "full"], "what is recomputed")
_ATTENTION = flags.DEFINE_list("attention", ["auto"], "implementations of attention")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "how often each variant runs")
_PROFILE = flags.DEFINE_boolean("profile", False, "the longest operations of the fastest variant")
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table, and a .json beside it")


@dataclasses.dataclass
class Measured:
    """A compiled step that updates the state in the list it is given, and what it took."""

    run: Callable[[list[TrainState]], Any]
    temporaries: int
    compile_seconds: float
    flops: float
    seconds: list[float]
    cpu_seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def _config(variant: Variant) -> ConfigDict:
    return config_of(variant, size=_SIZE.value, objective=_OBJECTIVE.value, dtype=_DTYPE.value,
                     split=_SPLIT.value)  # fmt: skip


def prepared(variant: Variant) -> Measured:
    """Compiles the step of a variant, and makes what it runs on."""
    recipe = build.recipe(_config(variant), make_mesh())
    abstract, batch, frozen = abstract_inputs(recipe)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    key = jax.random.key(1)
    start = time.perf_counter()
    step = training_step(recipe, where).lower(abstract, batch, frozen, key).compile()
    took = time.perf_counter() - start

    draw = np.random.default_rng(0)
    rows = batch._replace(
        x=jax.device_put(draw.normal(size=batch.x.shape).astype(batch.x.dtype), batch.x.sharding),
        y=jax.device_put(draw.integers(0, 1000, batch.y.shape).astype("i4"), batch.y.sharding),
    )

    def run(carried: list[TrainState]) -> Any:
        carried[0], metrics = step(carried[0], rows, frozen, key)
        return jax.block_until_ready(metrics)

    memory, flops = step.memory_analysis(), recipe.objective.flops(recipe.network) * variant.batch
    return Measured(run, memory.temp_size_in_bytes, took, flops, [], [])


def first_state(variant: Variant) -> TrainState:
    """One state serves all variants: they are the same update."""
    recipe = build.recipe(_config(variant), make_mesh())
    return states.create(lambda: initial_state(recipe, jax.random.key(0), {}), recipe.mesh)


def peak() -> float:
    """FLOP/s of a large matrix product in --dtype on one device, the best of some."""
    side = 8192 if jax.default_backend() != "cpu" else 2048
    x = jnp.ones((side, side), _DTYPE.value)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        y = x
        for _ in range(4):
            y = product(y)
        y.block_until_ready()
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * side**3 / best


def longest_operations(run: Callable[[], Any], count: int = 10) -> list[tuple[str, float]]:
    """The operations of a step that took longest on the device, and their share of its time."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = jax.profiler.ProfileData.from_file(path).planes
        took: collections.Counter[str] = collections.Counter()
        for plane in planes:
            if "/device:" in plane.name:
                for line in plane.lines:
                    if "XLA Ops" in line.name or "Stream" in line.name:
                        for event in line.events:
                            took[event.name] += event.duration_ns
    total = sum(took.values())
    return [(name, nanoseconds / total) for name, nanoseconds in took.most_common(count)]


def main(_: Sequence[str]) -> None:
    """Measures, prints and writes the table."""
    works = ["-"] if _OBJECTIVE.value == "flow_matching" else _WORK.value
    variants = [
        Variant(int(batch), scan == "1", remat, attention, work)
        for batch, scan, remat, attention, work in itertools.product(
            _BATCH.value, _SCAN.value, _REMAT.value, _ATTENTION.value, works)
    ]
    measured: dict[Variant, Measured] = {}
    for variant in variants:
        try:
            measured[variant] = prepared(variant)
        except jax.errors.JaxRuntimeError as error:
            print(f"{variant}: {str(error).partition(chr(10))[0][:120]}", flush=True)
    best_product, carried = peak(), [first_state(variants[0])]
    for turn in range(_ROUNDS.value + 1):
        for found in measured.values():
            start, busy = time.perf_counter(), time.process_time()
            found.run(carried)
            if turn:  # the first warms up
                found.seconds.append(time.perf_counter() - start)
                found.cpu_seconds.append(time.process_time() - busy)
    _tell(measured, best_product, carried)


def _faster(by_clock: float, by_cpu_time: float) -> str:
    """A ratio; on a CPU also by the time that its cores were busy, which other work on the machine
    disturbs less."""
    on_cpu = jax.default_backend() == "cpu"
    return f"{by_clock:.2f}" + (f" ({by_cpu_time:.2f} by CPU time)" if on_cpu else "")


def _tell(
    measured: dict[Variant, Measured], best_product: float, carried: list[TrainState]
) -> None:
    devices = jax.device_count()
    lines = [f"{HEAD} seconds | times as fast as plain | temporaries GiB | to plain | "
             "compiled in s | images/s | of peak |",
             "|" + "---|" * 12]
    for variant, found in measured.items():
        plain = measured.get(variant.plain)
        ratios = ["-", "-"]
        if plain is not None:
            faster = [
                statistics.median(a / b for a, b in zip(slow, quick, strict=True))
                for slow, quick in ((plain.seconds, found.seconds),
                                    (plain.cpu_seconds, found.cpu_seconds))
            ]
            ratios = [_faster(*faster), f"{found.temporaries / plain.temporaries:.2f}"]
        share = found.flops / found.median / (best_product * devices)
        lines.append(
            f"{variant.cells} {found.median:.3f} | {ratios[0]} | "
            f"{found.temporaries / chips.GIB:.2f} | {ratios[1]} | {found.compile_seconds:.0f} | "
            f"{variant.batch / found.median:.1f} | {share:.1%} |")
    per_sample = {found.flops / variant.batch for variant, found in measured.items()}
    kind = jax.devices()[0].device_kind
    published = f", published {chips.CHIPS[kind].flops / 1e12:.0f}" if kind in chips.CHIPS else ""
    lines += ["", f"{_OBJECTIVE.value}, {_SIZE.value}/2 at 32 x 32 x 4, {_DTYPE.value}, medians of "
              f"{_ROUNDS.value} rounds in turn; {max(per_sample) / 1e9:.4g} GFLOP a sample; a "
              f"matrix product gave {best_product / 1e12:.4g} TFLOP/s a device{published}. On "
              f"{machine()}."]
    if _PROFILE.value:
        fastest = min(measured, key=lambda v: measured[v].median / v.batch)
        lines += ["", f"Longest operations of {fastest}:", "", "| operation | share |", "|---|---|"]
        lines += [f"| {name} | {share:.1%} |"
                  for name, share in longest_operations(lambda: measured[fastest].run(carried))]
    text = "\n".join(lines)
    print(text)
    if _OUTPUT.value:
        path = Path(_OUTPUT.value)
        path.write_text(text + "\n")
        rows = [v._asdict() | {"seconds": m.seconds, "cpu_seconds": m.cpu_seconds,
                               "temporaries": m.temporaries,
                               "compile_seconds": m.compile_seconds, "flops": m.flops}
                for v, m in measured.items()]
        path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
