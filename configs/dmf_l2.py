"""DMF-L/2 at 256, the ablations' base (arXiv:2510.24474): no guidance.

    dmf train --config=configs/dmf_l2.py --workdir=runs/dmf_l2

From SiT-L/2 of 400 k steps. FID as others quote it: 19.3 at 1 step, 17.3 at 2 (MeanFlow from
the same start: 20.6 and 18.1).
"""

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet


def get_config() -> ConfigDict:
    """The flow model's network, its last 6 of 24 blocks seeing the time they go to."""
    config = imagenet("L")
    config.init.checkpoint = "runs/sit_l2"
    config.model.conditioning = "decoupled"
    config.model.split_depth = 18
    config.model.learned_variance = True
    config.objective = default.decoupled_mean_flow()
    config.run.steps = 400_000
    config.sampling.steps = (1, 2)
    return config
