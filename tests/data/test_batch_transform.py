"""Stored samples become samples of the network: pixels, draws of latents, and mirror images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmf.data.batch_transform import BatchTransform, sample_shape
from dmf.data.pixels import from_uint8
from dmf.errors import InputError
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.training import build

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3)), jnp.uint8)


def moments(mean: float, std: float, count: int = 64, views: int = 2) -> jax.Array:
    """Moments whose mean is negative for the mirror image."""
    sign = jnp.asarray([1.0, -1.0])[None, :views, None, None, None]
    means = mean * sign * jnp.ones((count, views, 4, 4, 2))
    return jnp.concatenate([means, jnp.full_like(means, std)], axis=-1).astype(jnp.float16)


def test_pixels_go_from_minus_one_to_one():
    x = BatchTransform(scaling=LatentScaling()).samples(KEY, IMAGES)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, np.asarray(IMAGES, np.float32) / 127.5 - 1, atol=1e-6)
    assert from_uint8(jnp.array([[[[0]], [[255]]]], jnp.uint8)).ravel().tolist() == [-1, 1]


def test_half_of_the_images_are_mirrored():
    x = BatchTransform(scaling=LatentScaling(), mirror=True).samples(KEY, IMAGES)
    upright = np.asarray(BatchTransform(scaling=LatentScaling()).samples(KEY, IMAGES))
    same = [np.array_equal(a, b) for a, b in zip(x, upright, strict=True)]
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(x, upright, strict=True)]
    assert all(np.logical_xor(same, mirrored))
    assert 20 < sum(mirrored) < 44


def test_latents_are_drawn_from_their_moments():
    rows = moments(0.5, 2.0, count=4000)
    x = BatchTransform(scaling=LatentScaling(scale=0.25, shift=1.0)).samples(KEY, rows)
    assert x.shape == (4000, 4, 4, 2)
    np.testing.assert_allclose(x.mean(), (0.5 - 1) * 0.25, atol=0.01)
    np.testing.assert_allclose(x.std(), 2 * 0.25, rtol=0.01)
    other = BatchTransform(scaling=LatentScaling()).samples(jax.random.key(1), rows)
    assert not np.array_equal(x, other)


def test_the_moments_of_the_mirror_image_are_taken_as_they_are():
    x = BatchTransform(scaling=LatentScaling(), mirror=True).samples(KEY, moments(3.0, 0.0))
    values = np.asarray(x).reshape(64, -1)
    assert set(np.unique(values)) == {-3.0, 3.0}
    assert np.array_equal(values.min(1), values.max(1))
    assert 20 < (values[:, 0] < 0).sum() < 44


def test_scaling_by_channel_and_back():
    scaling = LatentScaling(mean=(1.0, -2.0), std=(0.5, 4.0))
    z = jax.random.normal(KEY, (3, 4, 4, 2)) * jnp.asarray(scaling.std)[None, None, None]
    x = scaling.apply(z)
    np.testing.assert_allclose(x[..., 1], (z[..., 1] + 2) / 4, atol=1e-6)
    np.testing.assert_allclose(scaling.invert(x), z, atol=1e-5)
    plain = LatentScaling(scale=0.18215, shift=0.1)
    np.testing.assert_allclose(plain.invert(plain.apply(z)), z, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"scale": 0.0}, "scale=0.0"),
        ({"mean": (1.0,)}, "std=\\(\\)"),
        ({"mean": (1.0,), "std": (0.0,)}, "std=\\(0.0,\\)"),
        ({"mean": (1.0,), "std": (1.0,), "scale": 0.5}, "scale=0.5"),
    ],
)
def test_a_scaling_that_cannot_be(fields, named):
    with pytest.raises(InputError, match=named):
        LatentScaling(**fields)


def test_a_scaling_of_other_channels():
    with pytest.raises(InputError, match="mean=.*2 channels"):
        LatentScaling(mean=(1.0,), std=(1.0,)).apply(jnp.zeros((1, 4, 4, 2)))


def test_mirrors_that_are_not_there():
    BatchTransform(scaling=LatentScaling(), mirror=True).check((2, 4, 4, 8))
    BatchTransform(scaling=LatentScaling(), mirror=True).check((4, 4, 3))
    BatchTransform(scaling=LatentScaling()).check((1, 4, 4, 8))
    with pytest.raises(InputError, match="mirror=True: the dataset has no moments"):
        BatchTransform(scaling=LatentScaling(), mirror=True).check((1, 4, 4, 8))


def test_shapes_of_samples():
    assert sample_shape((8, 8, 1)) == (8, 8, 1)
    assert sample_shape((2, 32, 32, 8)) == (32, 32, 4)


def test_the_config_chooses():
    config = tiny.config({"data.mirror": True, "latents.scale": 0.5, "latents.shift": 2.0})
    chosen = build.batch_transform(config)
    assert chosen == BatchTransform(scaling=LatentScaling(scale=0.5, shift=2.0), mirror=True)
