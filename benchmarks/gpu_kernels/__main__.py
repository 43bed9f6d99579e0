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

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from benchmarks.gpu_kernels import machine_code
from benchmarks.gpu_kernels.floors import MAX_WARPS
from benchmarks.gpu_kernels.readings import HEAD, read, row
from benchmarks.machine import start
from dmf.errors import RunError

_GPUS = flags.DEFINE_list("gpus", ["a100", "h100"], "GPUs to compile for")
_LENGTHS = flags.DEFINE_list("lengths", ["64", "256", "1024", "4096"], "numbers of tokens")
_WIDTHS = flags.DEFINE_list("widths", ["64", "72", "80", "96", "128"], "widths of a head")
_HEADS = flags.DEFINE_integer("heads", 16, "number of heads", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 8192, "tokens of all samples together", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table")

NOTE = """
bfloat16, {heads} heads, {tokens} tokens in samples of the given length; 64 queries and 4 warps per
block. Spills: instructions that move registers to or from memory. Tensor instructions: how often
each occurs in the code, with its shape. Warps: those that a multiprocessor holds at a time, of
{warps}. FLOPs: those of the matmuls as compiled, relative to the definition (12 b n l² d). Then the
least microseconds to move the arrays, for the matmuls, and to issue all instructions; the floor is
the largest of them. Compiled by jax {jax}, without a GPU.
"""


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
