"""Distances between what a network gives and what it is trained to give, one for each sample."""

import jax
import jax.numpy as jnp

from dmf.types import Features, Images, PerSample


def squared_error(prediction: Images, target: Images) -> PerSample:
    """[b] sum over h, w and c of the squared difference, in float32; in float64 of float64."""
    difference = prediction - target
    difference = difference.astype(jnp.promote_types(difference.dtype, jnp.float32))
    return jnp.sum(difference**2, axis=(1, 2, 3))


def mean_squared_error(prediction: Images, target: Images) -> PerSample:
    """[b] mean over h, w and c of the squared difference; otherwise as `squared_error`."""
    return squared_error(prediction, target) / values_per_sample(prediction)


def values_per_sample(x: Images) -> int:
    """Number of values h w c of one sample."""
    return x[0].size


def cosine_distance(tokens: Features, features: Features) -> PerSample:
    """[b] minus the mean cosine similarity of tokens and features (REPA, arXiv:2410.06940).

    Norms have a floor of 1e-12, as in the published code, so that the similarity of a zero is 0.
    """
    unit = [x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))
            for x in (tokens, features)]
    return -jnp.mean(jnp.sum(unit[0] * unit[1], axis=-1), axis=-1)
