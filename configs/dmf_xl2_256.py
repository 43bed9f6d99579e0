"""DMF-XL/2+ at 256 (arXiv:2510.24474), from SiT-XL/2 + REPA of 4 M steps.

    dmf train --config=configs/dmf_xl2_256.py --workdir=runs/dmf_xl2_256

`--config.init.checkpoint=DIR` names the flow model. The scores are without guidance at sampling,
with latents decoded by sd-vae-ft-ema. It fits 16 TPU v5e, 16 v6e, 4 v5p, 8 A100 of 40 or 80 GB,
and 8 H100, also with `--config.model.remat=none`; on 256 v5e add it (docs/scaling.md).
"""

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet
from configs.rows import Row
from dmf.objectives import DecoupledMeanFlow, SelfGuidance

ROWS = {
    "": Row(
        fid={1: 2.16, 4: 1.51}, quoted={2: 1.64}, paper="arXiv:2510.24474", hardware="8 GPUs"
    ),
}


def get_config() -> ConfigDict:
    """The flow model's network, whose last 8 of 28 blocks are conditioned on r."""
    config = imagenet("XL")
    config.init.checkpoint = "runs/sit_xl2_repa_256"
    config.model.conditioning = "decoupled"
    config.model.split_depth = 20
    config.model.learned_variance = True
    guidance = SelfGuidance(kappa=0.6, interval=(0.0, 0.7))
    config.objective = default.component(DecoupledMeanFlow(guidance=guidance))
    config.run.steps = 400_000
    config.sampling.steps = (1, 2, 4)
    return config
