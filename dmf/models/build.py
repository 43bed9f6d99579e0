"""Builds the network of `config.model` and the settings of `config.latents`."""

import dataclasses
from typing import Any

from dmf.errors import InputError
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.registry import at, build
from dmf.types import Network

# The value of a size of `config.model` that is that of the dataset, and the sizes that may be so.
OF_DATASET = -1
SIZES_OF_DATASET = ("input_size", "channels", "num_classes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latents:
    """The latents between the samples x of the network and images: x = (latent - shift) * scale, or
    x = (latent - mean) / std by channel. Without an autoencoder the samples are images in [-1, 1].

    Attributes:
      autoencoder: directory of the autoencoder, an export of `dmf convert`; empty for none.
      scale: factor of the latents, > 0; 0.18215 for the latents of Stable Diffusion. Leave it at 1
        with `mean` and `std`.
      shift: offset that is subtracted from the latents before scaling; leave it at 0 with `mean`
        and `std`.
      mean: mean of each latent channel, as many values as channels; empty to use scale and shift.
      std: standard deviation of each latent channel, > 0, as many values as `mean`; empty to use
        scale and shift.
    """

    autoencoder: str = ""
    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def scaling(self) -> LatentScaling:
        """The scaling between latents and samples."""
        return LatentScaling(scale=self.scale, shift=self.shift, mean=self.mean, std=self.std)

    def __post_init__(self):
        LatentScaling(scale=self.scale, shift=self.shift, mean=self.mean, std=self.std)


def sizes_of_dataset(section: Any) -> tuple[str, ...]:
    """The sizes of `config.model` that are still to be taken from the dataset.

    >>> sizes_of_dataset({"input_size": -1, "channels": 3, "num_classes": -1})
    ('input_size', 'num_classes')
    """
    get = getattr(section, "get", {}.get)  # A section may be a name alone.
    return tuple(name for name in SIZES_OF_DATASET if get(name) == OF_DATASET)


def network(section: Any) -> Network:
    """The network of `config.model`.

    Args:
      section: `config.model`.

    Raises:
      InputError: a field that cannot be used; the message names it.
    """
    for name in sizes_of_dataset(section):
        raise InputError(f"model.{name}", OF_DATASET, "the size of the dataset is looked up by the "
                         "commands and by dmf.config; give a number here")
    with at("model"):
        return build("model", section)


def latents(section: Any) -> Latents:
    """The settings of `config.latents`.

    Args:
      section: `config.latents`.

    Raises:
      InputError: a field that cannot be used; the message names it.
    """
    with at("latents"):
        return build(Latents, section)
