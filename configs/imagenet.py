"""The common part of ImageNet recipes: latents of side 32 or 64, batch 256, Adam 1e-4, bfloat16.

`--config.data.directory=DIR` names the dataset that `dmf prepare` wrote, and
`--config.latents.autoencoder=DIR` the autoencoder that decodes samples to images.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import default
from dmf.models.dit import SIZES, repa_depth
from dmf.models.encoders.autoencoder_kl import STABLE_DIFFUSION_SCALE
from dmf.objectives import FlowMatching

STEPS_PER_EPOCH = 5005  # 1,281,167 images, 256 at a time


def sized(size: str, patch_size: int = 2) -> dict[str, Any]:
    """The fields of a transformer of a size, S to XL, for the `changes` of a row."""
    fields = {**SIZES[size], "patch_size": patch_size}
    return {f"model.{name}": value for name, value in fields.items()}


def imagenet(size: str, patch_size: int = 2, resolution: int = 256) -> ConfigDict:
    """The config that every ImageNet recipe starts from.

    Args:
      size: size of the transformer: S, B, M, L or XL.
      patch_size: height and width of a patch of latents.
      resolution: height and width of the images; those of the latents are an eighth.
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
    config.evaluation.update(protocol="edm2", count=50_000)
    return config


def aligned(size: str, *, resolution: int) -> ConfigDict:
    """The config of the published flow models with representation alignment: patch 2, and alignment
    0.5 after block 8 (of B 4) with DINOv2-B in half precision.

    Args:
      size: size of the transformer: S, B, M, L or XL.
      resolution: height and width of the images.
    """
    config = imagenet(size, resolution=resolution)
    depth = repa_depth(config.model.depth)
    config.model.update(alignment_depth=depth, alignment_width=768, alignment_hidden=2048)
    config.objective = default.component(FlowMatching(alignment_coefficient=0.5))
    config.alignment.update(encoder="runs/dinov2_b", dtype="bfloat16")
    config.sampling.sampler = ConfigDict({"name": "sde"})
    config.sampling.steps = (250,)
    return config
