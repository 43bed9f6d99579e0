"""NVIDIA GPUs to compile for that need not be attached.

XLA compiles for a GPU from a description of the chip. This takes the CUDA plugin of JAX and its
libraries, but neither a GPU nor a driver. Nothing is run, so XLA cannot tune matmuls by measuring
them: the program has the memory and the communication of one for attached GPUs, but not its speed.
"""

import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dmf.errors import InputError, brief
from dmf.runtime.device_specs import DEVICE_SPECS


class GpuChip(NamedTuple):
    """What XLA asks of a chip, beside its memory in `DEVICE_SPECS`.

    Attributes:
      kind: device kind, as JAX names it.
      capability: major number of the CUDA compute capability; the minor number is 0.
      features: which instructions of that architecture XLA may use, as XLA names them.
      multiprocessors: number of streaming multiprocessors.
      lanes: float32 lanes of a multiprocessor.
      shared: KiB of shared memory of a multiprocessor; a block may take 1 KiB less.
      l2: MiB of L2 cache.
      clock: boost clock in GHz.
      bandwidth: bytes/s of the memory.
    """

    kind: str
    capability: int
    features: str
    multiprocessors: int
    lanes: int
    shared: int
    l2: int
    clock: float
    bandwidth: float


# The SXM modules. NVIDIA publishes these figures in the data sheets of A100, H100 and H200, in the
# white papers on the two architectures, and (shared memory, registers, blocks) in the table of
# compute capabilities of the CUDA C++ programming guide. They agree with XLA's own descriptions of
# the modules (openxla/xla, xla/backends/gpu/target_config/specs), from where the clocks are.
GPU_CHIPS = {
    "a100": GpuChip("NVIDIA A100-SXM4-80GB", 8, "NONE", 108, 64, 164, 40, 1.41, 2.039e12),
    "a100-40gb": GpuChip("NVIDIA A100-SXM4-40GB", 8, "NONE", 108, 64, 164, 40, 1.41, 1.555e12),
    "h100": GpuChip(
        "NVIDIA H100 80GB HBM3", 9, "ACCELERATED_FEATURES", 132, 128, 228, 50, 1.98, 3.352e12
    ),
    "h200": GpuChip("NVIDIA H200", 9, "ACCELERATED_FEATURES", 132, 128, 228, 50, 1.98, 4.8e12),
}
# The limits of blocks and registers are those of all chips above. CUDA and cuDNN are the oldest
# versions that the extra `cuda` installs.
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_per_block}
  shared_memory_per_core: {shared}
  core_count: {chip.multiprocessors}
  fpus_per_core: {chip.lanes}
  l2_cache_size: {l2}
  clock_rate_ghz: {chip.clock}
  memory_bandwidth: {chip.bandwidth:.0f}
  device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: {chip.capability} feature_extension: {chip.features} }}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{chip.kind}"
"""
_NAME = re.compile(r"([a-z0-9\-]+):(?:(\d{1,4})x)?(\d{1,2})")


class GpuTopology(NamedTuple):
    """GPUs of one kind: a number of nodes with as many GPUs each."""

    chip: str
    nodes: int
    gpus: int


def parse(name: str) -> GpuTopology:
    """Reads the name of GPUs to compile for.

    >>> parse("h100:8"), parse("a100:4x8")
    (GpuTopology(chip='h100', nodes=1, gpus=8), GpuTopology(chip='a100', nodes=4, gpus=8))

    Args:
      name: CHIP:GPUS for the GPUs of a node, or CHIP:NODESxGPUS, with a chip of `GPU_CHIPS`.

    Raises:
      InputError: there are no such GPUs.
    """
    match = _NAME.fullmatch(name)
    chip, nodes, gpus = match.groups() if match else ("", "0", "0")
    topology = GpuTopology(chip, int(nodes or 1), int(gpus))
    if topology.chip not in GPU_CHIPS or not topology.nodes or not topology.gpus:
        raise InputError("topology", name, "give a TPU slice as v5e:4x4, v6e:8x8 or v5p:2x2x2, or "
                         "GPUs as h100:8, or h100:4x8 for 4 nodes of 8 (at most 9999 of 99), of "
                         f"{', '.join(GPU_CHIPS)}")
    return topology


def gpu_devices(name: str) -> list[jax.Device]:
    """The GPUs that a name stands for, for the compiler alone; each node has one process.

    Args:
      name: as for `parse`.

    Raises:
      InputError: there are no such GPUs, or JAX for CUDA is not installed.
    """
    topology = parse(name)
    # JAX would load libraries that need a driver, to compare versions, and refuse the plugin.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        described = topologies.get_topology_desc(
            topology.chip,
            platform="cuda",
            target_config=description(topology.chip),
            # Of devices that a fast network joins, as JAX divides attached GPUs: one node each.
            topology=f"{topology.nodes}x1x{topology.gpus}",
        )
    except Exception as error:  # JAX and PJRT raise no types of their own.
        raise InputError("topology", name, "this needs JAX for CUDA, but neither a GPU nor a "
                         f"driver: pip install 'jax[cuda13]' ({brief(error)})") from None
    return list(described.devices)


def description(chip: str) -> str:
    """The description of a chip of `GPU_CHIPS`: XLA's GpuTargetConfigProto as text."""
    figures = GPU_CHIPS[chip]
    return _DESCRIPTION.format(
        chip=figures,
        shared=figures.shared * 2**10,
        shared_per_block=(figures.shared - 1) * 2**10,
        l2=figures.l2 * 2**20,
        memory=DEVICE_SPECS[figures.kind].memory,
    )
