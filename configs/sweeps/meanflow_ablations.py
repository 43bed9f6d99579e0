"""The ablations of MeanFlow's paper (arXiv:2505.13447, Table 1): the share of r < t, the
power of the adaptive weighting, and the distribution of times.

    dmf sweep --config=configs/digits_meanflow.py --sweep=configs/sweeps/meanflow_ablations.py \\
      --workdir=runs/meanflow_ablations

For every config of MeanFlow; the paper's is meanflow.py:b4 for 80 epochs without guidance
(--config.run.steps=400400 --config.objective.guidance.kappa=0.0), whose rows are in
meanflow_b4_ablations.py too.
"""

from collections.abc import Iterator
from typing import Any

TIMES = "objective.time_pair"


def get_sweep() -> Iterator[dict[str, Any]]:
    """The unchanged config and each ablation of it; 11 runs."""
    yield {}
    for share in (0.0, 0.5, 1.0):
        yield {f"{TIMES}.equal_probability": 1 - share}
    for power in (0.0, 0.5, 1.5, 2.0):
        yield {"objective.weighting.power": power}
    for mean, std in ((-0.2, 1.0), (-0.2, 1.2), (-0.4, 1.2)):
        yield {
            f"{TIMES}.{draw}.{field}": value
            for draw in ("first", "second") for field, value in (("mean", mean), ("std", std))
        }
