"""How similar two images of 8 bits are: PSNR and SSIM, one number for each pair."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

# The largest level; the window of SSIM, a Gaussian with this deviation in pixels; its constants.
LARGEST, WINDOW, DEVIATION, K1, K2 = 255, 11, 1.5, 0.01, 0.03

Pixels = UInt8[Array, "n h w c"]


def psnr(a: Pixels, b: Pixels) -> Float[Array, "n"]:
    """The peak signal-to-noise ratio of pairs of images, in dB: 10 log10(255^2 / MSE).

    The mean squared error is over pixels and channels. Equal images, for which it would be
    infinite, count as if one value differed by one level.

    >>> a = jnp.zeros((1, 2, 2, 1), jnp.uint8)
    >>> [round(float(psnr(a, a + difference)[0]), 3) for difference in (255, 1, 0)]
    [0.0, 48.131, 54.151]

    Args:
      a, b: uint8 [n, h, w, c].

    Returns:
      float32 [n].
    """
    differences = a.astype(jnp.float32) - b.astype(jnp.float32)
    error = jnp.mean(differences**2, axis=(1, 2, 3))
    least = 1 / np.prod(a.shape[1:], dtype=np.float32)
    return 10 * jnp.log10(LARGEST**2 / jnp.maximum(error, least))


def ssim(a: Pixels, b: Pixels) -> Float[Array, "n"]:
    """The structural similarity of pairs of images (Wang et al. 2004, IEEE TIP 13 (4), eq. 13).

    The data range is 255, the window a Gaussian of 11 x 11 pixels with a standard deviation of 1.5,
    K1 = 0.01, K2 = 0.03, and variances are those of the window, without Bessel's correction. The
    mean is over channels and over all places of the window inside of the image.

    >>> a = jnp.arange(12 * 12, dtype=jnp.uint8).reshape(1, 12, 12, 1)
    >>> round(float(ssim(a, a)[0]), 4), bool(ssim(a, 255 - a)[0] < 0)
    (1.0, True)

    Args:
      a, b: uint8 [n, h, w, c]; h and w at least 11.

    Returns:
      float32 [n] in [-1, 1].
    """
    # Around the middle level, so that variances, differences of two sums, keep their digits.
    x, y = (image.astype(jnp.float32) / LARGEST - 0.5 for image in (a, b))
    moments = jnp.concatenate([x, y, x * x, y * y, x * y], axis=-1)
    mean_x, mean_y, xx, yy, xy = jnp.split(_window_means(moments), 5, axis=-1)
    covariance = xy - mean_x * mean_y
    variances = xx - mean_x**2 + yy - mean_y**2
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    means = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    return jnp.mean(means * (2 * covariance + K2**2) / (variances + K2**2), axis=(1, 2, 3))


def _window_means(x: Float[Array, "n h w c"]) -> Float[Array, "n y x c"]:
    """The weighted means of all windows inside of an image; sums of float32 on every device."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * DEVIATION**2))
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        places = x.shape[axis] - WINDOW + 1
        x = sum(weight * jax.lax.slice_in_dim(x, i, i + places, axis=axis)
                for i, weight in enumerate(weights))
    return x
