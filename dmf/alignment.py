"""What tokens are aligned with: patch features of a frozen DINOv2 (REPA, arXiv:2410.06940).

An image is resized so that the encoder cuts it into as many patches as the network has tokens: to
224 for the 16 x 16 tokens of 256 x 256, to 448 for those of 512 x 512. As published: plain bicubic
(a = -0.75, no antialiasing), ImageNet's mean and deviation, tokens after the last norm without the
class token.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, UInt8

from dmf.encoders.dinov2 import IMAGENET_MEAN, IMAGENET_STD, DinoV2, resize_bicubic
from dmf.sharding import constrained
from dmf.typing import Batch, InputError, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchFeatures:
    """Patch features of images.

    Attributes:
      encoder: whose they are.
      side: patches along each side of an image.
    """

    encoder: DinoV2
    side: int

    def __post_init__(self):
        if self.side < 1:
            raise InputError(f"features_side={self.side}: give a whole number >= 1")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d) of the features of an image."""
        return self.side**2, self.encoder.width

    def __call__(self, params: Params, images: UInt8[Array, "b h w c"]) -> Float[Array, "b n d"]:
        """Features in float32, row by row of patches, split over the mesh as the batch is.

        Args:
          params: of the encoder.
          images: of any height and width; one channel stands for three that are equal.
        """
        images = constrained(images)
        coloured = images if images.shape[-1] == 3 else jnp.repeat(images, 3, axis=-1)
        mean, std = (jnp.asarray(x, jnp.float32)[None, None, None]
                     for x in (IMAGENET_MEAN, IMAGENET_STD))
        # The published code normalises first: the same, for the weights of a pixel sum to 1.
        resized = resize_bicubic(coloured.astype(jnp.float32) / 255,
                                 self.side * self.encoder.patch_size)
        return constrained(self.encoder.apply(params, (resized - mean) / std)[:, 1:])

    def of_batch(self, params: Params, batch: Batch) -> Batch:
        """The batch with features, which are constants to what is trained, in place of images."""
        features = jax.lax.stop_gradient(self(params, batch.images))
        return batch._replace(features=features, images=None)


def stored_features(
    features: PatchFeatures, *, mirror: bool
) -> Callable[[Params, UInt8[Array, "b h w c"]], Float16[Array, "b f n d"]]:
    """(params, images [b, h, w, 3]) -> features [b, f, n, d] in half precision, of each image and,
    with `mirror`, of its mirror image, as a dataset stores them."""

    def stored(params: Params, images: UInt8[Array, "b h w c"]) -> Float16[Array, "b f n d"]:
        views = [images, images[:, :, ::-1]] if mirror else [images]
        return jnp.stack([features(params, view) for view in views], axis=1).astype(jnp.float16)

    return stored


def check_stored(
    shape: tuple[int, ...], tokens: int, width: int, *, mirror: bool, name: str
) -> None:
    """Raises InputError where the features that a dataset stores do not fit a network.

    Args:
      shape: (f, n, d) of those of an image.
      tokens, width: how many tokens the network has, and the width that they are projected to.
      mirror: whether rows are mirrored.
      name: of the dataset.
    """
    sides, patches, wide = shape
    if patches != tokens:
        raise InputError(f"data.name={name}: its features have {patches} patches an image, and "
                         f"config.model has {tokens} tokens; prepare it with --features-side="
                         f"{round(tokens**0.5)}, or set alignment.encoder")
    check_width(wide, width, f"data.name={name}")
    if mirror and sides != 2:
        raise InputError("data.mirror=True: the dataset has no features of mirror images; prepare "
                         "it with them, or set data.mirror to False")


def check_width(width: int, projected: int, whose: str) -> None:
    """Raises InputError where features are not as wide as what is to align with them."""
    if width != projected:
        raise InputError(f"model.alignment_width={projected}: the features of {whose} have width "
                         f"{width}; set it to that")
