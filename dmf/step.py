"""The training step: from a recipe to one compiled update of the state."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dmf import state as states
from dmf.build import Recipe
from dmf.optimizer import averaged
from dmf.sharding import batch_sharding, constrained, parameter_shardings, replicated
from dmf.state import TrainState
from dmf.typing import Batch, Metrics, Params, PRNGKey

# Folded into the key of a step for what its rows become; its draws split that key.
_ROWS = 2**31 - 1

Step = Callable[[TrainState, Batch, Mapping[str, Params]], tuple[TrainState, Metrics]]


def initial_state(recipe: Recipe, key: PRNGKey, pretrained: Params) -> TrainState:
    """The state before the first step, from pretrained parameters where there are any."""
    params = {**recipe.network.init(key), **pretrained}
    return states.initial(params, recipe.optimizer.transform(), sorted(recipe.emas))


def _mean_gradient(recipe: Recipe) -> Callable[..., Any]:
    """(params, batch, draws, frozen) -> mean gradient and mean metrics, a part at a time."""
    parts = recipe.accumulation

    def loss(params: Params, batch: Batch, draws: Any, frozen: Any) -> tuple[jax.Array, Metrics]:
        losses, metrics = recipe.objective.loss(recipe.network, params, batch, draws, frozen)
        return jnp.mean(losses), jax.tree.map(jnp.mean, metrics | {"loss": losses})

    gradient = jax.grad(loss, has_aux=True)
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


def training_step(recipe: Recipe, key: PRNGKey, where: TrainState) -> Step:
    """One compiled update: (state, rows, frozen) -> state, metrics. The state is donated.

    Args:
      recipe: what the step computes, and on which mesh.
      key: of all draws; a step folds in its number, so that a step is a pure function of it.
      where: the state's shardings.

    Returns:
      A function whose metrics are float32 means over the batch: `loss`, what the objective
      reports, `gradient_norm` (before clipping) and `learning_rate`.
    """
    mesh, optimizer = recipe.mesh, recipe.optimizer.transform()
    mean_gradient = _mean_gradient(recipe)

    def update(state: TrainState, rows: Batch, frozen: Any) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        x = recipe.to_samples.samples(jax.random.fold_in(step_key, _ROWS), rows.x)
        batch = rows._replace(x=x)
        draws = recipe.objective.draw(step_key, batch)
        gradient, metrics = mean_gradient(state.params, batch, draws, frozen)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        averages = {
            name: averaged(ema, state.averages[name], params, state.step, recipe.batch_size)
            for name, ema in recipe.emas.items()
        }
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        metrics["learning_rate"] = jnp.asarray(recipe.optimizer.rate(state.step), jnp.float32)
        return TrainState(state.step + 1, params, moments, averages), metrics

    def step(state: TrainState, rows: Batch, frozen: Any) -> tuple[TrainState, Metrics]:
        # What the partitioner cannot tell by itself asks for the mesh.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return update(state, rows, frozen)

    return jax.jit(
        step,
        in_shardings=(where, batch_sharding(mesh), None),
        out_shardings=(where, replicated(mesh)),
        donate_argnums=0,
    )


def abstract_inputs(recipe: Recipe) -> tuple[TrainState, Batch, dict[str, Params]]:
    """What a step of a recipe takes, as shapes that know where they will live.

    Rows are uint8 images where samples have 1 or 3 channels, and the moments of latents, in half
    precision, otherwise.
    """
    network, mesh = recipe.network, recipe.mesh
    state = jax.eval_shape(lambda: initial_state(recipe, jax.random.key(0), {}))
    state = states.with_shardings(state, states.shardings(mesh, state))
    height, width, channels = network.sample_shape
    if channels in (1, 3):
        row, dtype = (height, width, channels), jnp.uint8
    else:
        row, dtype = (1 + recipe.to_samples.mirror, height, width, 2 * channels), jnp.float16
    on = batch_sharding(mesh)

    def rows(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((recipe.batch_size, *shape), dtype, sharding=on)

    features = None
    if recipe.objective.alignment:
        abstract = jax.ShapeDtypeStruct((1, *network.sample_shape), jnp.float32)
        t, y = jnp.zeros(1), jnp.zeros(1, jnp.int32)
        made = jax.eval_shape(network.apply_with_features, state.params, abstract, t, t, y)[1]
        features = rows(made.shape[1:], made.dtype)
    batch = Batch(rows(row, dtype), rows((), jnp.int32), features)
    if not recipe.objective.needs_teacher:
        return state, batch, {}
    teacher = jax.eval_shape(recipe.objective.teacher.init, jax.random.key(0))
    where = parameter_shardings(mesh, teacher)
    return state, batch, {"teacher": states.with_shardings(teacher, where)}
