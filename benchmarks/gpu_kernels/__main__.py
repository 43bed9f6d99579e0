"""What our attention kernel needs on NVIDIA GPUs that are not there, from its machine code.

    python -m benchmarks.gpu_kernels [--gpus=a100,h100] [--lengths=64,256] [--widths=72]
        [--output=FILE.md]

It compiles the kernel that computes attention with its tangent, as a program for one GPU, and reads
the result: registers of a thread, spilled registers, shared memory of a block, instructions of the
tensor cores, and how many warps a multiprocessor holds at a time. The last columns are the least
microseconds of a call, for three reasons: to move each array once, to compute the matmuls as they
are compiled, and to issue all instructions. The kernel cannot be faster than the largest of them;
how much slower it is, only a GPU can tell (`python -m benchmarks.attention`).

This needs no GPU and no driver, but JAX for CUDA and two of NVIDIA's tools:

    pip install -e '.[cuda]' nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm

The exit code is 1 if a kernel spills.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.gpu_kernels import executable, machine_code
from benchmarks.gpu_kernels.floors import MAX_WARPS, floor, resident_warps, total_work
from benchmarks.machine import start
from dmf.errors import RunError
from dmf.models.attention import jvp_kernel
from dmf.runtime.gpu_topologies import GPU_CHIPS, gpu_devices

_GPUS = flags.DEFINE_list("gpus", ["a100", "h100"], "GPUs to compile for")
_LENGTHS = flags.DEFINE_list("lengths", ["64", "256", "1024", "4096"], "numbers of tokens")
_WIDTHS = flags.DEFINE_list("widths", ["64", "72", "80", "96", "128"], "widths of a head")
_HEADS = flags.DEFINE_integer("heads", 16, "number of heads", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 8192, "tokens of all samples together", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table")

HEAD = ("GPU", "tokens", "width", "keys per block", "registers", "spills", "shared KiB",
        "tensor instructions", "warps", "FLOPs", "memory", "tensor", "issue", "floor")  # fmt: skip
NOTE = """
bfloat16, {heads} heads, {tokens} tokens in samples of the given length; 64 queries and 4 warps per
block. Spills: instructions that move registers to or from memory. Tensor instructions: how often
each occurs in the code, with its shape. Warps: those that a multiprocessor holds at a time, of
{warps}. FLOPs: those of the matmuls as compiled, relative to the definition (12 b n l² d). Then the
least microseconds to move the arrays, for the matmuls, and to issue all instructions; the floor is
the largest of them. Compiled by jax {jax}, without a GPU.
"""


class Reading(NamedTuple):
    """What the machine code of the kernel tells, for one size; see the note below the table."""

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


def main(_: Sequence[str]) -> None:
    """Compiles, prints and writes the table."""
    jax.config.update("jax_platforms", "cpu")
    for name in machine_code.TOOLS:  # A missing one is told before anything is compiled.
        machine_code.tool(name)
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    print(*lines, sep="\n", flush=True)
    spilling = []
    for gpu in _GPUS.value:
        for length in map(int, _LENGTHS.value):
            for width in map(int, _WIDTHS.value):
                reading = read(gpu, max(1, _TOKENS.value // length), length, _HEADS.value, width)
                lines.append(row(gpu, length, width, reading))
                print(lines[-1], flush=True)
                if reading.code.spills or reading.resources.stack:
                    spilling.append(f"{gpu} {length} {width}")
    note = NOTE.format(heads=_HEADS.value, tokens=_TOKENS.value, warps=MAX_WARPS,
                       jax=jax.__version__)  # fmt: skip
    print(note)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text("\n".join([*lines, note]))
    if spilling:
        raise RunError(f"the kernel spills registers: {', '.join(spilling)}")


if __name__ == "__main__":
    start(main)
