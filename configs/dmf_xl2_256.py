"""DMF-XL/2+ at 256 (arXiv:2510.24474), from SiT-XL/2 + REPA of 4 M steps.

    dmf train --config=configs/dmf_xl2_256.py --workdir=runs/dmf_xl2_256

`--config.init.checkpoint=DIR` names the flow model. Hardware: 400 k steps of 256 on 8 GPUs.
Published FID (edm2 protocol, 50,000 samples, no guidance at sampling): 2.16 at 1 step, 1.51 at 4;
others quote 1.64 at 2.
"""

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet


def get_config() -> ConfigDict:
    """The flow model's network, its last 8 of 28 blocks seeing the time they go to."""
    config = imagenet("XL")
    config.init.checkpoint = "runs/sit_xl2_repa_256"
    config.model.conditioning = "decoupled"
    config.model.split_depth = 20
    config.model.learned_variance = True
    config.objective = default.decoupled_mean_flow(default.self_guidance(1.0, 0.6, (0.0, 0.7)))
    config.run.steps = 400_000
    config.sampling.steps = (1, 2, 4)
    return config
