"""An autoencoder of your own: the principal components of patches of 2 x 2 pixels.

    python examples/own_autoencoder.py runs/patches
    dmf prepare --source=IMAGES --output=data/latents --resolution=64 \\
      --autoencoder=runs/patches --plugins=examples/own_autoencoder.py

The first command fits the components to the digits and writes the directory that
`latents.autoencoder` and `--autoencoder` name; the second one makes a dataset of latents.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dmf.checkpoints.export import write_frozen
from dmf.data.datasets import open_dataset
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.registry import register


# An autoencoder has the attributes and methods of `dmf.models.encoders.autoencoder.Autoencoder`.
@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchComponents:
    """The first principal components of patches of 2 x 2 pixels, as the channels of latents.

    Attributes:
      channels: channels of the images, 1 or 3.
      latent_channels: number of components, from 1 to 4 channels.
    """

    channels: int = 3
    latent_channels: int = 4
    factor = 2
    default_scaling = LatentScaling(scale=0.5)

    def init(self, key):
        return {"basis": jax.random.normal(key, (4 * self.channels, self.latent_channels))}

    def encode(self, params, images):
        b, h, w, c = images.shape
        patches = images.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        return patches.reshape(b, h // 2, w // 2, 4 * c) @ params["basis"]

    def decode(self, params, latents):
        b, h, w, _ = latents.shape
        patches = (latents @ params["basis"].T).reshape(b, h, w, 2, 2, self.channels)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, self.channels)


register("autoencoder", patch_components=PatchComponents)


def write_autoencoder(directory: str) -> None:
    """Fits the components to the digits and writes the autoencoder."""
    autoencoder = PatchComponents()
    digits = open_dataset("digits", split="train", directory="")
    images = np.repeat(digits.read(range(500))["x"] / 127.5 - 1, 3, axis=-1)
    patches = autoencoder.encode({"basis": jnp.eye(12)}, jnp.asarray(images, jnp.float32))
    _, _, components = np.linalg.svd(np.asarray(patches).reshape(-1, 12), full_matrices=False)
    basis = components[: autoencoder.latent_channels].T
    write_frozen(directory, autoencoder, {"basis": basis}, origin="fitted to the digits")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=write_autoencoder.__doc__)
    parser.add_argument("directory", help="the directory to make")
    write_autoencoder(**vars(parser.parse_args()))
