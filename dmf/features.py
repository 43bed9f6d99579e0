"""What images are compared by: features of frozen networks, or the pixels themselves.

Each kind of feature has one input, whatever the protocol: Inception's is `resize_for_inception`;
DINOv2's (FD-DINOv2, arXiv:2306.04675) is the image in [0, 1], brought to 224 x 224 by a bicubic
filter with antialiasing, minus the mean of ImageNet's pixels, over their deviation.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dmf.encoders.dinov2 import IMAGENET_MEAN, IMAGENET_STD, DinoV2
from dmf.encoders.inception import Inception
from dmf.encoders.resizing import resize_for_inception
from dmf.typing import InputError, Params

# The network that a kind of feature comes from, none for pixels.
NETWORK = {"pool3": "inception", "spatial": "inception", "probabilities": "inception",
           "dinov2": "dinov2", "pixels": None}  # fmt: skip
# What a network is shown, in a result's words.
INPUT = {
    "inception": "299 x 299, bilinear at i * side / 299, (x - 128) / 128",
    "dinov2": "224 x 224, bicubic with antialiasing, x / 255, ImageNet's mean and deviation",
}
DINOV2_SIDE = 224

Pixels = UInt8[Array, "n h w c"]
Features = dict[str, Float[Array, "n _"]]


class Extractor(NamedTuple):
    """Features of images.

    Attributes:
      kinds: of the features.
      apply: (params, uint8 images [n, h, w, c]) -> features [n, d] in float32, by kind.
      params: of the networks, by their names.
    """

    kinds: tuple[str, ...]
    apply: Callable[[Mapping[str, Params], Pixels], Features]
    params: Mapping[str, Params]


def extractor(
    kinds: Collection[str],
    *,
    inception: tuple[Inception, Params] | None = None,
    dinov2: tuple[DinoV2, Params] | None = None,
) -> Extractor:
    """An extractor of some kinds of features.

    Args:
      kinds: keys of `NETWORK`.
      inception, dinov2: the networks that they need, with their parameters.

    Raises:
      InputError: a network is missing.
    """
    networks = {"inception": inception, "dinov2": dinov2}
    needed = {NETWORK[kind] for kind in kinds} - {None}
    for name in sorted(needed):
        if networks[name] is None:
            raise InputError(f"evaluation.{name}: the features {', '.join(sorted(kinds))} need "
                             f"this network; give --{name}=DIR, which dmf convert makes, or other "
                             "--metrics")

    def apply(params: Mapping[str, Params], images: Pixels) -> Features:
        found: Features = {"pixels": images.reshape(len(images), -1) / jnp.float32(127.5) - 1}
        coloured = images if images.shape[-1] == 3 else jnp.repeat(images, 3, axis=-1)
        if "inception" in needed:
            seen = inception[0].apply(params["inception"], resize_for_inception(coloured))
            found |= {"pool3": seen.pool3, "spatial": seen.spatial}
            found["probabilities"] = jax.nn.softmax(seen.unbiased_logits)
        if "dinov2" in needed:
            tokens = dinov2[0].apply(params["dinov2"], dinov2_input(coloured))
            found["dinov2"] = tokens[:, 0]
        return {kind: found[kind] for kind in kinds}

    return Extractor(tuple(sorted(kinds)), apply, {name: networks[name][1] for name in needed})


def dinov2_input(images: UInt8[Array, "n h w 3"]) -> Float[Array, "n 224 224 3"]:
    """What FD-DINOv2 shows to DINOv2."""
    shape = (len(images), DINOV2_SIDE, DINOV2_SIDE, 3)
    # Its default antialiases; the kernel's slope is -0.5, like that of PyTorch with antialiasing.
    resized = jax.image.resize(images.astype(jnp.float32) / 255, shape, "cubic")
    mean, std = (jnp.array(x, jnp.float32)[None, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (resized - mean) / std
