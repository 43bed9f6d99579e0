"""SiT-XL/2 at 256 as first published (arXiv:2401.08740): uniform times, flips, no alignment.

    dmf train --config=configs/sit_xl2.py --workdir=runs/sit_xl2 --config.data.directory=DIR

AdamW has its usual betas, without a clip; bfloat16 is our choice, not the paper's. Sampling takes
250 SDE steps with guidance 1.5 of three of the four latent channels, as published.

It fits 16 TPU v5e and 8 A100 of 40 or 80 GB, there also with `--config.model.remat=none`: 16.06 of
29.57 GiB (`dmf compile --config=configs/sit_xl2.py --topology=a100-40gb:8
--config.model.remat=none`).
"""

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet
from configs.rows import Row
from dmf.objectives import FlowMatching, UniformTime

ROWS = {"": Row(fid={250: 2.06}, paper="arXiv:2401.08740")}


def get_config() -> ConfigDict:
    """The network at its published length."""
    config = imagenet("XL")
    config.objective = default.component(FlowMatching(time_sampler=UniformTime()))
    config.data.mirror = True
    config.optimizer.update(b2=0.999, clip_norm=0.0)
    config.run.steps = 7_000_000
    config.sampling.sampler = ConfigDict({"name": "sde"})
    config.sampling.steps = (250,)
    config.sampling.guidance.update(scale=1.5, channels=3)
    config.evaluation.protocol = "adm"
    return config
