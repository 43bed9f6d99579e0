"""Patches, and the embeddings of positions and times."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.models.layers import patchify, position_table, sinusoidal_features, unpatchify


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_patch_embedding_is_a_strided_convolution(patch):
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    kernel = jax.random.normal(jax.random.key(1), (patch, patch, 3, 5))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (patch, patch), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    ours = patchify(x, patch) @ kernel.reshape(1, -1, 5)
    np.testing.assert_allclose(ours, expected.reshape(2, -1, 5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_unpatchify_inverts_patchify(patch):
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    np.testing.assert_array_equal(unpatchify(patchify(x, patch), patch), x)


def test_position_table_entry_by_entry():
    side, width = 3, 16
    table = position_table(side, width)
    for row in range(side):
        for column in range(side):
            for i in range(width // 4):
                angles = [place / 10000 ** (i / (width / 4)) for place in (column, row)]
                expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
                entry = table[row * side + column, i :: width // 4]
                np.testing.assert_allclose(entry, expected, atol=1e-6)


def test_sinusoidal_features_entry_by_entry():
    features = sinusoidal_features(jnp.asarray([0.0, 0.7]), 256)
    frequencies = [10000 ** (-i / 128) for i in range(128)]
    expected = [math.cos(0.7 * w) for w in frequencies] + [math.sin(0.7 * w) for w in frequencies]
    np.testing.assert_allclose(features[1], expected, atol=1e-6)
    np.testing.assert_array_equal(features[0], [1.0] * 128 + [0.0] * 128)
