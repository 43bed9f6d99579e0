"""What accelerators can do, by the name that JAX gives them: peak of matrix products, and memory.

Published figures of their makers, for bfloat16 without sparsity. A device that is not listed has
no share of peak.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device as JAX counts them.

    Attributes:
      flops: peak of bfloat16 matrix products in FLOP/s.
      memory: in bytes.
    """

    flops: float
    memory: float


CHIPS = {
    "TPU v3": Chip(61.5e12, 16 * GIB),
    "TPU v4": Chip(275e12, 32 * GIB),
    "TPU v5 lite": Chip(197e12, 16 * GIB),
    "TPU v5": Chip(459e12, 95 * GIB),
    "TPU v6 lite": Chip(918e12, 32 * GIB),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GIB),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * GIB),
    "NVIDIA H200": Chip(989e12, 141 * GIB),
}


def share_of_peak(flops_per_second: float, kind: str, devices: int) -> float | None:
    """The part of what the devices could do at best; None for a kind that is not listed."""
    chip = CHIPS.get(kind)
    return chip and flops_per_second / (chip.flops * devices)
