"""What the machine code of the kernel tells for one size, and a row of the table with it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.gpu_kernels import executable, machine_code
from benchmarks.gpu_kernels.floors import floor, resident_warps, total_work
from dmf.models.attention import jvp_kernel
from dmf.runtime.gpu_topologies import GPU_CHIPS, gpu_devices

HEAD = ("GPU", "tokens", "width", "keys per block", "registers", "spills", "shared KiB",
        "tensor instructions", "warps", "FLOPs", "memory", "tensor", "issue", "floor")  # fmt: skip


class Reading(NamedTuple):
    """What the machine code of the kernel tells, for one size; see the note of the table."""

    resources: machine_code.Resources
    code: machine_code.MachineCode
    key_block: int
    shared_memory: int
    warps: int
    flops_ratio: float
    floor: tuple[float, ...]


def compile_kernel(gpu: str, batch: int, length: int, heads: int, width: int) -> bytes:
    """The kernel for arrays [batch, length, heads, width] in bfloat16: a serialized executable.

    Raises:
      InputError: there is no such GPU, or JAX for CUDA is not installed.
    """
    mesh = _mesh(gpu)
    x = jax.ShapeDtypeStruct((batch, length, heads, width), jnp.bfloat16,
                             sharding=NamedSharding(mesh, PartitionSpec()))  # fmt: skip
    kernel = jax.jit(functools.partial(jvp_kernel.attention_jvp, platform="gpu"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = kernel.lower(*[x] * 6).compile()
    return compiled.runtime_executable().serialize()


@functools.cache
def _mesh(gpu: str) -> Mesh:
    return Mesh(np.array(gpu_devices(f"{gpu}:1")), ("data",))


def read(gpu: str, batch: int, length: int, heads: int, width: int) -> Reading:
    """Compiles the kernel and reads its machine code.

    Raises:
      RunError: a tool is missing, or the executable is not understood.
    """
    (kernel,) = executable.kernels(compile_kernel(gpu, batch, length, heads, width))
    resources, code = machine_code.read(kernel.name, kernel.cubin)
    with jax.sharding.use_abstract_mesh(_mesh(gpu).abstract_mesh):
        key_block = jvp_kernel.gpu_key_block(width)
    passes = -(-length // key_block)
    numbers = batch * length * heads * width
    return Reading(
        resources, code, key_block, kernel.shared_memory,
        resident_warps(GPU_CHIPS[gpu], kernel, resources),
        total_work(kernel, code, passes).flops / (12 * length * numbers),
        tuple(floor(GPU_CHIPS[gpu], kernel, code, passes, moved=8 * 2 * numbers)),
    )  # fmt: skip


def row(gpu: str, length: int, width: int, reading: Reading) -> str:
    """A row of the table."""
    tensor = ", ".join(f"{count} {name}" for name, count in reading.code.tensor.items())
    microseconds = [f"{1e6 * seconds:.0f}" for seconds in (*reading.floor, max(reading.floor))]
    cells: list[Any] = [
        gpu, f"{length:,}", width, reading.key_block, reading.resources.registers,
        reading.code.spills, f"{reading.shared_memory / 2**10:.0f}", tensor, reading.warps,
        f"{reading.flops_ratio:.2f}", *microseconds,
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"
