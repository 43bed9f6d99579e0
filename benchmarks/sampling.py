"""The throughput of sampling: the program from noise to 8 bits, and the decoder's share of it.

    python -m benchmarks.sampling [--size=XL --input-size=32 --batch=64 --dtype=bfloat16]

The networks are a diffusion transformer that is a flow map, and the autoencoder of Stable
Diffusion, both with random parameters. Each way to decode is timed with the first of --steps; the
last one also as a StableHLO function (not with --nostablehlo), and with the other steps. All
programs are compiled first and then take turns; the table shows medians. It is printed, and written
with --output=FILE.md, or as rows with --output=FILE.json.
"""

import dataclasses
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
from absl import flags
from flax.traverse_util import flatten_dict
from jax import export
from ml_collections import ConfigDict

from benchmarks.machine import machine, start
from dmf import default_config
from dmf.models.build import network
from dmf.models.dit import SIZES, DiT
from dmf.models.encoders.autoencoder_kl import STABLE_DIFFUSION_SCALE, AutoencoderKL
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.encoders.latent_space import LatentSpace
from dmf.objectives.build import interpolant
from dmf.sampling import generator, stablehlo
from dmf.sampling.build import sampling
from dmf.types import Params

_SIZE = flags.DEFINE_enum("size", "S", sorted(SIZES), "size of the transformer")
_INPUT_SIZE = flags.DEFINE_integer("input-size", 8, "side of the latents, an eighth of the images'")
_BATCH = flags.DEFINE_integer("batch", 4, "images that are generated at once")
_DTYPE = flags.DEFINE_string("dtype", "float32", "dtype of the transformer")
_STEPS = flags.DEFINE_list("steps", ["1", "4"], "numbers of sampling steps")
_DECODE_BATCH = flags.DEFINE_list("decode-batch", ["1", "4"], "latents that are decoded at once")
_DECODE_DTYPE = flags.DEFINE_list("decode-dtype", ["float32", "bfloat16"], "dtype of the decoder")
_STABLEHLO = flags.DEFINE_boolean("stablehlo", True, "also measure an exported function")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "measurements of each program")
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table, or a .json file")


class Program(NamedTuple):
    """A compiled program that generates a batch.

    Attributes:
      run: runs the program.
      steps: number of sampling steps.
      decoding: how samples are decoded; "none" if they are not.
      temporary: bytes of temporary buffers.
    """

    run: Callable[[], Any]
    steps: int
    decoding: str
    temporary: int


def _config() -> ConfigDict:
    config, size = default_config.get_config(), SIZES[_SIZE.value]
    config.model.update(
        size, input_size=_INPUT_SIZE.value, channels=4, num_classes=1000, dtype=_DTYPE.value,
        conditioning="decoupled", split_depth=2 * size["depth"] // 3,
    )  # fmt: skip
    return config


def _random_params(network: DiT | AutoencoderKL) -> Params:
    """Random parameters, drawn on the device."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))

    def draw(key: jax.Array) -> Params:
        keys = map(jax.random.fold_in, itertools.repeat(key), itertools.count())
        return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape) * 0.02, shapes)

    return jax.jit(draw)(jax.random.key(0))


def _compile(function: Callable[..., Any], steps: int, decoding: str, *inputs: Any) -> Program:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*inputs).compile()
    run = functools.partial(compiled, *inputs)
    jax.block_until_ready(run())
    print(f"{steps} step(s), {decoding}: ready in {time.perf_counter() - start:.0f} s", flush=True)
    return Program(run, steps, decoding, compiled.memory_analysis().temp_size_in_bytes)


def _programs(config: ConfigDict, params: dict[str, Params]) -> list[Program]:
    """The programs that are compared."""
    flow_network = network(config.model)
    labels = jnp.arange(_BATCH.value) % config.model.num_classes
    settings = sampling(config.sampling, interpolant(config.objective))
    seed = jnp.int32(0)
    inputs = (params, jnp.arange(_BATCH.value), labels, seed)
    latent_spaces = {
        f"{size} at once, {dtype}": LatentSpace(
            autoencoder=AutoencoderKL(), scaling=LatentScaling(scale=STABLE_DIFFUSION_SCALE),
            decode_batch=int(size), decode_dtype=dtype,
        )
        for dtype, size in itertools.product(_DECODE_DTYPE.value, _DECODE_BATCH.value)
    }  # fmt: skip
    first, *_ = counts = [int(steps) for steps in _STEPS.value]
    last, space = list(latent_spaces.items())[-1]
    programs = []
    for steps in counts:
        chosen = {"none": None} | (latent_spaces if steps == first else {last: space})
        for decoding, latent_space in chosen.items():
            function = generator.image_function(flow_network, settings, latent_space, steps=steps)
            programs.append(_compile(function, steps, decoding, *inputs))
    if _STABLEHLO.value:
        weights = flatten_dict(params, sep="/")
        function = stablehlo.image_function(flow_network, settings, space, steps=first)
        function = export.deserialize(bytearray(stablehlo.serialize(function, weights))).call
        programs.append(_compile(function, first, f"{last}, StableHLO", weights, labels, seed))
    return programs


def _flops(config: ConfigDict) -> tuple[float, float]:
    """Operations of a forward pass of the transformer and of decoding, for one image: as XLA counts
    them in the program before it is optimised, with unrolled blocks."""
    flow_network = dataclasses.replace(network(config.model), scan=False)
    autoencoder = AutoencoderKL()
    x = jax.ShapeDtypeStruct((1, *flow_network.sample_shape), jnp.float32)
    t, y = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (jnp.float32, jnp.int32))
    calls = ((flow_network.apply, flow_network, (x, t, t, y)),
             (autoencoder.decode, autoencoder, (x,)))
    return tuple(
        jax.jit(function).lower(jax.eval_shape(owner.init, jax.random.key(0)), *inputs)
        .cost_analysis()["flops"]
        for function, owner, inputs in calls
    )  # fmt: skip


def _rows(programs: Sequence[Program], flops: tuple[float, float]) -> list[dict[str, Any]]:
    """Runs the programs in turns; returns a row for each."""
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(_ROUNDS.value):
        for program, seconds in zip(programs, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program.run())
            seconds.append(time.perf_counter() - start)
    medians = [statistics.median(seconds) for seconds in times]
    rows, undecoded, reference = [], {}, {}
    for program, seconds, each in zip(programs, medians, times, strict=True):
        if program.decoding == "none":
            undecoded[program.steps] = seconds
        else:
            reference.setdefault(program.steps, seconds)
        network_flops, decoder_flops = flops
        operations = program.steps * network_flops + (program.decoding != "none") * decoder_flops
        rows.append({
            "steps": program.steps,
            "decoding": program.decoding,
            "images_per_second": _BATCH.value / seconds,
            "decoder_share": 1 - undecoded[program.steps] / seconds,
            "speed_to_first": reference.get(program.steps, seconds) / seconds,
            "tera_operations_per_second": operations * _BATCH.value / seconds / 1e12,
            "temporary_mib": program.temporary / 2**20,
            "spread": max(each) / min(each),
        })  # fmt: skip
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| steps | decoding | images per second | decoder's share | to the first decoding "
             "| 10^12 operations per second | temporary memory, MiB | slowest to fastest |",
             "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        undecoded = row["decoding"] == "none"
        lines.append(
            f"| {row['steps']} | {row['decoding']} | {row['images_per_second']:.3g} | "
            f"{'' if undecoded else format(row['decoder_share'], '.0%')} | "
            f"{'' if undecoded else format(row['speed_to_first'], '.2f')} | "
            f"{row['tera_operations_per_second']:.3g} | {row['temporary_mib']:,.0f} | "
            f"{row['spread']:.2f} |"
        )
    return lines


def main(_: Sequence[str]) -> None:
    """Measures, prints and writes the table."""
    config = _config()
    flops = _flops(config)
    networks = {"network": network(config.model), "autoencoder": AutoencoderKL()}
    params = {name: _random_params(each) for name, each in networks.items()}
    rows = _rows(_programs(config, params), flops)
    side = 8 * _INPUT_SIZE.value
    about = (f"{_SIZE.value}/2 in {_DTYPE.value}, {_BATCH.value} images of {side} x {side} at "
             f"once; medians of {_ROUNDS.value} runs. Operations: {flops[0] / 1e9:,.1f} 10^9 per "
             f"step and image, {flops[1] / 1e9:,.1f} 10^9 to decode an image. On {machine()}.")
    text = "\n".join([*_table(rows), "", about])
    if _OUTPUT.value:
        report = {"about": about, "rows": rows}
        as_json = _OUTPUT.value.endswith(".json")
        Path(_OUTPUT.value).write_text((json.dumps(report, indent=2) if as_json else text) + "\n")
    print(text)


if __name__ == "__main__":
    start(main)
