"""Patch features of a frozen DINOv2, which tokens are aligned with (REPA, arXiv:2410.06940).

Images are resized so that the encoder cuts them into as many patches as the network has tokens: to
224 for the 16 x 16 tokens of 256 x 256, to 448 for those of 512 x 512. As published, resizing is
plain bicubic (a = -0.75, no antialiasing), pixels are normalised by ImageNet's mean and standard
deviation, and the features are the tokens after the last norm without the class token.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, UInt8

from dmf.errors import InputError
from dmf.models.encoders.dinov2 import IMAGENET_MEAN, IMAGENET_STD, DinoV2, resize_bicubic
from dmf.runtime.sharding import constrain_batch
from dmf.types import Batch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchFeatures:
    """Patch features of images.

    Attributes:
      encoder: the encoder of the features.
      side: number of patches along each side of an image, >= 1.
    """

    encoder: DinoV2
    side: int

    def __post_init__(self):
        if self.side < 1:
            raise InputError("features_side", self.side, "give a whole number >= 1")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (n, d) of the features of an image."""
        return self.side**2, self.encoder.width

    def __call__(self, params: Params, images: UInt8[Array, "b h w c"]) -> Float[Array, "b n d"]:
        """The features of images.

        Args:
          params: parameters of the encoder.
          images: [b, h, w, c] of any height and width; one channel is repeated to three.

        Returns:
          [b, n, d] float32, row by row of patches, sharded over the mesh as the batch is.
        """
        images = constrain_batch(images)
        rgb = images if images.shape[-1] == 3 else jnp.repeat(images, 3, axis=-1)
        mean, std = (jnp.asarray(x, jnp.float32)[None, None, None]
                     for x in (IMAGENET_MEAN, IMAGENET_STD))
        # The published code normalises before it resizes, with the same result: the weights of each
        # resized pixel sum to 1.
        resized = resize_bicubic(rgb.astype(jnp.float32) / 255,
                                 self.side * self.encoder.patch_size)
        return constrain_batch(self.encoder.apply(params, (resized - mean) / std)[:, 1:])

    def replace_images(self, params: Params, batch: Batch) -> Batch:
        """The batch with features in place of images; no gradient flows through the features."""
        features = jax.lax.stop_gradient(self(params, batch.images))
        return batch._replace(features=features, images=None)


def stored_features(
    features: PatchFeatures, *, mirror: bool
) -> Callable[[Params, UInt8[Array, "b h w c"]], Float16[Array, "b f n d"]]:
    """The function from images to the features that a dataset stores.

    Args:
      features: the features.
      mirror: whether to store the features of the mirror image too.

    Returns:
      (params, images [b, h, w, 3]) -> [b, f, n, d] float16, where f is 2 with `mirror` and 1
      without.
    """

    def stored(params: Params, images: UInt8[Array, "b h w c"]) -> Float16[Array, "b f n d"]:
        views = [images, images[:, :, ::-1]] if mirror else [images]
        return jnp.stack([features(params, view) for view in views], axis=1).astype(jnp.float16)

    return stored


def check_stored_features(
    shape: tuple[int, ...], tokens: int, width: int, *, mirror: bool, name: str
) -> None:
    """Checks that the features stored in a dataset fit a network.

    Args:
      shape: shape (f, n, d) of the features of one image.
      tokens: number of tokens of the network.
      width: width that the tokens are projected to.
      mirror: whether training mirrors images.
      name: dataset name.

    Raises:
      InputError: another number of patches or width, or no features of mirror images.
    """
    views, patches, feature_width = shape
    if patches != tokens:
        raise InputError(
            "data.name", name,
            f"its features have {patches} patches an image, and config.model has {tokens} tokens; "
            f"prepare it with --features-side={round(tokens ** 0.5)}, or set alignment.encoder",
        )
    check_feature_width(feature_width, width, f"data.name={name}")
    if mirror and views != 2:
        raise InputError(
            "data.mirror", "True",
            "the dataset has no features of mirror images; prepare it with them, or set "
            "data.mirror to False",
        )


def check_feature_width(width: int, projected: int, source: str) -> None:
    """Checks that features are as wide as the tokens that are aligned with them.

    Args:
      width: width of the features.
      projected: width that the tokens are projected to.
      source: the field that the features come from, for the error.

    Raises:
      InputError: the widths differ.
    """
    if width != projected:
        raise InputError(
            "model.alignment_width", projected,
            f"the features of {source} have width {width}; set it to that",
        )
