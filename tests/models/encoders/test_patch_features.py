"""Patch features for representation alignment: their pixels, their mirroring, and the errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_exports

from dmf.data.batch_transform import BatchTransform
from dmf.errors import InputError
from dmf.models.encoders import patch_features
from dmf.models.encoders.dinov2 import DinoV2, resize_bicubic
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.encoders.patch_features import PatchFeatures
from dmf.runtime.sharding import batch_sharding, make_mesh
from dmf.training import build, compile
from dmf.training.abstract_inputs import abstract_inputs
from dmf.types import Batch

KEY = jax.random.key(3)
ALIGNED = {"objective.alignment_coefficient": 0.5, "model.alignment_depth": 1,
           "model.alignment_width": 12, "model.alignment_hidden": 16}  # fmt: skip
PARAMS = tiny_exports.params(tiny_exports.DINOV2)


def aligned_config(overrides=None):
    """The config of a run on digits that computes features."""
    encoder = str(tiny_exports.exported(tiny_exports.DINOV2))
    return tiny.config(ALIGNED | {"alignment.encoder": encoder} | (overrides or {}))


def plain(images: np.ndarray, side: int) -> jax.Array:
    """Patch features step by step: three channels, ImageNet's statistics, plain bicubic, no class
    token."""
    levels = np.broadcast_to(images, (*images.shape[:3], 3)) / 255
    normalised = (levels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    resized = resize_bicubic(jnp.asarray(normalised, jnp.float32), 2 * side, a=-0.75)
    return tiny_exports.DINOV2.apply(PARAMS, resized)[:, 1:]


@pytest.mark.slow
def test_features_of_a_batch_are_those_of_its_samples():
    """An image is mirrored exactly where the sample is; both cases occur."""
    built = build.training(aligned_config({"data.mirror": True}))
    rows = built.data_loader.batch(0, batch_sharding(built.recipe.mesh))
    batch = jax.jit(built.recipe.batch_transform.batch)(KEY, rows)
    replace_images = jax.jit(built.recipe.patch_features.replace_images)
    aligned = replace_images(built.frozen_params["alignment"], batch)
    assert aligned.images is None
    assert aligned.features.shape == (16, 16, 12)
    shown = np.rint((np.asarray(batch.x) + 1) * 127.5).astype(np.uint8)
    flipped = [not np.array_equal(*pair) for pair in zip(shown, rows.x, strict=True)]
    assert 0 < sum(flipped) < 16
    np.testing.assert_allclose(aligned.features, plain(shown, 4), atol=1e-5)
    assert np.abs(plain(shown, 4) - plain(np.asarray(rows.x), 4)).max() > 0.1


@pytest.mark.parametrize("mirror", [False, True])
def test_one_draw_mirrors_moments_images_and_features(mirror):
    """The second of the stored views is negative, and a mirrored image starts with its last
    column."""
    count = 64
    side, columns = jnp.asarray([1.0, -1.0]), jnp.arange(2, dtype="uint8")
    mean = jnp.broadcast_to(side[None, :, None, None, None], (count, 2, 2, 2, 1))
    rows = Batch(
        x=jnp.concatenate([mean, jnp.zeros_like(mean)], axis=-1).astype(jnp.float16),
        y=jnp.arange(count),
        features=jnp.broadcast_to(side[None, :, None, None], (count, 2, 3, 5)).astype("float16"),
        images=jnp.broadcast_to(columns[None, None, :, None], (count, 2, 2, 3)),
    )
    batch = BatchTransform(scaling=LatentScaling(), mirror=mirror).batch(KEY, rows)
    mirrored = np.asarray(batch.x[:, 0, 0, 0]) < 0
    assert (20 < mirrored.sum() < 44) if mirror else not mirrored.any()
    np.testing.assert_array_equal(batch.features[:, 1, 4] < 0, mirrored)
    np.testing.assert_array_equal(batch.images[:, 0, 0, 1] == 1, mirrored)
    np.testing.assert_array_equal(batch.images[:, 0, 1, 1] == 0, mirrored)
    np.testing.assert_array_equal(batch.y, rows.y)
    assert batch.features.dtype == jnp.float32


@pytest.mark.slow
def test_stored_features_are_those_of_both_views():
    features = PatchFeatures(encoder=tiny_exports.DINOV2, side=3)
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    both, one = (
        patch_features.stored_features(features, mirror=mirror)(PARAMS, jnp.asarray(images))
        for mirror in (True, False)
    )
    assert both.shape == (2, 2, *features.shape)
    assert both.dtype == jnp.float16
    np.testing.assert_array_equal(one[:, 0], both[:, 0])
    for i, view in enumerate((images, images[:, :, ::-1])):
        np.testing.assert_allclose(both[:, i], plain(view, 3), rtol=1e-3, atol=1e-4)


def test_no_images_or_features_are_read_unless_the_objective_aligns():
    built = build.training(tiny.config())
    batch = built.data_loader.batch(0, batch_sharding(built.recipe.mesh))
    assert (batch.images, batch.features, built.recipe.patch_features) == (None, None, None)
    assert built.frozen_params == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alignment.encoder": "/nowhere"},
         "alignment.encoder=/nowhere: it holds no config.json; give the directory of a DINOv2"),
        ({"alignment.encoder": str(tiny.SCRATCH / "tiny_autoencoderkl")},
         "alignment.encoder=.*: it holds no such network; give the directory of a DINOv2"),
        ({"alignment.encoder": ""},
         "data.name=digits: it has no features to align with; store features with dmf prepare "
         "--features=DIR and leave alignment.encoder empty, or let .* --keep-images$"),
        ({"alignment.dtype": "half"}, "^alignment.dtype=half: choose one of float32, bfloat16"),
        ({"model.alignment_width": 13},
         "model.alignment_width=13: the features of alignment.encoder=.* have width 12"),
        ({"data.name": "cache"}, "data.name=cache: it has no images to align with"),
    ],
)
def test_fields_that_do_not_go_together_are_named_in_one_line(fields, message):
    tiny_exports.exported(tiny_exports.AUTOENCODER)
    with pytest.raises(InputError, match=message) as error:
        build.training(aligned_config(fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "mirror", "message"),
    [
        ((2, 9, 12), False, "data.name=d: .* 9 patches an image, and .* 16 tokens; .*side=4"),
        ((2, 16, 11), False, "model.alignment_width=12: .* data.name=d have width 11"),
        ((1, 16, 12), True, "data.mirror=True: the dataset has no features of mirror images"),
    ],
)
def test_stored_features_of_another_network(shape, mirror, message):
    with pytest.raises(InputError, match=message):
        patch_features.check_stored_features(shape, 16, 12, mirror=mirror, name="d")
    patch_features.check_stored_features((1, 16, 12), 16, 12, mirror=False, name="d")


def test_a_side_of_no_patches_is_named():
    with pytest.raises(InputError, match="features_side=0"):
        PatchFeatures(encoder=tiny_exports.DINOV2, side=0)


def test_the_inputs_of_a_step_are_known_without_encoder_or_data():
    """Images have eight times the side of latents, and the width of the projector determines the
    encoder."""
    fields = ALIGNED | {"model.channels": 4, "data.directory": "/nowhere", "data.mirror": True}
    elsewhere = fields | {"alignment.encoder": "/nowhere", "model.alignment_width": 384}
    lowered = compile.lowered_step(tiny.config(elsewhere), jax.devices()[:2])
    assert lowered.recipe.patch_features.encoder == DinoV2(width=384, depth=12, heads=6)
    assert lowered.inputs[1].images.shape == (16, 64, 64, 3)
    assert lowered.inputs[1].features is None
    assert lowered.inputs[2].keys() == {"alignment"}
    stored = abstract_inputs(build.recipe(tiny.config(fields), make_mesh()))
    assert stored[1].images is None
    assert stored[1].features.shape == (16, 2, 16, 12)
    assert stored[2] == {}
    with pytest.raises(InputError, match="model.alignment_width=12: .* 384, 768, 1024"):
        compile.lowered_step(tiny.config(ALIGNED | {"alignment.encoder": "/nowhere"}),
                               jax.devices())  # fmt: skip
