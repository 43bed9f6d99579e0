"""What accelerators can do, by the name that JAX gives them: products, memory, and links.

Published figures of their makers, products in bfloat16 without sparsity; but the memory of TPUs is
what libtpu (0.0.42) leaves to a program, as it says, to 0.01 GiB, where it refuses one that takes
more ("exceeds available HBM (15.75G)"): its runtime keeps the rest. A device that is not listed has
no share of peak.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device as JAX counts them.

    Attributes:
      flops: peak of bfloat16 matrix products in FLOP/s.
      memory: in bytes: of TPUs, what a program may take; of GPUs, what the card has, which the
        driver and JAX's own reserve make less.
      link: bytes/s that it can send to its neighbours (ICI, NVLink): half of the bandwidth that is
        published for both directions.
    """

    flops: float
    memory: float
    link: float


CHIPS = {
    "TPU v3": Chip(61.5e12, 15.48 * GIB, 41e9),
    "TPU v4": Chip(275e12, 30.75 * GIB, 150e9),
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 100e9),
    "TPU v5": Chip(459e12, 95.74 * GIB, 300e9),
    "TPU v6 lite": Chip(918e12, 31.25 * GIB, 224e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GIB, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * GIB, 450e9),
    "NVIDIA H200": Chip(989e12, 141 * GIB, 450e9),
}


def share_of_peak(flops_per_second: float, kind: str, devices: int) -> float | None:
    """The part of what the devices could do at best; None for a kind that is not listed."""
    chip = CHIPS.get(kind)
    return chip and flops_per_second / (chip.flops * devices)
