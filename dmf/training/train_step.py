"""The training step: one compiled update of the train state.

    rows -> batch -> draws -> loss of each sample -> mean gradient -> optimizer -> parameters -> EMA

`train_step` reads from top to bottom; `mean_gradient` takes the gradient of the objective's loss,
one term after the other, and `accumulated_gradient` one microbatch after the other.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from dmf.objectives.objective import Term, terms_of
from dmf.runtime.memoize import memoized
from dmf.runtime.sharding import (
    batch_sharding,
    constrain_batch,
    replicated,
    shardings_of,
    with_shardings,
)
from dmf.training.apply_if_finite import select_finite, skip_metrics
from dmf.training.build import Recipe
from dmf.training.ema import update_ema
from dmf.training.gradient_sum import mean_over_shards
from dmf.training.train_state import TrainState, initial_train_state, train_state_shardings
from dmf.types import Batch, Metrics, Params, PRNGKey

# Folded into the key of a step for the batch transform; the objective draws from that key itself.
_TRANSFORM_KEY = 2**31 - 1

# By default XLA orders a program for a CPU so that small operations may run concurrently. The
# operations of a training step are large, and that order takes up to twice the memory.
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}

FrozenParams = Mapping[str, Params]
TrainStep = Callable[[TrainState, Batch, FrozenParams, PRNGKey], tuple[TrainState, Metrics]]


def initial_state(recipe: Recipe, key: PRNGKey, pretrained: Params) -> TrainState:
    """The train state before the first step.

    Args:
      recipe: network, optimizer and EMAs.
      key: random key of the initial parameters.
      pretrained: parameters to start from. Leaves may be missing; their parameters are initialised
        at random.
    """
    initial, given = (
        flatten_dict(tree, sep="/") for tree in (recipe.network.init(key), pretrained)
    )
    params = unflatten_dict({**initial, **given}, sep="/")
    return initial_train_state(params, recipe.optimizer.transform(), sorted(recipe.emas))


@memoized
def abstract_state(recipe: Recipe) -> TrainState:
    """The train state of a recipe as shapes with shardings."""
    init = functools.partial(initial_state, recipe)
    state = jax.eval_shape(init, jax.random.key(0), {})
    return with_shardings(state, train_state_shardings(recipe.mesh, state))


def create_train_state(recipe: Recipe, key: PRNGKey, pretrained: Params) -> TrainState:
    """The train state before the first step; each device computes its own shards only.

    Args:
      recipe, key, pretrained: as for `initial_state`.
    """
    return _compiled_initial_state(recipe)(key, pretrained)


@memoized
def _compiled_initial_state(recipe: Recipe) -> Callable[[PRNGKey, Params], TrainState]:
    init = functools.partial(initial_state, recipe)
    return jax.jit(init, out_shardings=shardings_of(abstract_state(recipe)))


@memoized
def compiled_train_step(recipe: Recipe) -> TrainStep:
    """The training step, to be compiled on its first call; the train state is donated.

    Runs of one process with equal recipes share one compiled program.

    Args:
      recipe: what the step computes, and on which mesh.

    Returns:
      (state, rows, frozen parameters, key) -> (state, metrics), see `train_step`.
    """
    mesh, shardings = recipe.mesh, shardings_of(abstract_state(recipe))

    def step(
        state: TrainState, rows: Batch, frozen_params: FrozenParams, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        # Sharding constraints inside the step look up the mesh.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return train_step(recipe, state, rows, frozen_params, key)

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), None, replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=_COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
    )


def train_step(
    recipe: Recipe, state: TrainState, rows: Batch, frozen_params: FrozenParams, key: PRNGKey
) -> tuple[TrainState, Metrics]:
    """One update of the train state.

    Args:
      recipe: what the step computes.
      state: train state before the step.
      rows: a global batch, as the dataset stores it.
      frozen_params: parameters of the networks "teacher" and "alignment", if the run has them.
      key: random key of the run. The number of the step is folded in, so that a step is a pure
        function of its arguments. Runs with other seeds share the compiled program.

    Returns:
      The state after the step, and float32 means over the batch: `loss`, the metrics of the
      objective, `gradient_norm` (before clipping), `learning_rate`, and the counts of skipped steps
      where steps may be skipped.
    """
    batch, draws = drawn(recipe, rows, key, state.step)
    if recipe.objective.target_ema:
        frozen_params = {**frozen_params, "target": state.ema_params[recipe.objective.target_ema]}
    if recipe.sum_gradients == "once":
        gradient_of = functools.partial(accumulated_gradient, recipe, cast=recipe.network.cast)
        gradient, metrics = mean_over_shards(
            recipe.mesh, gradient_of, state.params, (batch, draws), frozen_params
        )
    else:
        gradient, metrics = accumulated_gradient(recipe, state.params, batch, draws, frozen_params)

    gradient_norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(gradient_norm)
    optimizer = optax.with_extra_args_support(recipe.optimizer.transform())
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, finite=finite)
    params = recipe.freeze_mask.select(state.params, optax.apply_updates(state.params, updates))
    ema_params = {
        # Without the mask, rounding would change the EMA of a frozen parameter.
        name: recipe.freeze_mask.select(
            state.ema_params[name],
            update_ema(ema, state.ema_params[name], params, state.step, recipe.batch_size),
        )
        for name, ema in recipe.emas.items()
    }
    if recipe.optimizer.skip_nonfinite:
        params = select_finite(finite, params, state.params)
        ema_params = select_finite(finite, ema_params, state.ema_params)

    metrics |= skip_metrics(opt_state)
    metrics["gradient_norm"] = gradient_norm
    metrics["learning_rate"] = jnp.asarray(recipe.optimizer.rate(state.step), jnp.float32)
    return TrainState(state.step + 1, params, opt_state, ema_params), metrics


def drawn(recipe: Recipe, rows: Batch, key: PRNGKey, step: Any) -> tuple[Batch, Any]:
    """The batch of a training step, and the draws of its objective.

    Args:
      recipe, rows, key: as for `train_step`.
      step: int scalar, number of steps taken before this one.
    """
    step_key = jax.random.fold_in(key, step)
    batch = recipe.batch_transform.batch(jax.random.fold_in(step_key, _TRANSFORM_KEY), rows)
    return batch, recipe.objective.draw(step_key, batch, step)


def accumulated_gradient(
    recipe: Recipe,
    params: Params,
    batch: Batch,
    draws: Any,
    frozen_params: FrozenParams,
    cast: Callable[[Params], Params] = lambda gradient: gradient,
) -> tuple[Params, Metrics]:
    """The mean gradient and the mean metrics of a batch, computed by microbatches in turn.

    The gradients of terms and microbatches are added in the dtypes that `cast` gives them.
    """
    microbatches = recipe.gradient_accumulation
    network = recipe.freeze_mask.stop_encoder_gradient(recipe.network)

    def gradient(params: Params, batch: Batch, draws: Any) -> tuple[Params, Metrics]:
        if recipe.patch_features is not None:
            batch = recipe.patch_features.replace_images(frozen_params["alignment"], batch)
        terms = terms_of(recipe.objective, network, params, batch, draws, frozen_params)
        return mean_gradient(terms, params, recipe.freeze_mask.stop_gradient, cast)

    if microbatches == 1:
        return gradient(params, batch, draws)

    def split(x: jax.Array) -> jax.Array:
        # Each microbatch takes an equal share of the rows of each device, so that no row moves.
        return constrain_batch(x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), axis=1)

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *microbatch)), None

    shapes = jax.eval_shape(gradient, params, batch, draws)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, jax.tree.map(split, (batch, draws)))
    return jax.tree.map(lambda x: x / microbatches, total)


def mean_gradient(
    terms: Sequence[Term],
    params: Params,
    stop_gradient: Callable[[Params], Params] = lambda params: params,
    cast: Callable[[Params], Params] = lambda gradient: gradient,
) -> tuple[Params, Metrics]:
    """The gradient of the mean loss over samples, and the mean metrics with `loss` among them.

    The backward pass of a term ends before the forward pass of the next one begins, so that a step
    takes the memory of its largest term and not that of their sum.

    Args:
      terms: the terms of the loss.
      params: parameters to differentiate by.
      stop_gradient: returns the parameters, without gradient where they are frozen.
      cast: from the gradient of a term to one in the dtypes that the terms are added in.

    Returns:
      The gradient, a tree like the parameters; and float32 means over the batch by name.
    """

    def mean_loss(params: Params, term: Term, inputs: Any) -> tuple[jax.Array, Metrics]:
        losses, metrics = term.loss(stop_gradient(params), *inputs)
        metrics = {**metrics, "loss": term.weight * losses}
        means = jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)
        return means["loss"], means

    gradient_of = jax.grad(mean_loss, has_aux=True)
    first, *others = terms
    gradient, metrics = gradient_of(params, first, first.inputs)
    gradient = cast(gradient)
    for term in others:
        term_gradient, term_metrics = gradient_of(params, term, after(gradient, term.inputs))
        gradient = jax.tree.map(jnp.add, gradient, cast(term_gradient))
        metrics |= term_metrics | {"loss": metrics["loss"] + term_metrics["loss"]}
    return gradient, metrics


def after(done: Any, inputs: Any) -> Any:
    """The inputs, unchanged, but available only after all of `done` is computed.

    An optimization barrier alone would do, but XLA drops barriers on a CPU; there, the inputs also
    depend on the norm of `done`, which is never negative.
    """
    done, inputs = jax.lax.optimization_barrier((done, inputs))
    never = optax.tree.norm(done) < -1
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), inputs)
