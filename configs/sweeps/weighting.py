"""The weighting of squared errors in Decoupled MeanFlow.

    dmf sweep --config=configs/digits_dmf.py --sweep=configs/sweeps/weighting.py \\
      --workdir=runs/weighting

For every config of Decoupled MeanFlow, whose log-variance head the last two do not need.
"""

from collections.abc import Iterator
from typing import Any

from dmf.experiments.sweeps import grid


def get_sweep() -> Iterator[dict[str, Any]]:
    """The weightings of the paper, of its published code, of MeanFlow, and none."""
    names = ("cauchy", "published_cauchy", "adaptive", "uniform")
    return grid({"objective.weighting.name": names})
