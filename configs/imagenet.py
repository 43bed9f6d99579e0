"""What the ImageNet recipes share: latents of a 32 or 64 side, batch 256, Adam 1e-4, bfloat16.

`--config.data.directory=DIR` names the dataset that `dmf prepare` wrote, and
`--config.latents.autoencoder=DIR` the decoder that pictures are made with.
"""

from ml_collections import ConfigDict

from configs import default
from dmf.models.dit import SIZES
from dmf.scaling import STABLE_DIFFUSION_SCALE

STEPS_PER_EPOCH = 5005  # 1,281,167 images, 256 at a time


def imagenet(size: str, patch_size: int = 2, resolution: int = 256) -> ConfigDict:
    """The fields that every ImageNet recipe starts from.

    Args:
      size: of the transformer: S, B, M, L or XL.
      patch_size: of its patches, on the latent grid.
      resolution: of the images; the latents have an eighth of it.
    """
    config = default.get_config()
    config.model.update(SIZES[size])
    config.model.update(
        input_size=resolution // 8, channels=4, patch_size=patch_size, num_classes=1000
    )
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.data.update(name=f"imagenet_latents_{resolution}", batch_size=256)
    config.latents.scale = STABLE_DIFFUSION_SCALE
    config.optimizer.learning_rate = 1e-4
    config.emas.main.decay = 0.9999
    config.run.update(
        log_every=100, sample_every=10_000, checkpoint_every=10_000, keep_last=2, keep_every=50_000
    )
    config.evaluation.update(protocol="edm2", metrics=("fid",), count=50_000)
    return config
