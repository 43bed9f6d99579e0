"""The same run from several seeds: how much of a difference is chance.

    dmf sweep --config=configs/digits_sit.py --sweep=configs/sweeps/seeds.py --workdir=runs/seeds

For every config.
"""

from collections.abc import Iterator
from typing import Any

from dmf.sweeping import grid


def get_sweep() -> Iterator[dict[str, Any]]:
    """Five of them."""
    return grid({"seed": range(5)})
