"""Flow maps at 256 in the latents of RAE, DINOv2-B: 768 x 16 x 16 (arXiv:2510.11690).

    dmf train --config=configs/rae_256.py:dmf --workdir=runs/rae_256_dmf --config.data.directory=DIR

An invitation: of these rows no run is published, and none was made here. DIR is a dataset that
`dmf prepare --resolution=256 --autoencoder=runs/rae` made, and `runs/rae` a `dmf convert`ed RAE,
which normalises its latents itself; `--config.latents.autoencoder=runs/rae` decodes samples.

The network is a DiT-XL/1 with the wide head of the paper: two blocks of width 2,048. The paper's
has RMSNorm, SwiGLU and rotary positions too, which are not here: expect other scores than its 1.51
without guidance. `flow` has the paper's times, shifted by sqrt(768 * 16 * 16 / 4096), and the
optimizer of its code: batches of 1,024, flips, Adam 2e-4 that falls linearly from epoch 40 to a
tenth at epoch 800, EMA 0.9995. `dmf` and `meanflow` start from it. They have the lengths, batches
and times of their own papers, the times shifted too, gradients clipped at norm 1 and no guidance:
our choices. The last 8 blocks of the trunk, and the wide head, are conditioned on r.

MeanFlow from random parameters is reported to explode in these latents (arXiv:2511.13019, which
reaches FID 2.03 at one step by another recipe). That clipping and the flow model are enough has
not been shown.
"""

from ml_collections import ConfigDict

from configs.improved_meanflow import BATCH_SIZE, STEPS_PER_EPOCH
from configs.other_latents import flow_map_rows, flow_model
from configs.rows import Row, chosen
from dmf.objectives import SelfGuidance

SIDE, CHANNELS = 16, 768
# From 2e-4 at epoch 40 the learning rate would reach 0 here, and is 2e-5 at epoch 800.
DECAY_START, DECAY_END = 40, 40 + 760 / 0.9

ROWS = {
    "flow": Row(paper="arXiv:2510.11690"),
    **flow_map_rows("runs/rae_256_flow", SIDE * SIDE * CHANNELS, dmf=SelfGuidance(),
                    meanflow=SelfGuidance()),
}  # fmt: skip


def get_config(row: str = "dmf") -> ConfigDict:
    """The flow model, or a flow map that starts from it."""
    config = flow_model(SIDE, CHANNELS, resolution=256)
    config.model.wide_head.depth = 2
    config.latents.scale = 1.0
    config.data.update(batch_size=BATCH_SIZE, mirror=True)
    config.optimizer.update(
        learning_rate=2e-4, b2=0.999, clip_norm=0.0, schedule="wsd",
        decay_steps=round(DECAY_END * STEPS_PER_EPOCH), decay_fraction=1 - DECAY_START / DECAY_END,
    )  # fmt: skip
    config.emas.main.decay = 0.9995
    config.run.steps = 800 * STEPS_PER_EPOCH
    return chosen(config, ROWS, row)
