"""MeanFlow-L/2 at 256 from scratch, 240 epochs (arXiv:2505.13447).

    dmf train --config=configs/meanflow_l2.py --workdir=runs/meanflow_l2

Effective guidance scale 2.5. Hardware: 240 epochs of 256. Published FID (meanflow protocol,
50,000 samples): 3.84 at 1 step.
"""

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import STEPS_PER_EPOCH, imagenet


def get_config() -> ConfigDict:
    """The network with its second time embedding, at its published length."""
    config = imagenet("L")
    config.model.conditioning = "meanflow"
    config.objective = default.mean_flow(default.self_guidance(0.2, 0.92, (0.0, 0.8)))
    config.run.steps = 240 * STEPS_PER_EPOCH
    config.sampling.steps = (1, 2)
    return config
