"""A flow model of one's own images as a flow map, fine-tuned with Decoupled MeanFlow.

    dmf train --config=configs/images_dmf.py --workdir=runs/images_dmf

starts from runs/images_sit (`--config.init.checkpoint=DIR` for another), whose sizes and data it
takes. Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import default, images_sit
from dmf.objectives import DecoupledMeanFlow


def get_config() -> ConfigDict:
    """The network of images_sit, whose last 2 of 6 blocks are conditioned on r."""
    config = images_sit.get_config()
    config.init.checkpoint = "runs/images_sit"
    config.model.conditioning = "decoupled"
    config.model.split_depth = 4
    config.model.learned_variance = True
    config.objective = default.component(DecoupledMeanFlow())
    config.optimizer.learning_rate = 1e-3
    config.run.steps = 300
    config.run.checkpoint_every = 150
    config.run.sample_every = 150
    config.sampling.steps = (1, 2, 4)
    return config
