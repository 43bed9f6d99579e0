"""The least time of a kernel on a GPU, and how many of its blocks a multiprocessor holds.

Sources of the figures of a multiprocessor: NVIDIA's white papers on the A100 and the H100 (FLOPs of
tensor cores, schedulers), and the table of compute capabilities and the section on occupancy in the
CUDA C++ programming guide. Those of the chips are in `dmf.runtime.gpu_topologies` and
`dmf.runtime.device_specs`.
"""

from typing import NamedTuple

from benchmarks.gpu_kernels.executable import Kernel
from benchmarks.gpu_kernels.machine_code import MachineCode, Resources, Work
from dmf.runtime.device_specs import DEVICE_SPECS
from dmf.runtime.gpu_topologies import GpuChip

WARP = 32
# Of a multiprocessor of either capability.
MAX_WARPS, MAX_BLOCKS, REGISTERS = 64, 32, 65536
# Registers are given to warps by so many, and the system takes so many bytes of shared memory.
REGISTER_UNIT, SYSTEM_SHARED_MEMORY = 256, 1024
# Each scheduler of a multiprocessor issues an instruction of one warp in a cycle.
SCHEDULERS = 4
# Bfloat16 FLOPs of the tensor cores of a multiprocessor in a cycle, by the major capability.
FLOPS_PER_CYCLE = {8: 2048, 9: 4096}


class Floor(NamedTuple):
    """Least seconds of a kernel by each of its needs; they can overlap at best.

    Attributes:
      memory: to read each input and write each output once.
      tensor: for the matmuls as they are compiled, at the peak.
      issue: to issue all instructions.
    """

    memory: float
    tensor: float
    issue: float


def floor(chip: GpuChip, kernel: Kernel, code: MachineCode, passes: int, moved: float) -> Floor:
    """The least time of a kernel.

    Args:
      chip: the GPU.
      kernel: the kernel and its launch.
      code: its instructions.
      passes: passes through its loop.
      moved: bytes of its inputs and outputs.
    """
    flops, work = DEVICE_SPECS[chip.kind].flops, total_work(kernel, code, passes)
    cycles = work.instructions / (SCHEDULERS * chip.multiprocessors)
    clock = flops / (chip.multiprocessors * FLOPS_PER_CYCLE[chip.capability])
    return Floor(moved / chip.bandwidth, work.flops / flops, cycles / clock)


def total_work(kernel: Kernel, code: MachineCode, passes: int) -> Work:
    """Instructions of all warps of a launch, and their FLOPs on tensor cores."""
    warps = kernel.blocks * kernel.threads // WARP
    return Work(*(warps * (rest + passes * once)
                  for rest, once in zip(code.rest, code.loop, strict=True)))  # fmt: skip


def resident_warps(chip: GpuChip, kernel: Kernel, resources: Resources) -> int:
    """Warps of a kernel that a multiprocessor holds at a time, at most MAX_WARPS."""
    warps = kernel.threads // WARP
    registers = -(-resources.registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    # Each scheduler has a part of the registers to itself, for whole warps.
    by_registers = REGISTERS // SCHEDULERS // registers * SCHEDULERS // warps
    by_memory = chip.shared * 2**10 // (kernel.shared_memory + SYSTEM_SHARED_MEMORY)
    return min(MAX_BLOCKS, MAX_WARPS // warps, by_registers, by_memory) * warps
