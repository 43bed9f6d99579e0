"""The split depth of 24 blocks: the ablation of arXiv:2510.24474.

    dmf sweep --config=configs/dmf_l2.py --sweep=configs/sweeps/split_depth_l2.py \\
      --workdir=runs/split_depth_l2 --launcher=print
"""

from collections.abc import Iterator
from typing import Any

from dmf.experiments.sweeps import grid


def get_sweep() -> Iterator[dict[str, Any]]:
    """Split depths around the published best, two thirds to three quarters of the blocks."""
    return grid({"model.split_depth": (12, 16, 18, 20, 22)})
