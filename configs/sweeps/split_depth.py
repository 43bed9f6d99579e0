"""How many blocks see only the time they come from: Decoupled MeanFlow on the digits.

    dmf sweep --config=configs/digits_dmf.py --sweep=configs/sweeps/split_depth.py \\
      --workdir=runs/split_depth
"""

from collections.abc import Iterator
from typing import Any

from dmf.sweeping import grid


def get_sweep() -> Iterator[dict[str, Any]]:
    """Every split of six blocks that leaves some on both sides."""
    return grid({"model.split_depth": range(1, 6)})
