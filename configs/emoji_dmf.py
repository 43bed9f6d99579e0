"""The flow model of the emoji as a flow map, fine-tuned with Decoupled MeanFlow.

    dmf train --config=configs/emoji_dmf.py --workdir=runs/emoji_dmf

starts from runs/emoji_sit (`--config.init.checkpoint=DIR` for another). It is guided, so that one
step gives an image with edges. Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import default, emoji_sit
from dmf.objectives import DecoupledMeanFlow


def get_config() -> ConfigDict:
    """The network of emoji_sit, whose last 2 of 8 blocks are conditioned on r."""
    config = emoji_sit.get_config()
    config.init.checkpoint = "runs/emoji_sit"
    config.model.conditioning = "decoupled"
    config.model.split_depth = 6
    config.model.learned_variance = True
    config.objective = default.component(DecoupledMeanFlow())
    config.objective.guidance.kappa = 0.5
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.run.steps = 500
    config.run.checkpoint_every = 100
    config.run.sample_every = 100
    config.sampling.steps = (1, 2, 4)
    return config
