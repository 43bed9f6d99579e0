"""MeanFlow on the digits from scratch, for comparison with Decoupled MeanFlow.

    dmf train --config=configs/digits_meanflow.py --workdir=runs/digits_meanflow

Same network as digits_sit with a second time embedding, no guidance. Hardware: 2 CPU cores. Scores:
README.md, "Against MeanFlow".
"""

from ml_collections import ConfigDict

from configs import default, digits_sit
from dmf.objectives import MeanFlow


def get_config() -> ConfigDict:
    """The number of steps costs as much as digits_sit and digits_dmf together."""
    config = digits_sit.get_config()
    config.model.conditioning = "meanflow"
    config.objective = default.component(MeanFlow())
    config.run.steps = 1950
    config.sampling.steps = (1, 2, 4)
    return config
