"""SiT-XL/2 at 512 with representation alignment (REPA, arXiv:2410.06940), the start of DMF-XL/2+.

    dmf train --config=configs/sit_xl2_repa_512.py --workdir=runs/sit_xl2_repa_512 \\
      --config.data.directory=DIR

Alignment 0.5 at block 8 with DINOv2-B, `dmf convert`ed into `runs/dinov2_b`, which sees images of
512 at 448. DIR is a dataset that `dmf prepare --resolution=512` made with `--keep-images`, whose
features are computed while training; or, with `--config.alignment.encoder=`, one that it made with
`--features=runs/dinov2_b` (docs/data.md).

2 M steps, batch 256. Published as the start of DMF-XL/2+ 512 only, without a score of its own. On
16 TPU v5e add `--config.gradient_accumulation=2` (docs/scaling.md). It fits 8 A100 of 40 or 80 GB:
26.69 of 29.57 GiB (`dmf compile --config=configs/sit_xl2_repa_512.py --topology=a100-40gb:8`).
"""

from ml_collections import ConfigDict

from configs.imagenet import aligned


def get_config() -> ConfigDict:
    """The network at its published length."""
    config = aligned("XL", resolution=512)
    config.model.qk_norm = True
    config.sampling.shift = 1.5
    config.run.steps = 2_000_000
    return config
