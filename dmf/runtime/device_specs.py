"""Published figures of accelerators, by the device kind that JAX reports.

Peak FLOP/s are those of dense bfloat16 matmuls. The memory of TPUs is what libtpu (0.0.42) leaves
to a program, to 0.01 GiB, as it reports when it refuses a larger program ("exceeds available HBM
(15.75G)"); its runtime takes the rest. There is no MFU for devices that are not listed.
"""

import os
from typing import NamedTuple

import jax

GIB = 2**30


class DeviceSpec(NamedTuple):
    """The figures of one device, as JAX counts devices.

    Attributes:
      flops: peak FLOP/s of bfloat16 matmuls.
      memory: bytes of memory: of TPUs, what a program may take; of GPUs, the memory of the card, of
        which the driver and JAX take a part.
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
    "NVIDIA A100-SXM4-40GB": DeviceSpec(312e12, 40 * GIB, 300e9),
    "NVIDIA A100-SXM4-80GB": DeviceSpec(312e12, 80 * GIB, 300e9),
    "NVIDIA H100 80GB HBM3": DeviceSpec(989e12, 80 * GIB, 450e9),
    "NVIDIA H200": DeviceSpec(989e12, 141 * GIB, 450e9),
}


def device_memory(device: jax.Device) -> float | None:
    """Bytes of memory of a device: for a CPU, those of the machine; None if they are unknown."""
    if device.platform == "cpu":
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    specs = DEVICE_SPECS.get(device.device_kind)
    return None if specs is None else specs.memory


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
