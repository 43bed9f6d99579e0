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
from dmf.components import network
from dmf.sharding import make_mesh
from dmf.step import abstract_inputs, training_step
from dmf.typing import InputError, Network

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
      mesh: sizes of its axes by name.
      batch_size: samples a step, over all devices.
      parameters, optimizer, averages, frozen: bytes of what stays from step to step.
      batch: bytes of a device's share of it.
      temporaries: bytes of what a step needs beside them; where it does not fit, what the
        compiler could not bring them below.
      total: bytes of all that a device holds at most, its program among them.
      memory: bytes that the device has; None where that is not known.
      step_flops: of a step over all devices, with nothing computed twice or recomputed.
      seconds_to_lower, seconds_to_compile: from the function to XLA's input, and to the program.
    """

    device: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    optimizer: int
    averages: int
    frozen: int
    batch: int
    temporaries: int
    total: int
    memory: float | None
    step_flops: float
    seconds_to_lower: float
    seconds_to_compile: float

    @property
    def fits(self) -> bool | None:
        """Whether the devices have the memory; None where that is not known."""
        return None if self.memory is None else self.total <= self.memory


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU slice that is not there, as "v5e:4x4" or "v5p:2x2x2".

    Raises:
      InputError: there is no such slice, or libtpu is not installed.
    """
    for variable, value in _NOT_A_TPU_HOST.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # libtpu's and PJRT's errors have no type of their own
        reason = str(error).partition("\n")[0]
        if "INVALID_ARGUMENT" in reason:
            raise InputError(f"topology={name}: give one as v5e:4x4, v6e:8x8 or v5p:2x2x2 "
                             f"({reason})") from None
        raise InputError(f"topology={name}: this needs libtpu, pip install 'dmf-jax[tpu]' "
                         f"({reason})") from None


def _teacher(config: ConfigDict) -> Network | None:
    """The network of a teacher, or one of the same size where its checkpoint is not there."""
    if not config.teacher.checkpoint:
        return None
    try:
        return network(loading.read_config(config.teacher.checkpoint))
    except InputError:
        return dataclasses.replace(
            network(config), conditioning="flow", split_depth=None, learned_variance=False
        )


def _bytes(tree: Any) -> int:
    """Of one device's share of a tree of shapes that know where they will live."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _memory(lowered: jax.stages.Lowered) -> tuple[int, int | None]:
    """Bytes of temporaries, and of all else that a device holds while the program runs.

    A program that takes more than the device has is refused by its compiler, which says how much;
    of such a one the second is not known.
    """
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        wanted = re.search(r"RESOURCE_EXHAUSTED.* temporaries \(([\d.]+)G\)", str(error), re.S)
        if not wanted:
            raise
        return round(float(wanted[1]) * GIB), None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.generated_code_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes, held


def compile_step(config: ConfigDict, devices: list[jax.Device]) -> CompiledStep:
    """Compiles the training step of a config for devices.

    Args:
      config: of a run.
      devices: there or not.

    Raises:
      InputError: a field that cannot be.
    """
    mesh = make_mesh(**config.mesh, devices=devices)
    recipe = build.recipe(config, mesh, _teacher(config))
    state, batch, frozen = inputs = abstract_inputs(recipe)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = training_step(recipe, jax.random.key(config.seed), where)
    start = time.perf_counter()
    lowered = step.lower(*inputs)
    lowered_at = time.perf_counter()
    temporaries, others = _memory(lowered)
    took = time.perf_counter() - lowered_at
    kind = devices[0].device_kind
    held = {"parameters": state.params, "optimizer": state.optimizer, "averages": state.averages,
            "frozen": frozen, "batch": batch}
    return CompiledStep(
        device=kind,
        devices=len(devices),
        mesh=dict(mesh.shape),
        batch_size=recipe.batch_size,
        **{name: _bytes(tree) for name, tree in held.items()},
        temporaries=temporaries,
        total=temporaries + (_bytes(inputs) if others is None else others),
        memory=CHIPS[kind].memory if kind in CHIPS else None,
        step_flops=recipe.objective.flops(recipe.network) * recipe.batch_size,
        seconds_to_lower=lowered_at - start,
        seconds_to_compile=took,
    )


def table(found: CompiledStep) -> str:
    """What compiling found out, in markdown."""
    axes = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
    rows = [(name, getattr(found, name)) for name in
            ("parameters", "optimizer", "averages", "frozen", "batch", "temporaries", "total")]
    lines = [f"{found.devices} x {found.device}, {axes}, batch {found.batch_size}", "",
             "| on a device | GiB |", "|---|---|"]
    lines += [f"| {name} | {size / GIB:.2f} |" for name, size in rows if size]
    if found.memory is not None:
        verdict = "fits" if found.fits else "does NOT fit"
        lines.append(f"| memory | {found.memory / GIB:.0f}: it {verdict} |")
    share = found.step_flops / found.devices
    lines += ["", f"{found.step_flops / 1e12:.4g} TFLOP a step, {share / 1e12:.4g} a device; "
              f"traced in {found.seconds_to_lower:.0f} s, compiled in "
              f"{found.seconds_to_compile:.0f} s"]
    return "\n".join(lines)
