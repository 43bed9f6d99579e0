"""The inputs of a training step as shapes with shardings, for tracing it without data."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dmf.data.pixels import IMAGE_CHANNELS
from dmf.models.abstract_params import abstract_params
from dmf.models.encoders.dinov2 import DinoV2
from dmf.runtime.sharding import batch_sharding, parameter_shardings, with_shardings
from dmf.training.build import Recipe
from dmf.training.train_state import TrainState
from dmf.training.train_step import abstract_state
from dmf.types import Batch, Network, Params

# Downsampling factor of the published autoencoders.
PIXELS_PER_LATENT = 8


def abstract_inputs(
    recipe: Recipe, rows: Batch | None = None
) -> tuple[TrainState, Batch, dict[str, Params]]:
    """The inputs of a training step but its key, as shapes with shardings.

    Args:
      recipe: what the step computes.
      rows: a batch of the dataset as shapes, see `DataLoader.abstract_batch`. Without a dataset,
        rows are assumed to be uint8 images with int32 labels if samples have 1 or 3 channels, and
        otherwise moments of latents in half precision; with representation alignment they have
        images or patch features too.

    Returns:
      Train state, rows and frozen parameters.
    """
    state = abstract_state(recipe)
    frozen = {}
    if recipe.objective.needs_teacher:
        frozen["teacher"] = recipe.objective.teacher
    if recipe.patch_features is not None:
        frozen["alignment"] = recipe.patch_features.encoder
    frozen_params = {name: _abstract_params(recipe.mesh, each) for name, each in frozen.items()}
    return state, rows or _assumed_rows(recipe, state.params), frozen_params


def _abstract_params(mesh: Mesh, network: Network | DinoV2) -> Params:
    params = abstract_params(network)
    return with_shardings(params, parameter_shardings(mesh, params))


def _assumed_rows(recipe: Recipe, params: Params) -> Batch:
    network, views = recipe.network, 1 + recipe.batch_transform.mirror
    height, width, channels = network.sample_shape
    sharding = batch_sharding(recipe.mesh)

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((recipe.batch_size, *shape), dtype, sharding=sharding)

    if channels in IMAGE_CHANNELS:
        x = images = rows(jnp.uint8, height, width, channels)
    else:
        x = rows(jnp.float16, views, height, width, 2 * channels)
        images = rows(jnp.uint8, PIXELS_PER_LATENT * height, PIXELS_PER_LATENT * width, 3)
    y = rows(jnp.int32)
    if recipe.patch_features is not None:
        return Batch(x, y, images=images)
    if not recipe.objective.alignment:
        return Batch(x, y)
    sample = jax.ShapeDtypeStruct((1, *network.sample_shape), jnp.float32)
    t, label = jnp.zeros(1), jnp.zeros(1, jnp.int32)
    features = jax.eval_shape(network.apply_with_features, params, sample, t, t, label)[1]
    return Batch(x, y, features=rows(jnp.float16, views, *features.shape[1:]))
