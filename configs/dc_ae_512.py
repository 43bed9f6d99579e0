"""Flow maps at 512 in the latents of DC-AE f32c32: 32 x 16 x 16 (arXiv:2410.10733).

    dmf train --config=configs/dc_ae_512.py:dmf --workdir=runs/dc_ae_512_dmf \\
      --config.data.directory=DIR

An invitation: of these rows no run is published, and none was made here. DIR is a dataset that
`dmf prepare --resolution=512 --autoencoder=runs/dc_ae` made, and `runs/dc_ae` a `dmf convert`ed
DC-AE. The scale is that of SANA's; `dmf prepare` prints the one of another release.

A place of the latents is a token of a DiT-XL/1, so that images of 512 x 512 are 256 tokens: as many
as those of 256 x 256 in the latents of Stable Diffusion. Times are shifted as for RAE, by
sqrt(32 * 16 * 16 / 4096). `flow` is as long as the start of DMF-XL/2+ at 512; `dmf` has the
guidance and length of that run and of DMF at 256, and `meanflow` those of its paper: our choices.
"""

from ml_collections import ConfigDict

from configs.other_latents import flow_map_rows, flow_model
from configs.rows import Row, chosen
from dmf.models.encoders.autoencoder_dc import SANA_SCALE
from dmf.objectives import SelfGuidance

SIDE, CHANNELS = 16, 32

ROWS = {
    "flow": Row(),
    **flow_map_rows("runs/dc_ae_512_flow", SIDE * SIDE * CHANNELS,
                    dmf=SelfGuidance(kappa=0.6, interval=(0.0, 0.8)),
                    meanflow=SelfGuidance(omega=0.2, kappa=0.92, interval=(0.0, 0.75))),
}  # fmt: skip


def get_config(row: str = "dmf") -> ConfigDict:
    """The flow model, or a flow map that starts from it."""
    config = flow_model(SIDE, CHANNELS, resolution=512)
    config.latents.scale = SANA_SCALE
    config.run.steps = 2_000_000
    return chosen(config, ROWS, row)
