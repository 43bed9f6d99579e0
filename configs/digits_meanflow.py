"""MeanFlow on the digits from scratch: the method that Decoupled MeanFlow is measured against.

    dmf train --config=configs/digits_meanflow.py --workdir=runs/digits_meanflow

Same network as digits_sit with a second time embedding, no guidance. Hardware: 2 CPU cores. Scores:
README.md, "Against MeanFlow".
"""

from ml_collections import ConfigDict

from configs import default, digits_sit


def get_config() -> ConfigDict:
    """As many steps as cost what digits_sit and digits_dmf cost together."""
    config = digits_sit.get_config()
    config.model.conditioning = "meanflow"
    config.objective = default.mean_flow()
    config.run.steps = 1950
    config.optimizer.decay_steps = 1950
    config.sampling.steps = (1, 2, 4)
    return config
