"""Features that images are compared by: outputs of frozen networks, or the pixels themselves.

Each network has one input, whatever the protocol. Inception's is `resize_for_inception`. DINOv2's
(FD-DINOv2, arXiv:2306.04675) is the image in [0, 1], resized to 224 x 224 by a bicubic filter with
antialiasing, minus the mean of ImageNet's pixels, divided by their standard deviation.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dmf.errors import InputError
from dmf.models.encoders.dinov2 import IMAGENET_MEAN, IMAGENET_STD, DinoV2
from dmf.models.encoders.inception import Inception, resize_for_inception
from dmf.runtime.memoize import memoized
from dmf.types import Params

# The network that computes a kind of features; None for pixels.
NETWORK = {"pool3": "inception", "spatial": "inception", "probabilities": "inception",
           "dinov2": "dinov2", "pixels": None}  # fmt: skip
# The input of a network, as results describe it.
INPUT = {
    "inception": "299 x 299, bilinear at i * side / 299, (x - 128) / 128",
    "dinov2": "224 x 224, bicubic with antialiasing, x / 255, ImageNet's mean and deviation",
}
DINOV2_SIDE = 224

Pixels = UInt8[Array, "n h w c"]
Features = dict[str, Float[Array, "n _"]]


class Extractor(NamedTuple):
    """A function that computes features of images.

    Attributes:
      kinds: kinds of the features, sorted.
      apply: function (params, uint8 images [n, h, w, c]) -> float32 features [n, d] by kind.
      params: parameters of the networks, by name of the network.
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
      kinds: kinds of features, keys of `NETWORK`.
      inception, dinov2: networks and their parameters; None where no kind needs the network.

    Raises:
      InputError: an unknown kind, or a missing network.
    """
    networks = {"inception": inception, "dinov2": dinov2}
    needed = _needed_networks(kinds)
    for name in sorted(needed):
        if networks[name] is None:
            raise InputError(
                f"evaluation.{name}",
                remedy=f"the features {', '.join(sorted(kinds))} need this network; give "
                       f"--{name}=DIR, which dmf convert makes, or other --metrics",
            )

    chosen = {name: networks[name][0] for name in needed}
    kinds = tuple(sorted(kinds))
    apply = _features_function(kinds, chosen.get("inception"), chosen.get("dinov2"))
    return Extractor(kinds, apply, {name: networks[name][1] for name in needed})


@memoized
def _features_function(
    kinds: tuple[str, ...], inception: Inception | None, dinov2: DinoV2 | None
) -> Callable[[Mapping[str, Params], Pixels], Features]:
    """`Extractor.apply`, the same function for the same networks."""

    def apply(params: Mapping[str, Params], images: Pixels) -> Features:
        features: Features = {"pixels": images.reshape(len(images), -1) / jnp.float32(127.5) - 1}
        rgb = images if images.shape[-1] == 3 else jnp.repeat(images, 3, axis=-1)
        if inception is not None:
            outputs = inception.apply(params["inception"], resize_for_inception(rgb))
            features |= {"pool3": outputs.pool3, "spatial": outputs.spatial}
            features["probabilities"] = jax.nn.softmax(outputs.unbiased_logits)
        if dinov2 is not None:
            tokens = dinov2.apply(params["dinov2"], dinov2_input(rgb))
            features["dinov2"] = tokens[:, 0]
        return {kind: features[kind] for kind in kinds}

    return apply


def _needed_networks(kinds: Collection[str]) -> set[str]:
    for kind in kinds:
        if kind not in NETWORK:
            raise InputError("features", kind, f"choose one of {', '.join(NETWORK)}")
    return {NETWORK[kind] for kind in kinds} - {None}


def dinov2_input(images: UInt8[Array, "n h w 3"]) -> Float[Array, "n 224 224 3"]:
    """The input of DINOv2 in FD-DINOv2, float32 [n, 224, 224, 3]."""
    shape = (len(images), DINOV2_SIDE, DINOV2_SIDE, 3)
    # resize antialiases by default; the kernel has the parameter a = -0.5, like PyTorch's.
    resized = jax.image.resize(images.astype(jnp.float32) / 255, shape, "cubic")
    mean, std = (jnp.array(x, jnp.float32)[None, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (resized - mean) / std
