"""How squared errors become losses in Decoupled MeanFlow.

    dmf sweep --config=configs/digits_dmf.py --sweep=configs/sweeps/weighting.py \\
      --workdir=runs/weighting

For every config of Decoupled MeanFlow, whose log-variance head the last two do not need.
"""

from collections.abc import Iterator
from typing import Any

from dmf.sweeping import grid


def get_sweep() -> Iterator[dict[str, Any]]:
    """The paper's, the one of its published code, MeanFlow's, and none."""
    names = ("cauchy", "released", "adaptive", "uniform")
    return grid({"objective.weighting.name": names})
