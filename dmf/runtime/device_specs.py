"""Published figures of accelerators, by the device kind that JAX reports.

Peak FLOP/s are those of dense bfloat16 matmuls. The memory of TPUs is what libtpu (0.0.42) leaves
to a program, to 0.01 GiB, as it reports when it refuses a larger program ("exceeds available HBM
(15.75G)"); its runtime takes the rest. The memory of GPUs is what CUDA reports: of A100 and H100 as
in XLA's descriptions (openxla/xla, xla/backends/gpu/target_config/specs), of an H200 as PyTorch
prints it; JAX leaves a share of it to programs. There is no MFU for devices that are not listed.
"""

import os
from typing import NamedTuple

import jax

from dmf.errors import InputError

GIB = 2**30
# The variables that set the share of a GPU's memory that JAX reserves for programs when it starts
# (the second is its older name), and the share without them.
GPU_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
GPU_SHARE = 0.75


class DeviceSpec(NamedTuple):
    """The figures of one device, as JAX counts devices.

    Attributes:
      flops: peak FLOP/s of bfloat16 matmuls.
      memory: bytes of memory: of TPUs, what a program may take; of GPUs, all that CUDA reports, of
        which a program may take a share (`program_memory`).
      link: bytes/s that the device can send over its links (ICI, NVLink): half of the published
        bidirectional bandwidth.
    """

    flops: float
    memory: float
    link: float


DEVICE_SPECS = {
    "TPU v3": DeviceSpec(61.5e12, 15.48 * GIB, 41e9),
    "TPU v4": DeviceSpec(275e12, 30.75 * GIB, 150e9),
    "TPU v5 lite": DeviceSpec(197e12, 15.75 * GIB, 100e9),
    "TPU v5": DeviceSpec(459e12, 95.74 * GIB, 300e9),
    "TPU v6 lite": DeviceSpec(918e12, 31.25 * GIB, 224e9),
    "NVIDIA A100-SXM4-40GB": DeviceSpec(312e12, 42_331_013_120.0, 300e9),
    "NVIDIA A100-SXM4-80GB": DeviceSpec(312e12, 85_100_068_864.0, 300e9),
    "NVIDIA H100 80GB HBM3": DeviceSpec(989e12, 84_942_979_072.0, 450e9),
    "NVIDIA H200": DeviceSpec(989e12, 139.8 * GIB, 450e9),
}


def device_memory(device: jax.Device) -> float | None:
    """Bytes of memory that a program may take on a device: on a CPU, all of the machine; None if
    they are unknown."""
    if device.platform == "cpu":
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return program_memory(device.device_kind)


def program_memory(device_kind: str) -> float | None:
    """Bytes that the programs and arrays of JAX may take on a device.

    For an NVIDIA GPU that is the share of its memory that JAX reserves when it starts: 75%, or what
    XLA_CLIENT_MEM_FRACTION says. The CUDA context, NCCL and compiled code are in the rest.

    Args:
      device_kind: kind of device, as JAX reports it.

    Returns:
      The bytes, or None for a device that is not listed.

    Raises:
      InputError: XLA_CLIENT_MEM_FRACTION is not a positive number.
    """
    specs = DEVICE_SPECS.get(device_kind)
    if specs is None:
        return None
    share = gpu_share() if device_kind.startswith("NVIDIA") else 1.0
    return share * specs.memory


def gpu_share() -> float:
    """The share of a GPU's memory that JAX reserves when it starts.

    Raises:
      InputError: XLA_CLIENT_MEM_FRACTION is not a positive number.
    """
    for variable in GPU_SHARE_VARIABLES:
        value = os.environ.get(variable)
        if value:
            try:
                share = float(value)
            except ValueError:
                share = 0.0
            if not 0 < share < float("inf"):
                raise InputError(variable, value, "give a share of the memory of a GPU, as 0.75")
            return share
    return GPU_SHARE


def mfu(flops_per_second: float, device_kind: str, devices: int) -> float | None:
    """Model FLOPs utilisation (MFU): the fraction of the peak FLOP/s of all devices.

    >>> mfu(197e12, "TPU v5 lite", devices=2)
    0.5

    Args:
      flops_per_second: FLOP/s that the model needs at the current speed.
      device_kind: kind of device, as JAX reports it.
      devices: number of devices.

    Returns:
      The fraction in [0, 1], or None for a device that is not listed.
    """
    specs = DEVICE_SPECS.get(device_kind)
    return None if specs is None else flops_per_second / (specs.flops * devices)
