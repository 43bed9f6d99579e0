"""SiT-XL/2 at 512 with representation alignment (REPA, arXiv:2410.06940), the start of DMF-XL/2+.

    dmf train --config=configs/sit_xl2_repa_512.py --workdir=runs/sit_xl2_repa_512

Alignment 0.5 at block 8 with DINOv2-B: batches must carry its patch features. Hardware: 2 M
steps of 256. Published: as the start of DMF-XL/2+ 512 only.
"""

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet


def get_config() -> ConfigDict:
    """The network at its published length."""
    config = imagenet("XL", resolution=512)
    config.model.alignment_depth = 8
    config.objective = default.flow_matching(alignment_coefficient=0.5)
    config.model.qk_norm = True
    config.sampling.shift = 1.5
    config.run.steps = 2_000_000
    config.sampling.steps = (250,)
    return config
