"""The autoencoder of the grids of samples while training, which may be another than the run's own.

Autoencoders of the same latents agree on them after the published scaling of each: TAESD decodes
the scaled latents of Stable Diffusion, and its own scaling is none.
"""

import dataclasses

from ml_collections import ConfigDict

from dmf.checkpoints.load import build_latent_space, load_autoencoder, load_latent_space
from dmf.data.build import data
from dmf.data.latent_origin import stated_origins
from dmf.errors import InputError
from dmf.models.build import latents, network
from dmf.models.encoders.autoencoder import Autoencoder
from dmf.models.encoders.latent_scaling import LatentScaling, scaling_of_other
from dmf.models.encoders.latent_space import LatentSpace
from dmf.runtime.processes import log
from dmf.types import Params


def load_preview_space(
    config: ConfigDict, directory: str
) -> tuple[LatentSpace, Params] | None:
    """Loads the autoencoder that decodes grids of samples while training.

    Args:
      config: the config of the run.
      directory: `run.preview_autoencoder`; empty for the autoencoder of `config.latents`.

    Returns:
      The latent space that decodes the samples, and the parameters of its autoencoder; None where
      samples are images.

    Raises:
      InputError: an autoencoder cannot be loaded, or its latents have another number of channels or
        another factor than those of the run.
    """
    if not directory:
        return load_latent_space(config)
    published, factor = _published_latents(config)
    try:
        preview, params = load_autoencoder(directory)
        return preview_space(config, preview, published, factor), params
    except InputError as error:
        raise InputError("run.preview_autoencoder", directory, str(error)) from None


def preview_space(
    config: ConfigDict, preview: Autoencoder, published: LatentScaling, factor: int | None
) -> LatentSpace:
    """The latent space of the samples of a run with another autoencoder of the same latents.

    Args:
      config: the config of the run.
      preview: the other autoencoder.
      published: the published scaling of the latents of the run.
      factor: the ratio of an image's height and width to those of the latents; None if unknown.

    Raises:
      InputError: the other autoencoder has another number of channels or another factor.
    """
    channels = network(config.model).sample_shape[-1]
    if preview.latent_channels != channels:
        raise InputError("", remedy=f"its latents have {preview.latent_channels} channels, and "
                         f"config.model has {channels}; give an autoencoder of the same latents")
    if factor not in (None, preview.factor):
        raise InputError("", remedy=f"its factor is {preview.factor}, and that of the latents of "
                         f"the run {factor}; give an autoencoder of the same latents")
    scaling = scaling_of_other(
        latents(config.latents).scaling, published, preview.default_scaling, channels=channels
    )
    return dataclasses.replace(build_latent_space(config, preview), scaling=scaling)


def _published_latents(config: ConfigDict) -> tuple[LatentScaling, int | None]:
    """The published scaling and the factor of the latents of a run: those of its autoencoder, or of
    the one that its dataset states."""
    space = load_latent_space(config) if config.latents.autoencoder else None
    if space is not None:
        autoencoder = space[0].autoencoder
        return autoencoder.default_scaling, autoencoder.factor
    for origin in stated_origins(data(config.data).directories).values():
        return origin.scaling, origin.factor
    log("run.preview_autoencoder: neither latents.autoencoder nor the dataset tells the published "
        "scaling of the latents; that of config.latents is taken for it")
    return latents(config.latents).scaling, None
