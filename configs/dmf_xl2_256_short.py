"""DMF-XL/2 at 256 with MeanFlow's budget of 240 epochs (arXiv:2510.24474).

    dmf train --config=configs/dmf_xl2_256_short.py --workdir=runs/dmf_xl2_256_short

80 epochs, after about 160 of flow matching: `--config=configs/sit.py:xl2_short`.
"""

from ml_collections import ConfigDict

from configs import dmf_xl2_256
from configs.imagenet import STEPS_PER_EPOCH
from configs.rows import Row

ROWS = {
    "": Row(
        quoted={1: 2.83}, paper="arXiv:2510.24474", note="40 to 80 epochs (second-hand)"
    ),
}


def get_config() -> ConfigDict:
    """DMF-XL/2+ with another initial checkpoint and fewer steps."""
    config = dmf_xl2_256.get_config()
    config.init.checkpoint = "runs/sit_xl2_short"
    config.run.steps = 80 * STEPS_PER_EPOCH
    return config
