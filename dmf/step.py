"""The training step: from a recipe to one compiled update of the state."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from dmf import state as states
from dmf.build import Recipe
from dmf.encoders.dinov2 import DinoV2
from dmf.optimizer import averaged
from dmf.sharding import (
    batch_sharding,
    constrained,
    parameter_shardings,
    replicated,
)
from dmf.skipping import counts, unless
from dmf.state import TrainState
from dmf.terms import mean_gradient, terms_of
from dmf.typing import Batch, Metrics, Network, Params, PRNGKey

# Folded into the key of a step for what its rows become; its draws split that key.
_ROWS = 2**31 - 1
# Of an image, along each side of what one latent of the published autoencoders stands for.
PIXELS = 8

# XLA orders a program for a CPU so that small operations may run side by side. A step's are large,
# and in that order up to twice the memory is taken.
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}

FrozenParams = Mapping[str, Params]
Step = Callable[[TrainState, Batch, FrozenParams, PRNGKey], tuple[TrainState, Metrics]]


def initial_state(recipe: Recipe, key: PRNGKey, pretrained: Params) -> TrainState:
    """The state before the first step, from pretrained parameters where there are any.

    What they lack, whole parts of the network or single leaves, is initialised.
    """
    fresh, given = (flatten_dict(tree, sep="/") for tree in (recipe.network.init(key), pretrained))
    params = unflatten_dict({**fresh, **given}, sep="/")
    return states.initial(params, recipe.optimizer.transform(), sorted(recipe.emas))


def _mean_gradient(recipe: Recipe) -> Callable[..., Any]:
    """(params, batch, draws, frozen) -> mean gradient and mean metrics, a part of the batch and a
    term of the loss at a time."""
    parts, network = recipe.accumulation, recipe.freeze.seen(recipe.network)

    def gradient(params: Params, batch: Batch, draws: Any, frozen: Any) -> Any:
        if recipe.alignment is not None:
            batch = recipe.alignment.of_batch(frozen["alignment"], batch)
        terms = terms_of(recipe.objective, network, params, batch, draws, frozen)
        return mean_gradient(terms, params, recipe.freeze.held)

    if parts == 1:
        return gradient

    def cut(x: jax.Array) -> jax.Array:
        # Every part takes an equal share of each device's rows, so that no row moves.
        return constrained(x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), axis=1)

    def accumulated(params: Params, batch: Batch, draws: Any, frozen: Any) -> Any:
        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *part, frozen)), None

        shapes = jax.eval_shape(gradient, params, batch, draws, frozen)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, jax.tree.map(cut, (batch, draws)))
        return jax.tree.map(lambda x: x / parts, total)

    return accumulated


def training_step(recipe: Recipe, where: TrainState) -> Step:
    """One compiled update: (state, rows, frozen, key) -> state, metrics. The state is donated.

    The key is that of all draws of a run; a step folds in its number, so that a step is a pure
    function of it. It is no part of the program, which runs of other seeds find compiled.

    Args:
      recipe: what the step computes, and on which mesh.
      where: the state's shardings.

    Returns:
      A function whose metrics are float32 means over the batch: `loss`, what the objective
      reports, `gradient_norm` (before clipping) and `learning_rate`; and, where steps may be
      skipped, what `dmf.skipping.counts` says.
    """
    mesh = recipe.mesh
    optimizer = optax.with_extra_args_support(recipe.optimizer.transform())
    mean_gradient = _mean_gradient(recipe)

    def update(
        state: TrainState, rows: Batch, frozen: FrozenParams, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        batch = recipe.to_samples.batch(jax.random.fold_in(step_key, _ROWS), rows)
        draws = recipe.objective.draw(step_key, batch, state.step)
        gradient, metrics = mean_gradient(state.params, batch, draws, frozen)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        updates, moments = optimizer.update(
            gradient, state.optimizer, state.params, finite=finite
        )
        params = optax.apply_updates(state.params, updates)
        params = recipe.freeze.kept(state.params, params)
        averages = {
            name: averaged(ema, state.averages[name], params, state.step, recipe.batch_size)
            for name, ema in recipe.emas.items()
        }
        # An average of what does not move is that, but for rounding.
        averages = {
            name: recipe.freeze.kept(state.averages[name], average)
            for name, average in averages.items()
        }
        if recipe.optimizer.skip_nonfinite:
            params = unless(finite, params, state.params)
            averages = unless(finite, averages, state.averages)
        metrics |= counts(moments)
        metrics["gradient_norm"] = norm
        metrics["learning_rate"] = jnp.asarray(recipe.optimizer.rate(state.step), jnp.float32)
        return TrainState(state.step + 1, params, moments, averages), metrics

    def step(
        state: TrainState, rows: Batch, frozen: FrozenParams, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        # What the partitioner cannot tell by itself asks for the mesh.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return update(state, rows, frozen, key)

    return jax.jit(
        step,
        in_shardings=(where, batch_sharding(mesh), None, replicated(mesh)),
        out_shardings=(where, replicated(mesh)),
        donate_argnums=0,
        compiler_options=_COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
    )


def abstract_inputs(recipe: Recipe) -> tuple[TrainState, Batch, dict[str, Params]]:
    """What a step of a recipe takes beside a key, as shapes that know where they will live.

    Rows are uint8 images where samples have 1 or 3 channels, and the moments of latents, in half
    precision, otherwise. Where the objective aligns, there are images or patch features too.
    """
    state = jax.eval_shape(lambda: initial_state(recipe, jax.random.key(0), {}))
    state = states.with_shardings(state, states.shardings(recipe.mesh, state))
    frozen = {}
    if recipe.objective.needs_teacher:
        frozen["teacher"] = recipe.objective.teacher
    if recipe.alignment is not None:
        frozen["alignment"] = recipe.alignment.encoder
    params = {name: _abstract_params(recipe.mesh, made) for name, made in frozen.items()}
    return state, _abstract_rows(recipe, state.params), params


def _abstract_params(mesh: Mesh, network: Network | DinoV2) -> Params:
    params = jax.eval_shape(network.init, jax.random.key(0))
    return states.with_shardings(params, parameter_shardings(mesh, params))


def _abstract_rows(recipe: Recipe, params: Params) -> Batch:
    network, sides = recipe.network, 1 + recipe.to_samples.mirror
    height, width, channels = network.sample_shape
    on = batch_sharding(recipe.mesh)

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((recipe.batch_size, *shape), dtype, sharding=on)

    if channels in (1, 3):
        x = images = rows(jnp.uint8, height, width, channels)
    else:
        x = rows(jnp.float16, sides, height, width, 2 * channels)
        images = rows(jnp.uint8, PIXELS * height, PIXELS * width, 3)
    y = rows(jnp.int32)
    if recipe.alignment is not None:
        return Batch(x, y, images=images)
    if not recipe.objective.alignment:
        return Batch(x, y)
    sample = jax.ShapeDtypeStruct((1, *network.sample_shape), jnp.float32)
    t, label = jnp.zeros(1), jnp.zeros(1, jnp.int32)
    made = jax.eval_shape(network.apply_with_features, params, sample, t, t, label)[1]
    return Batch(x, y, features=rows(jnp.float16, sides, *made.shape[1:]))
