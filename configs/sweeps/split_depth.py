"""The split depth of Decoupled MeanFlow on the digits.

    dmf sweep --config=configs/digits_dmf.py --sweep=configs/sweeps/split_depth.py \\
      --workdir=runs/split_depth
"""

from collections.abc import Iterator
from typing import Any

from dmf.experiments.sweeps import grid


def get_sweep() -> Iterator[dict[str, Any]]:
    """Every split of six blocks with blocks on both sides."""
    return grid({"model.split_depth": range(1, 6)})
