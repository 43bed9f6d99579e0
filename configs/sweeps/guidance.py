"""The strength of model guidance in training, with three seeds each.

    dmf sweep --config=configs/digits_dmf.py --sweep=configs/sweeps/guidance.py \\
      --workdir=runs/guidance

For every config whose objective has model guidance: digits_dmf, digits_meanflow, dmf_xl2_256,
meanflow.py:b4 and others. The effective scale is omega / (1 - kappa).
"""

from collections.abc import Iterator
from typing import Any

from dmf.experiments.sweeps import grid


def get_sweep() -> Iterator[dict[str, Any]]:
    """Effective scales 1, 1.25, 1.67 and 2.5 for omega 1."""
    return grid({"objective.guidance.kappa": (0.0, 0.2, 0.4, 0.6), "seed": range(3)})
