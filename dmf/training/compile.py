"""Compiles the training step of a config ahead of time, also for devices that are not attached.

XLA's compilers for TPUs (libtpu) and for NVIDIA GPUs (JAX's CUDA plugin) compile for a whole pod on
any machine and report the memory that the program takes on each chip. Only the config is read:
neither data nor checkpoints need to exist.
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

from dmf.checkpoints import load
from dmf.errors import InputError
from dmf.models.build import network
from dmf.models.dit import DiT
from dmf.models.encoders.dinov2 import DINOV2_SIZES, DinoV2
from dmf.objectives.build import objective
from dmf.runtime.device_specs import program_memory
from dmf.runtime.gpu_topologies import gpu_devices
from dmf.runtime.gpu_topologies import parse as parse_gpus
from dmf.runtime.sharding import count_slices, make_mesh
from dmf.training import build
from dmf.training.abstract_inputs import abstract_inputs
from dmf.training.hlo_collectives import Collective, collectives
from dmf.training.train_state import TrainState
from dmf.training.train_step import compiled_train_step
from dmf.types import Batch, Network, Params

# Answers to what libtpu asks the machine, if it were the host of a TPU; and no lock is taken.
_LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


class CompiledStep(NamedTuple):
    """A compiled training step in numbers; bytes are those of one device.

    Attributes:
      device: kind of device, as JAX names it.
      devices: number of devices.
      slices: number of slices, or GPU nodes, of the devices; the mesh may divide them further.
      mesh: sizes of the mesh axes by name.
      batch_size: global batch size.
      parameters: bytes of the parameters.
      opt_state: bytes of the optimizer state.
      ema_params: bytes of the EMA parameters.
      frozen: bytes of the parameters of the teacher and of the alignment encoder.
      batch: bytes of the rows of a batch.
      temporaries: bytes of temporary buffers; if the compiler refuses the program, the least that
        it could reduce them to.
      donated: bytes of outputs that are written in place of inputs: the train state.
      total: peak memory in bytes; on TPUs with the program itself.
      memory: bytes that a program may take (`program_memory`); None if unknown.
      step_flops: floating-point operations of a step on all devices, without recomputation, and
        without the alignment encoder.
      collectives: communication of a step; [] if the program does not fit.
      seconds_to_lower: time to trace the step and to lower it to StableHLO.
      seconds_to_compile: time to compile it.
    """

    device: str
    devices: int
    slices: int
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    opt_state: int
    ema_params: int
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
        """Whether the step fits into the memory of a device; None if that is unknown."""
        return None if self.memory is None else self.total <= self.memory


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of TPU slices or of GPU nodes, which need not be attached.

    Args:
      name: topology of a TPU slice, for example "v5e:4x4" or "v5p:2x2x2", or GPUs: "h100:8", or
        "h100:4x8" for four nodes of eight.
      slices: number of TPU slices.

    Raises:
      InputError: there is no such topology, or the compiler for it is not installed.
    """
    if slices < 1:
        raise InputError("slices", slices, "give 1 or more")
    if not name.startswith(("v", "tpu")):
        gpus = parse_gpus(name)
        if slices > 1:
            nodes = f"{gpus.chip}:{slices * gpus.nodes}x{gpus.gpus}"
            raise InputError("slices", slices, f"it counts TPU slices; give GPU nodes as {nodes}")
        return gpu_devices(name)
    return _tpu_devices(name, slices)


def _tpu_devices(name: str, slices: int) -> list[jax.Device]:
    """The devices of TPU slices."""
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        options = {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except Exception as error:  # libtpu and PJRT raise no types of their own.
        reason = str(error).partition("\n")[0]
        if "INVALID_ARGUMENT" in reason:
            remedy = "give one as v5e:4x4, v6e:8x8 or v5p:2x2x2, or GPUs as h100:8"
        else:
            remedy = "this needs libtpu, pip install 'jax[tpu]'"
        raise InputError("topology", name, f"{remedy} ({reason})") from None


class LoweredStep(NamedTuple):
    """A training step that is lowered to StableHLO.

    Attributes:
      recipe: what the step computes.
      inputs: train state, rows and frozen parameters as shapes with shardings.
      program: the lowered step.
    """

    recipe: build.Recipe
    inputs: tuple[TrainState, Batch, dict[str, Params]]
    program: jax.stages.Lowered


def lowered_step(config: ConfigDict, devices: list[jax.Device]) -> LoweredStep:
    """Traces and lowers the training step of a config.

    Args:
      config: the config of a run.
      devices: the devices to compile for, attached or not.

    Raises:
      InputError: a field of the config that cannot be used.
    """
    mesh = make_mesh(**dataclasses.asdict(build.mesh_shape(config.mesh)), devices=devices)
    recipe = build.recipe(config, mesh, _teacher(config), _alignment_encoder(config))
    inputs, key = abstract_inputs(recipe), jax.eval_shape(jax.random.key, 0)
    return LoweredStep(recipe, inputs, compiled_train_step(recipe).lower(*inputs, key))


def compile_step(config: ConfigDict, devices: list[jax.Device]) -> CompiledStep:
    """Compiles the training step of a config.

    Args:
      config: the config of a run.
      devices: the devices to compile for, attached or not.

    Raises:
      InputError: a field of the config that cannot be used.
    """
    start = time.perf_counter()
    recipe, inputs, lowered = lowered_step(config, devices)
    seconds_to_lower = time.perf_counter() - start
    start = time.perf_counter()
    program = _compile(lowered, _bytes_per_device(inputs))
    seconds_to_compile = time.perf_counter() - start
    kind, slices = devices[0].device_kind, count_slices(devices)
    state, batch, frozen = inputs
    trees = {"parameters": state.params, "opt_state": state.opt_state,
             "ema_params": state.ema_params, "frozen": frozen, "batch": batch}
    return CompiledStep(
        device=kind,
        devices=len(devices),
        slices=slices,
        mesh=dict(recipe.mesh.shape),
        batch_size=recipe.batch_size,
        **{name: _bytes_per_device(tree) for name, tree in trees.items()},
        temporaries=program.temporaries,
        donated=program.donated,
        total=program.total,
        memory=program_memory(kind),
        step_flops=recipe.objective.flops(recipe.network) * recipe.batch_size,
        collectives=collectives(program.text, len(devices), slices),
        seconds_to_lower=seconds_to_lower,
        seconds_to_compile=seconds_to_compile,
    )


def _teacher(config: ConfigDict) -> Network | None:
    """The network of the teacher; one like the student if the checkpoint does not exist."""
    if not (config.teacher.checkpoint and objective(config.objective).needs_teacher):
        return None
    try:
        return network(load.read_config(config.teacher.checkpoint).model)
    except InputError:
        student = network(config.model)
        if not isinstance(student, DiT):
            return student
        return dataclasses.replace(
            student, conditioning="flow", split_depth=None, block_times="split",
            embedded_times=DiT.embedded_times, learned_variance=False,
        )  # fmt: skip


def _alignment_encoder(config: ConfigDict) -> DinoV2 | None:
    """The DINOv2 of `config.alignment`; the published one of its width if the directory does not
    exist."""
    if not config.alignment.encoder:
        return None
    try:
        return load.read_encoder(config.alignment.encoder, "dinov2")
    except InputError:
        width = config.model.alignment_width
        sizes = {size["width"]: size for size in DINOV2_SIZES.values()}
        if width not in sizes:
            raise InputError(
                "model.alignment_width", width,
                f"alignment.encoder={config.alignment.encoder} does not exist, and the published "
                f"encoders have width {', '.join(map(str, sizes))}",
            ) from None
        return DinoV2(**sizes[width])


def _bytes_per_device(tree: Any) -> int:
    """The bytes of one device's shards of a tree of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


class _CompiledProgram(NamedTuple):
    """The memory and the text of a compiled program.

    Attributes:
      temporaries: bytes of temporary buffers per device.
      total: peak memory in bytes per device.
      donated: bytes of outputs in place of inputs; 0 if the compiler refuses the program.
      text: the HLO of the program; empty if the compiler refuses it.
    """

    temporaries: int
    total: int
    donated: int
    text: str


def _compile(lowered: jax.stages.Lowered, argument_bytes: int) -> _CompiledProgram:
    """Compiles a program; one that exceeds the memory of a device, which its compiler refuses, has
    the size that the error message states."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        total = _refused_bytes(str(error))
        if total is None:
            raise
        return _CompiledProgram(max(0, total - argument_bytes), total, 0, "")
    memory = compiled.memory_analysis()
    total = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    total += memory.argument_size_in_bytes + memory.output_size_in_bytes
    total -= memory.alias_size_in_bytes
    return _CompiledProgram(
        memory.temp_size_in_bytes, total, memory.alias_size_in_bytes, compiled.as_text()
    )


def _refused_bytes(message: str) -> int | None:
    """The total bytes of a program that libtpu refuses, from its error message; None for other
    errors. libtpu calls them temporaries, but includes arguments and results."""
    match = re.search(r"RESOURCE_EXHAUSTED.* temporaries \(([\d.]+)([KMGT])\)", message, re.S)
    if not match:
        return None
    # The number is rounded, and may equal the available memory, which the program exceeds.
    return round(float(match[1]) * 2 ** (10 * (1 + "KMGT".index(match[2])))) + 1
