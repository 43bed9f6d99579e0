"""DMF-L/2 at 256 distilled from a frozen, guided flow model: the start is also the teacher.

    dmf train --config=configs/dmf_l2_distilled.py --workdir=runs/dmf_l2_distilled

Published by a third party: FID 3.31 / 2.82 / 2.68 at 1 / 2 / 4 steps.
"""

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet


def get_config() -> ConfigDict:
    """A SiT-L/2 as start and as teacher."""
    config = imagenet("L")
    config.init.checkpoint = "runs/sit_l2"
    config.teacher.checkpoint = "runs/sit_l2"
    config.model.conditioning = "decoupled"
    config.model.split_depth = 18
    config.model.learned_variance = True
    config.objective = default.decoupled_mean_flow(default.teacher_guidance(1.5, (0.0, 0.7)))
    config.run.steps = 400_000
    config.sampling.steps = (1, 2, 4)
    return config
