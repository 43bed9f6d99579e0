"""In place of Inception and DINOv2: few features of small images, at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import loading
from dmf.encoders.dinov2 import DINOV2_SIZES, DinoV2
from dmf.encoders.inception import Inception, InceptionFeatures


def seen(params, images) -> jax.Array:
    """Seven values of each image."""
    small = jax.image.resize(images, (len(images), 3, 3, 3), "linear")
    return jnp.tanh(small.reshape(len(images), -1) @ params["weights"])


class TinyInception(Inception):
    """Few features of small images."""

    def apply(self, params, images):
        found = seen(params, images)
        logits = found[:, :5] * 2
        return InceptionFeatures(found[:, :6], found[:, 2:6], logits + 1, logits)


class TinyDino(DinoV2):
    """Two tokens an image."""

    def apply(self, params, images):
        return jnp.stack([seen(params, images), -seen(params, images)], axis=1)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever directory is asked for holds a tiny network."""
    made = {"inception": TinyInception(), "dinov2": TinyDino(**DINOV2_SIZES["S"])}

    def load(directory, name):
        weights = np.random.default_rng(len(name)).normal(size=(27, 7)).astype("f")
        return made[name], {"weights": weights}

    monkeypatch.setattr(loading, "load_encoder", load)
