"""The flow model of the digits as a flow map, fine-tuned with Decoupled MeanFlow.

    dmf train --config=configs/digits_dmf.py --workdir=runs/digits_dmf

starts from runs/digits_sit (`--config.init.checkpoint=DIR` for another). No guidance: it trades
diversity for sharpness, which the Frechet distance punishes. Hardware: 2 CPU cores. Scores:
README.md, "What it does".
"""

from ml_collections import ConfigDict

from configs import default, digits_sit
from dmf.objectives import DecoupledMeanFlow


def get_config() -> ConfigDict:
    """The network of digits_sit, whose last 2 of 6 blocks are conditioned on r."""
    config = digits_sit.get_config()
    config.init.checkpoint = "runs/digits_sit"
    config.model.conditioning = "decoupled"
    config.model.split_depth = 4
    config.model.learned_variance = True
    config.objective = default.component(DecoupledMeanFlow())
    config.optimizer.learning_rate = 1e-3
    config.run.steps = 600
    config.run.checkpoint_every = 300
    config.sampling.steps = (1, 2, 4)
    return config
