"""Compiling the training step of a config for devices, which need not be there.

XLA's compiler for TPUs (libtpu) compiles for a whole pod on any machine, and says what memory each
of its chips would take. Nothing is read but the config: neither data nor checkpoints.
"""

import dataclasses
import os
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from dmf import build, loading
from dmf.chips import CHIPS, GIB
from dmf.collectives import Collective, collectives
from dmf.components import network
from dmf.encoders.dinov2 import DINOV2_SIZES, DinoV2
from dmf.models.dit import DiT
from dmf.sharding import count_slices, make_mesh
from dmf.state import TrainState
from dmf.step import abstract_inputs, training_step
from dmf.typing import Batch, InputError, Network, Params

# What libtpu would ask the machine about, if it were a TPU's host; nothing here is locked by it.
_NOT_A_TPU_HOST = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


class CompiledStep(NamedTuple):
    """What compiling found out; bytes are of one device.

    Attributes:
      device: kind of device, as JAX calls it.
      devices: how many.
      slices: in how many they lie; the axis of the mesh may cut them further.
      mesh: sizes of its axes by name.
      batch_size: samples a step, over all devices.
      parameters, optimizer, averages, frozen: bytes of what stays from step to step.
      batch: bytes of a device's share of it.
      temporaries: bytes of what a step needs beside them; where the compiler refuses it, what it
        could not bring them below.
      donated: bytes of what the step gives in the place of what it took: the state.
      total: bytes of all that a device holds at most, its program among them.
      memory: bytes that a program may take; None where that is not known.
      step_flops: of a step over all devices, with nothing computed twice or recomputed, and
        without an encoder that images are aligned with.
      collectives: what devices send each other in a step; none where it does not fit.
      seconds_to_lower, seconds_to_compile: from the function to XLA's input, and to the program.
    """

    device: str
    devices: int
    slices: int
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    optimizer: int
    averages: int
    frozen: int
    batch: int
    temporaries: int
    donated: int
    total: int
    memory: float | None
    step_flops: float
    collectives: list[Collective]
    seconds_to_lower: float
    seconds_to_compile: float

    @property
    def fits(self) -> bool | None:
        """Whether the devices have the memory; None where that is not known."""
        return None if self.memory is None else self.total <= self.memory


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of TPU slices that are not there, as "v5e:4x4" or "v5p:2x2x2".

    Raises:
      InputError: there is no such slice, or libtpu is not installed.
    """
    if slices < 1:
        raise InputError(f"slices={slices}: give 1 or more")
    for variable, value in _NOT_A_TPU_HOST.items():
        os.environ.setdefault(variable, value)
    try:
        more = {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(name, platform="tpu", **more).devices)
    except Exception as error:  # libtpu's and PJRT's errors have no type of their own
        reason = str(error).partition("\n")[0]
        if "INVALID_ARGUMENT" in reason:
            raise InputError(f"topology={name}: give one as v5e:4x4, v6e:8x8 or v5p:2x2x2 "
                             f"({reason})") from None
        raise InputError(f"topology={name}: this needs libtpu, pip install 'dmf-jax[tpu]' "
                         f"({reason})") from None


def _teacher(config: ConfigDict) -> Network | None:
    """The network of a teacher, or one of the same size where its checkpoint is not there."""
    if not (config.teacher.checkpoint and build.distils(config)):
        return None
    try:
        return network(loading.read_config(config.teacher.checkpoint))
    except InputError:
        made = network(config)
        if not isinstance(made, DiT):
            return made
        return dataclasses.replace(
            made, conditioning="flow", split_depth=None, pattern="split",
            embedded_times=DiT.embedded_times, learned_variance=False,
        )  # fmt: skip


def _encoder(config: ConfigDict) -> DinoV2 | None:
    """The encoder of alignment, or the published one of that width where it is not there."""
    if not config.alignment.encoder:
        return None
    try:
        return loading.read_encoder(config.alignment.encoder, "dinov2")
    except InputError:
        width = config.model.alignment_width
        sizes = {size["width"]: size for size in DINOV2_SIZES.values()}
        if width not in sizes:
            raise InputError(f"model.alignment_width={width}: alignment.encoder="
                             f"{config.alignment.encoder} is not there, and published ones have "
                             f"{', '.join(map(str, sizes))}") from None
        return DinoV2(**sizes[width])


def _bytes(tree: Any) -> int:
    """Of one device's share of a tree of shapes that know where they will live."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


class _Program(NamedTuple):
    """Bytes of temporaries, of all that a device holds while the program runs, of what is donated;
    and the program's text. The last two are not known of what is refused."""

    temporaries: int
    total: int
    donated: int
    text: str


def _wanted(message: str) -> int | None:
    """Bytes that a program would take, of libtpu's message that refuses it. It calls them
    temporaries, and counts arguments and results among them."""
    told = re.search(r"RESOURCE_EXHAUSTED.* temporaries \(([\d.]+)([KMGT])\)", message, re.S)
    if not told:
        return None
    # The number is rounded, and may look like what there is, than which it is more.
    return round(float(told[1]) * 2 ** (10 * (1 + "KMGT".index(told[2])))) + 1


def _compiled(lowered: jax.stages.Lowered, arguments: int) -> _Program:
    """Compiles a program of so many bytes of arguments; one that takes more than the device has
    is refused by its compiler, which says how much."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = _wanted(str(error))
        if wanted is None:
            raise
        return _Program(max(0, wanted - arguments), wanted, 0, "")
    memory = compiled.memory_analysis()
    total = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    total += memory.argument_size_in_bytes + memory.output_size_in_bytes
    total -= memory.alias_size_in_bytes
    return _Program(
        memory.temp_size_in_bytes, total, memory.alias_size_in_bytes, compiled.as_text()
    )


class Lowered(NamedTuple):
    """A training step as XLA takes it: of what recipe, for what inputs beside the key."""

    recipe: build.Recipe
    inputs: tuple[TrainState, Batch, dict[str, Params]]
    program: jax.stages.Lowered


def lowered_step(config: ConfigDict, devices: list[jax.Device]) -> Lowered:
    """Traces the training step of a config for devices, there or not.

    Raises:
      InputError: a field that cannot be.
    """
    on = make_mesh(**config.mesh, devices=devices)
    recipe = build.recipe(config, on, _teacher(config), _encoder(config))
    inputs, key = abstract_inputs(recipe), jax.eval_shape(jax.random.key, 0)
    where = jax.tree.map(lambda leaf: leaf.sharding, inputs[0])
    return Lowered(recipe, inputs, training_step(recipe, where).lower(*inputs, key))


def compile_step(config: ConfigDict, devices: list[jax.Device]) -> CompiledStep:
    """Compiles the training step of a config for devices.

    Args:
      config: of a run.
      devices: there or not.

    Raises:
      InputError: a field that cannot be.
    """
    start = time.perf_counter()
    recipe, inputs, lowered = lowered_step(config, devices)
    lowered_at = time.perf_counter()
    program = _compiled(lowered, _bytes(inputs))
    took = time.perf_counter() - lowered_at
    kind, slices = devices[0].device_kind, count_slices(devices)
    state, batch, frozen = inputs
    held = {"parameters": state.params, "optimizer": state.optimizer, "averages": state.averages,
            "frozen": frozen, "batch": batch}
    return CompiledStep(
        device=kind,
        devices=len(devices),
        slices=slices,
        mesh=dict(recipe.mesh.shape),
        batch_size=recipe.batch_size,
        **{name: _bytes(tree) for name, tree in held.items()},
        temporaries=program.temporaries,
        donated=program.donated,
        total=program.total,
        memory=CHIPS[kind].memory if kind in CHIPS else None,
        step_flops=recipe.objective.flops(recipe.network) * recipe.batch_size,
        collectives=collectives(program.text, len(devices), slices),
        seconds_to_lower=lowered_at - start,
        seconds_to_compile=took,
    )


class Estimate(NamedTuple):
    """Seconds of a step, not measured: what the links and the matrix units take at the rates given.

    Attributes:
      products: at the share of peak that is assumed.
      links: what is sent within slices.
      network: what is sent between them.
    """

    products: float
    links: float
    network: float

    @property
    def least(self) -> float:
        """All that is sent is sent while products are made."""
        return max(self)

    @property
    def most(self) -> float:
        """Nothing is."""
        return sum(self)


def estimate(found: CompiledStep, share_of_peak: float, network: float) -> Estimate | None:
    """How long a step may take; None for devices that are not listed in `dmf.chips`.

    Args:
      found: what compiling found out.
      share_of_peak: that matrix products reach, with everything that is not a product in it.
      network: bytes/s that each device can send to another slice.
    """
    chip = CHIPS.get(found.device)
    if chip is None:
        return None
    sent = {across: sum(c.sent for c in found.collectives if c.between_slices == across)
            for across in (False, True)}
    each = found.step_flops / found.devices
    return Estimate(each / (chip.flops * share_of_peak), sent[False] / chip.link,
                    sent[True] / network)


def _messages(found: list[Collective]) -> list[str]:
    """A table of what is sent; of what a loop leaves open, at least how much."""
    if not found:
        return []
    lines = ["", "| sent in a step | among | times | GiB a device |", "|---|---|---|---|"]
    for c in found:
        least = "" if c.known else "at least "
        lines.append(f"| {c.kind} | {c.group}{' between slices' * c.between_slices} | "
                     f"{least}{c.count:,} | {least}{c.sent / GIB:.3f} |")
    if not all(c.known for c in found):
        lines += ["", "at least: part of it lies in a loop that does not say how often it runs, "
                  "and counts once"]
    return lines


def table(found: CompiledStep, share_of_peak: float = 0.4, network: float = 3e9) -> str:
    """What compiling found out, in markdown."""
    axes = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
    rows = [(name, getattr(found, name)) for name in
            ("parameters", "optimizer", "averages", "frozen", "batch", "temporaries", "total")]
    lines = [f"{found.devices} x {found.device}, {axes}, batch {found.batch_size}", "",
             "| on a device | GiB |", "|---|---|"]
    lines += [f"| {name} | {size / GIB:.2f} |" for name, size in rows if size]
    if found.memory is not None:
        verdict = "fits" if found.fits else "does NOT fit"
        lines.append(f"| memory | {found.memory / GIB:.2f}: it {verdict} |")
    lines += _messages(found.collectives)
    share = found.step_flops / found.devices
    lines += ["", f"{found.step_flops / 1e12:.4g} TFLOP a step, {share / 1e12:.4g} a device; "
              f"{found.donated / GIB:.2f} GiB of state updated in place; traced in "
              f"{found.seconds_to_lower:.0f} s, compiled in {found.seconds_to_compile:.0f} s"]
    guess = estimate(found, share_of_peak, network) if found.fits else None
    if guess:
        chip = CHIPS[found.device]
        across = f", {network / 1e9:g} GB/s between slices" if found.slices > 1 else ""
        lines.append(
            f"estimated, not measured: {1e3 * guess.least:.0f} to {1e3 * guess.most:.0f} ms a step "
            f"(products {1e3 * guess.products:.0f} ms at {share_of_peak:.0%} of peak, links "
            f"{1e3 * (guess.links + guess.network):.0f} ms at {chip.link / 1e9:g} GB/s{across}; "
            "at least with all of it at once, at most one after the other)")
    return "\n".join(lines)
