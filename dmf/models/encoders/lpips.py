"""LPIPS (arXiv:1801.03924): how different two images look, by the features of a classifier.

Version 0.1 of the authors' release: the features after five ReLUs of VGG16 (arXiv:1409.1556) or
AlexNet (arXiv:1404.5997), each normalised over channels; their squared differences are weighted by
learned heads, averaged over pixels, and summed over the five.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.errors import check_choice
from dmf.types import Images, Params, PRNGKey

# Images in [-1, 1] become (image - SHIFT) / SCALE, by channel.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10

Maps = Float[Array, "b _ _ _"]


class Convolution(NamedTuple):
    """A convolution, followed by ReLU.

    Attributes:
      number: number of the layer in torchvision's network.
      features: output channels.
      size, stride, padding: in both directions.
    """

    number: int
    features: int
    size: int = 3
    stride: int = 1
    padding: int = 1


class Stage(NamedTuple):
    """The convolutions up to the next features.

    Attributes:
      convolutions: in order.
      pool: side of the maximum pool of stride 2 before them; 0 for none.
    """

    convolutions: tuple[Convolution, ...]
    pool: int = 0


def _vgg_stage(pool: int, features: int, *numbers: int) -> Stage:
    return Stage(tuple(Convolution(number, features) for number in numbers), pool)


TRUNKS = {
    "vgg16": (
        _vgg_stage(0, 64, 0, 2), _vgg_stage(2, 128, 5, 7), _vgg_stage(2, 256, 10, 12, 14),
        _vgg_stage(2, 512, 17, 19, 21), _vgg_stage(2, 512, 24, 26, 28),
    ),
    "alexnet": (
        Stage((Convolution(0, 64, size=11, stride=4, padding=2),)),
        Stage((Convolution(3, 192, size=5, padding=2),), pool=3),
        Stage((Convolution(6, 384),), pool=3),
        Stage((Convolution(8, 256),)),
        Stage((Convolution(10, 256),)),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LPIPS:
    """The distance between two images by the features of a classifier; 0 for equal ones.

    Attributes:
      trunk: the classifier, "vgg16" or "alexnet".
    """

    trunk: str = "vgg16"

    def __post_init__(self):
        check_choice(self, "trunk", TRUNKS)

    @property
    def smallest_side(self) -> int:
        """The least height and width of an image."""
        return {"vgg16": 16, "alexnet": 31}[self.trunk]

    def init(self, key: PRNGKey) -> Params:
        """Random parameters, float32; heads are not negative."""
        side = self.smallest_side
        return _Network(self).init(key, jnp.zeros((2, side, side, 3)))["params"]

    def apply(self, params: Params, a: Images, b: Images) -> Float[Array, "n"]:
        """The distances [n] between images, float32, >= 0 with published heads.

        Args:
          params: parameters, as `init` returns them.
          a, b: [n, h, w, 3] in [-1, 1]; h and w at least `smallest_side`.
        """
        return _Network(self).apply({"params": params}, jnp.concatenate([a, b]))


class _Network(nn.Module):
    """The distances of the first half of a batch from the second."""

    config: LPIPS

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "n"]:
        shift, scale = (jnp.array(x, jnp.float32)[None, None, None] for x in (SHIFT, SCALE))
        x, total = (images - shift) / scale, jnp.zeros(len(images) // 2)
        for i, stage in enumerate(TRUNKS[self.config.trunk]):
            if stage.pool:
                x = nn.max_pool(x, (stage.pool, stage.pool), strides=(2, 2))
            for c in stage.convolutions:
                x = nn.relu(nn.Conv(c.features, (c.size, c.size), strides=c.stride,
                                    padding=c.padding, name=f"convolution_{c.number}")(x))
            head = self.param(f"head_{i}", nn.initializers.uniform(1.0), x.shape[-1:])
            total += jnp.mean(_squared_differences(x) @ head[:, None], axis=(1, 2, 3))
        return total


def _squared_differences(x: Maps) -> Float[Array, "half _ _ _"]:
    """Of the normalised features of the two halves of a batch."""
    a, b = jnp.split(x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + _EPSILON), 2)
    return (a - b) ** 2
