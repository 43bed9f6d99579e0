"""How fast images are made: the whole program, from noise to 8 bits, and the decoder's share of it.

    python -m benchmarks.sampling [--size=XL --input_size=32 --batch=64 --dtype=bfloat16]

A diffusion transformer that is a flow map, and the autoencoder of Stable Diffusion, both of random
parameters. Each way to decode is timed with the first of --steps, the last way also as a function
of StableHLO and with the other steps. All are compiled first, then take turns; medians are shown.
Prints a table, and writes it with --output=FILE.md, or its rows with --output=FILE.json.
"""

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from flax.traverse_util import flatten_dict
from jax import export
from ml_collections import ConfigDict

from benchmarks.machine import machine
from dmf import defaults, generation, stablehlo
from dmf.components import network
from dmf.encoders.autoencoder import Autoencoder
from dmf.encoders.latents import LatentSpace
from dmf.models.dit import SIZES, DiT
from dmf.scaling import STABLE_DIFFUSION_SCALE, Scaling
from dmf.typing import Params

_SIZE = flags.DEFINE_enum("size", "S", sorted(SIZES), "of the transformer")
_INPUT_SIZE = flags.DEFINE_integer("input_size", 8, "side of the latents, an eighth of the images'")
_BATCH = flags.DEFINE_integer("batch", 4, "images that are made at once")
_DTYPE = flags.DEFINE_string("dtype", "float32", "of the transformer")
_STEPS = flags.DEFINE_list("steps", ["1", "4"], "numbers of steps")
_DECODE_BATCH = flags.DEFINE_list("decode_batch", ["1", "4"], "latents that are decoded at a time")
_DECODE_DTYPE = flags.DEFINE_list("decode_dtype", ["float32", "bfloat16"], "of the decoder")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "how often each program runs")
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table, or a .json file")


class Program(NamedTuple):
    """A compiled way to make a batch, and what it is."""

    run: Callable[[], Any]
    steps: int
    decoding: str
    temporary: int


def _config() -> ConfigDict:
    config, size = defaults.get_config(), SIZES[_SIZE.value]
    config.model.update(
        size, input_size=_INPUT_SIZE.value, channels=4, num_classes=1000, dtype=_DTYPE.value,
        conditioning="decoupled", split_depth=2 * size["depth"] // 3,
    )  # fmt: skip
    return config


def _drawn(made: DiT | Autoencoder) -> Params:
    """Random parameters, drawn on the device."""
    shapes = jax.eval_shape(made.init, jax.random.key(0))

    def draw(key: jax.Array) -> Params:
        keys = map(jax.random.fold_in, itertools.repeat(key), itertools.count())
        return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape) * 0.02, shapes)

    return jax.jit(draw)(jax.random.key(0))


def _compiled(function: Callable[..., Any], steps: int, decoding: str, *inputs: Any) -> Program:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*inputs).compile()
    run = functools.partial(compiled, *inputs)
    jax.block_until_ready(run())
    print(f"{steps} step(s), {decoding}: ready in {time.perf_counter() - start:.0f} s", flush=True)
    return Program(run, steps, decoding, compiled.memory_analysis().temp_size_in_bytes)


def _programs(config: ConfigDict, params: dict[str, Params]) -> list[Program]:
    """Everything that is compared."""
    made, labels = network(config), jnp.arange(_BATCH.value) % config.model.num_classes
    seed = jnp.int32(0)
    inputs = (params, jnp.arange(_BATCH.value), labels, seed)
    ways = {
        f"{size} at a time, {dtype}": LatentSpace(
            autoencoder=Autoencoder(), scaling=Scaling(scale=STABLE_DIFFUSION_SCALE),
            decode_batch=int(size), decode_dtype=dtype,
        )
        for dtype, size in itertools.product(_DECODE_DTYPE.value, _DECODE_BATCH.value)
    }  # fmt: skip
    first, *_ = counts = [int(steps) for steps in _STEPS.value]
    last, space = list(ways.items())[-1]
    programs = []
    for steps in counts:
        shown = {"none": None} | (ways if steps == first else {last: space})
        for decoding, chosen in shown.items():
            function = generation.image_function(made, config, chosen, steps=steps)
            programs.append(_compiled(function, steps, decoding, *inputs))
    weights = flatten_dict(params, sep="/")
    function = stablehlo.image_function(made, config, space, steps=first)
    function = export.deserialize(bytearray(stablehlo.serialized(function, weights))).call
    programs.append(_compiled(function, first, f"{last}, StableHLO", weights, labels, seed))
    return programs


def _flops(config: ConfigDict) -> tuple[float, float]:
    """Operations of one forward pass of the transformer, and of decoding, for one image; as XLA
    counts them in the program before it is optimised, with the blocks unrolled."""
    config.model.scan = False
    made, autoencoder = network(config), Autoencoder()
    config.model.scan = True
    x = jax.ShapeDtypeStruct((1, *made.sample_shape), jnp.float32)
    t, y = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (jnp.float32, jnp.int32))
    looks = ((made.apply, made, (x, t, t, y)), (autoencoder.decode, autoencoder, (x,)))
    return tuple(
        jax.jit(function).lower(jax.eval_shape(of.init, jax.random.key(0)), *inputs)
        .cost_analysis()["flops"]
        for function, of, inputs in looks
    )  # fmt: skip


def _rows(programs: Sequence[Program], flops: tuple[float, float]) -> list[dict[str, Any]]:
    """What each program took, in turns."""
    taken: list[list[float]] = [[] for _ in programs]
    for _ in range(_ROUNDS.value):
        for program, seconds in zip(programs, taken, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program.run())
            seconds.append(time.perf_counter() - start)
    medians = [statistics.median(seconds) for seconds in taken]
    rows, bare, reference = [], {}, {}
    for program, seconds, each in zip(programs, medians, taken, strict=True):
        if program.decoding == "none":
            bare[program.steps] = seconds
        else:
            reference.setdefault(program.steps, seconds)
        network_flops, decoder_flops = flops
        work = program.steps * network_flops + (program.decoding != "none") * decoder_flops
        rows.append({
            "steps": program.steps,
            "decoding": program.decoding,
            "images_per_second": _BATCH.value / seconds,
            "decoder_share": 1 - bare[program.steps] / seconds,
            "speed_to_first": reference.get(program.steps, seconds) / seconds,
            "tera_operations_per_second": work * _BATCH.value / seconds / 1e12,
            "temporary_mib": program.temporary / 2**20,
            "spread": max(each) / min(each),
        })  # fmt: skip
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| steps | decoding | images a second | decoder's share | to the first decoding "
             "| 10^12 operations a second | temporary memory, MiB | slowest to fastest |",
             "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        bare = row["decoding"] == "none"
        lines.append(
            f"| {row['steps']} | {row['decoding']} | {row['images_per_second']:.3g} | "
            f"{'' if bare else format(row['decoder_share'], '.0%')} | "
            f"{'' if bare else format(row['speed_to_first'], '.2f')} | "
            f"{row['tera_operations_per_second']:.3g} | {row['temporary_mib']:,.0f} | "
            f"{row['spread']:.2f} |"
        )
    return lines


def main(_: Sequence[str]) -> None:
    """Measures, prints and writes the table."""
    config = _config()
    flops = _flops(config)
    params = {"network": _drawn(network(config)), "autoencoder": _drawn(Autoencoder())}
    rows = _rows(_programs(config, params), flops)
    side = 8 * _INPUT_SIZE.value
    about = (f"{_SIZE.value}/2 in {_DTYPE.value}, {_BATCH.value} images of {side} x {side} at "
             f"once; medians of {_ROUNDS.value} runs. Operations: {flops[0] / 1e9:,.1f} 10^9 a "
             f"step and image, {flops[1] / 1e9:,.1f} 10^9 to decode one. On {machine()}.")
    text = "\n".join([*_table(rows), "", about])
    if _OUTPUT.value:
        found = {"about": about, "rows": rows}
        as_json = _OUTPUT.value.endswith(".json")
        Path(_OUTPUT.value).write_text((json.dumps(found, indent=2) if as_json else text) + "\n")
    print(text)


if __name__ == "__main__":
    app.run(main)
