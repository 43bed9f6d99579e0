"""SiT-XL/2 at 256 with representation alignment (REPA, arXiv:2410.06940), the start of DMF-XL/2+.

    dmf train --config=configs/sit_xl2_repa_256.py --workdir=runs/sit_xl2_repa_256 \\
      --config.data.directory=DIR

Alignment 0.5 at block 8 with DINOv2-B, `dmf convert`ed into `runs/dinov2_b`. DIR is a dataset that
`dmf prepare` made with `--keep-images`, whose features are computed while training; or, with
`--config.alignment.encoder=`, one that it made with `--features=runs/dinov2_b` (docs/data.md).

4 M steps, batch 256. Published: FID 1.42 at 250 SDE steps (ADM protocol) with guidance 1.8 for t in
[0, 0.7], of a model of REPA's own; the times here are those of the model that DMF starts from.

It fits 16 TPU v5e, 8 A100 of 40 or 80 GB and 8 H100, the GPUs also with
`--config.model.remat=none`: 16.44 of 29.57 GiB with DINOv2-B
(`dmf compile --config=configs/sit_xl2_repa_256.py --topology=a100-40gb:8
--config.model.remat=none`), and 16.71 of 59.33 on `h100:8`.
"""

from ml_collections import ConfigDict

from configs.imagenet import aligned
from configs.rows import Row

ROWS = {"": Row(fid={250: 1.42}, paper="arXiv:2410.06940")}


def get_config() -> ConfigDict:
    """The network at its published length."""
    config = aligned("XL", resolution=256)
    config.run.steps = 4_000_000
    config.evaluation.protocol = "adm"
    config.sampling.guidance.scale = 1.8
    config.sampling.guidance.interval = (0.0, 0.7)
    return config
