"""How many of 24 blocks see only the time they come from: the ablation of arXiv:2510.24474.

    dmf sweep --config=configs/dmf_l2.py --sweep=configs/sweeps/split_depth_l2.py \\
      --workdir=runs/split_depth_l2 --on=print
"""

from collections.abc import Iterator
from typing import Any

from dmf.sweeping import grid


def get_sweep() -> Iterator[dict[str, Any]]:
    """Around two thirds to three quarters of the network, which are published as best."""
    return grid({"model.split_depth": (12, 16, 18, 20, 22)})
