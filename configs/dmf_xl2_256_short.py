"""DMF-XL/2 at 256 in MeanFlow's budget (arXiv:2510.24474): flow matching for about 160 epochs, then
80 epochs of Decoupled MeanFlow.

    dmf train --config=configs/dmf_xl2_256_short.py --workdir=runs/dmf_xl2_256_short

Start from `configs/sit_xl2.py` with `--config.run.steps=800000` and logit-normal times. FID as
others quote it: 2.83 at 1 step (edm2 protocol).
"""

from ml_collections import ConfigDict

from configs import dmf_xl2_256
from configs.imagenet import STEPS_PER_EPOCH


def get_config() -> ConfigDict:
    """DMF-XL/2+ with another start and fewer steps."""
    config = dmf_xl2_256.get_config()
    config.init.checkpoint = "runs/sit_xl2"
    config.run.steps = 80 * STEPS_PER_EPOCH
    return config
