"""Stand-ins for Inception and DINOv2 that compute few features of small images, fast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.checkpoints import load as loading
from dmf.models.encoders.dinov2 import DINOV2_SIZES, DinoV2
from dmf.models.encoders.inception import Inception, InceptionFeatures


def seven_features(params, images) -> jax.Array:
    """Seven values of each image."""
    small = jax.image.resize(images, (len(images), 3, 3, 3), "linear")
    return jnp.tanh(small.reshape(len(images), -1) @ params["weights"])


class TinyInception(Inception):
    """Few features of small images."""

    def apply(self, params, images):
        values = seven_features(params, images)
        logits = values[:, :5] * 2
        return InceptionFeatures(values[:, :6], values[:, 2:6], logits + 1, logits)


class TinyDino(DinoV2):
    """Two tokens an image."""

    def apply(self, params, images):
        return jnp.stack([seven_features(params, images), -seven_features(params, images)], axis=1)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every directory hold a tiny network."""
    networks = {"inception": TinyInception(), "dinov2": TinyDino(**DINOV2_SIZES["S"])}

    def load(directory, name):
        weights = np.random.default_rng(len(name)).normal(size=(27, 7)).astype("f")
        return networks[name], {"weights": weights}

    monkeypatch.setattr(loading, "load_encoder", load)
