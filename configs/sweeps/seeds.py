"""The same run with several seeds, to measure the variation by chance.

    dmf sweep --config=configs/digits_sit.py --sweep=configs/sweeps/seeds.py --workdir=runs/seeds

For every config.
"""

from collections.abc import Iterator
from typing import Any

from dmf.experiments.sweeps import grid


def get_sweep() -> Iterator[dict[str, Any]]:
    """Five seeds."""
    return grid({"seed": range(5)})
