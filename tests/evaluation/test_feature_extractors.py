"""Features of images: pixels, and what the networks are shown and read of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dmf.errors import InputError
from dmf.evaluation.feature_extractors import NETWORK, dinov2_input, extractor
from dmf.models.encoders.dinov2 import DinoV2
from dmf.models.encoders.inception import Inception, InceptionFeatures, resize_for_inception
from dmf.types import Params

RANDOM = np.random.default_rng(0)
BIAS = jnp.array([[4.0, -1.0, 0.5]])
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Averages(Inception):
    """Reads the averages of what it is shown, times a parameter."""

    def apply(self, params: Params, images: jax.Array) -> InceptionFeatures:
        averages = images.mean((1, 2)) * params["scale"]
        corner = images[:, :2, 1].reshape(len(images), -1)
        return InceptionFeatures(averages, corner, averages + BIAS, averages)


@dataclasses.dataclass(frozen=True)
class Tokens(DinoV2):
    """Gives the averages as class token, and two more tokens that are of no account."""

    def apply(self, params: Params, images: jax.Array) -> jax.Array:
        averages = images.mean((1, 2)) + params["shift"]
        return jnp.stack([averages, averages * 0 - 1, averages * 2], axis=1)


INCEPTION = (Averages(), {"scale": jnp.float32(2)})
DINOV2 = (Tokens(width=3, depth=1, heads=1), {"shift": jnp.float32(0.25)})


def drawn(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape).astype(np.uint8)


def features(images: np.ndarray, *kinds: str) -> dict[str, np.ndarray]:
    """Features by the small networks."""
    result = extractor(kinds, inception=INCEPTION, dinov2=DINOV2)
    return jax.device_get(result.apply(result.params, jnp.asarray(images)))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_values_themselves(channels):
    images = np.arange(256 * channels, dtype=np.uint8).reshape(2, 16, 8, channels)
    result = features(images, "pixels")
    assert list(result) == ["pixels"]
    assert result["pixels"].dtype == np.float32
    expected = images.reshape(2, -1).astype(float) / 127.5 - 1
    np.testing.assert_allclose(result["pixels"], expected, atol=1e-7)
    assert (expected.min(), expected.max()) == (-1, 1)


def test_pixels_need_no_network():
    result = extractor(["pixels"])
    assert result.params == {}
    black = jnp.zeros((2, 4, 4, 3), jnp.uint8)
    assert result.apply({}, black)["pixels"].tolist() == [[-1.0] * 48] * 2


@pytest.mark.parametrize("kind", [kind for kind, network in NETWORK.items() if network])
def test_grey_is_shown_to_networks_in_three_channels(kind):
    grey = drawn(3, 9, 7, 1)
    np.testing.assert_array_equal(
        features(grey, kind)[kind], features(grey.repeat(3, axis=3), kind)[kind]
    )
    assert features(grey, "pixels", kind)["pixels"].shape == (3, 63)


def test_probabilities_know_no_bias():
    images = drawn(4, 6, 6, 3)
    shown = np.asarray(resize_for_inception(jnp.asarray(images)), float)
    powers = np.exp(2 * shown.mean((1, 2)))
    result = features(images, "probabilities")["probabilities"]
    np.testing.assert_allclose(result, powers / powers.sum(1, keepdims=True), rtol=1e-5)


def test_inception_is_shown_what_its_graph_takes():
    images = drawn(2, 12, 10, 3)
    shown = np.asarray(resize_for_inception(jnp.asarray(images)))
    result = features(images, "pool3", "spatial")
    assert list(result) == ["pool3", "spatial"]
    np.testing.assert_allclose(result["pool3"], 2 * shown.mean((1, 2)), atol=1e-5)
    np.testing.assert_array_equal(result["spatial"], shown[:, :2, 1].reshape(2, 6))


def test_of_dinov2_the_class_token_is_read():
    images = drawn(2, 20, 30, 3)
    expected = np.asarray(dinov2_input(jnp.asarray(images))).mean((1, 2)) + 0.25
    np.testing.assert_allclose(features(images, "dinov2")["dinov2"], expected, atol=1e-5)


def test_parameters_are_those_that_are_given():
    result = extractor(["pool3", "pixels"], inception=INCEPTION, dinov2=DINOV2)
    assert result.params.keys() == {"inception"}
    images = jnp.asarray(drawn(2, 6, 6, 3))
    once = result.apply(result.params, images)
    twice = result.apply({"inception": {"scale": jnp.float32(4)}}, images)
    np.testing.assert_allclose(twice["pool3"], 2 * once["pool3"], rtol=1e-6)
    np.testing.assert_array_equal(twice["pixels"], once["pixels"])


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in NETWORK.items() if n])
def test_a_missing_network_is_named(kind, name):
    others = {"inception": INCEPTION, "dinov2": DINOV2} | {name: None}
    with pytest.raises(InputError, match=f"^evaluation.{name}: .*{kind}.*--{name}=DIR") as error:
        extractor(["pixels", kind], **others)
    assert "\n" not in str(error.value)
    extractor(["pixels"], **others)


@pytest.mark.parametrize(
    ("height", "width"),
    [(224, 224), (256, 256), (512, 449), (225, 300), (32, 32), (8, 8), (223, 100), (100, 400)],
)
def test_images_are_resized_for_dinov2_as_pillow_does(height, width):
    images = drawn(2, height, width, 3)
    bands = [
        np.asarray(Image.fromarray(band).resize((224, 224), Image.Resampling.BICUBIC))
        for band in np.moveaxis(images, 3, 1).reshape(6, height, width).astype(np.float32) / 255
    ]
    expected = np.moveaxis(np.reshape(bands, (2, 3, 224, 224)), 1, 3)
    result = np.asarray(dinov2_input(jnp.asarray(images)))
    assert result.dtype == np.float32
    # Of noise at its worst; a hundredth of a level. JAX computes places in single precision.
    np.testing.assert_allclose(result * STD + MEAN, expected, rtol=0, atol=3e-5)
    assert np.abs(result * STD + MEAN - expected).mean() < 4e-6


def test_an_unknown_kind_of_features_is_refused():
    with pytest.raises(InputError, match="^features=pool4: choose one of pool3, spatial"):
        extractor(["pixels", "pool4"])
