"""DMF-XL/2+ at 512 (arXiv:2510.24474), from SiT-XL/2 + REPA of 2 M steps.

    dmf train --config=configs/dmf_xl2_512.py --workdir=runs/dmf_xl2_512

`--config.init.checkpoint=DIR` names the flow model. The scores are without guidance at sampling,
with latents decoded by sd-vae-ft-ema. It fits 16 TPU v6e or 4 v5p; on 16 v5e add
`--config.gradient_accumulation=2`, on 256 v5e `--config.model.remat=none`.
It fits 8 A100 of 40 or 80 GB and 8 H100; on four nodes of 8 H100 add `--config.model.remat=none`
(docs/scaling.md).
"""

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet
from configs.rows import Row
from dmf.objectives import DecoupledMeanFlow, SelfGuidance

ROWS = {
    "": Row(
        fid={1: 2.12, 4: 1.68}, quoted={2: 1.75}, paper="arXiv:2510.24474", hardware="16 GPUs"
    ),
}


def get_config() -> ConfigDict:
    """The config at 256, with qk-norm, a wider guidance interval and shifted sampling times."""
    config = imagenet("XL", resolution=512)
    config.init.checkpoint = "runs/sit_xl2_repa_512"
    config.model.conditioning = "decoupled"
    config.model.split_depth = 20
    config.model.learned_variance = True
    config.model.qk_norm = True
    guidance = SelfGuidance(kappa=0.6, interval=(0.0, 0.8))
    config.objective = default.component(DecoupledMeanFlow(guidance=guidance))
    config.run.steps = 800_000
    config.sampling.steps = (1, 2, 4)
    config.sampling.shift = 1.5
    return config
