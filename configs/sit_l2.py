"""SiT-L/2 at 256, 400 k steps: where the ablations and distillations of Decoupled MeanFlow start.

    dmf train --config=configs/sit_l2.py --workdir=runs/sit_l2

Times are logit-normal, as everywhere in arXiv:2510.24474. Hardware: 400 k steps of 256.
"""

from ml_collections import ConfigDict

from configs.imagenet import imagenet


def get_config() -> ConfigDict:
    """The network at its published length."""
    config = imagenet("L")
    config.run.steps = 400_000
    config.sampling.steps = (250,)
    return config
