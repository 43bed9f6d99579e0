"""A flow model of the 8 x 8 handwritten digits: the start of the quickstart.

    dmf train --config=configs/digits_sit.py --workdir=runs/digits_sit

Hardware: 2 CPU cores. Scores: README.md, "What it does".
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """A transformer of 6 blocks of width 64 on 2 x 2 patches."""
    config = default.get_config()
    config.model.scan = False  # six small blocks compile quickly, and run a quarter faster
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.emas.main.decay = 0.99
    config.run.steps = 1200
    config.run.checkpoint_every = 400
    config.sampling.steps = (1, 4, 32)
    return config
