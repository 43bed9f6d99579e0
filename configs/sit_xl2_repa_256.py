"""SiT-XL/2 at 256 with representation alignment (REPA, arXiv:2410.06940), the start of DMF-XL/2+.

    dmf train --config=configs/sit_xl2_repa_256.py --workdir=runs/sit_xl2_repa_256

Alignment 0.5 at block 8 with DINOv2-B: batches must carry its patch features. Hardware: 4 M
steps of 256. Published: REPA with a guidance interval 1.42 at 250 SDE steps.
"""

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet


def get_config() -> ConfigDict:
    """The network at its published length."""
    config = imagenet("XL", resolution=256)
    config.model.alignment_depth = 8
    config.objective = default.flow_matching(alignment_coefficient=0.5)
    config.run.steps = 4_000_000
    config.sampling.steps = (250,)
    return config
