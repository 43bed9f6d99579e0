"""Gradients are summed over devices once a step, and each device receives its part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network

from configs import default
from dmf.objectives import DecoupledMeanFlow
from dmf.runtime.sharding import (
    batch_sharding,
    make_mesh,
    parameter_shardings,
    replicated,
    state_shardings,
)
from dmf.training import build
from dmf.training.abstract_inputs import abstract_inputs
from dmf.training.gradient_sum import mean_over_shards
from dmf.training.hlo_collectives import collectives
from dmf.training.train_step import compiled_train_step, create_train_state

X = np.random.default_rng(0).standard_normal((16, 64)).astype("f")
PARAMS = {"blocks": {"kernel": jnp.ones((2, 64, 64))}, "bias": jnp.zeros(64)}
TIMES = 3  # The gradients of a shard that are added before the sum.


def gradient_of(params, x, frozen_params, cast):
    """As of `TIMES` terms: x x^T for each block, and x, both times what is frozen."""
    total = cast(jax.tree.map(jnp.zeros_like, params))
    for _ in range(TIMES):
        kernel = jnp.einsum("bi,bj->ij", x, x) / len(x)
        gradient = {"blocks": {"kernel": jnp.stack([kernel, 2 * kernel])}, "bias": x.mean(0)}
        gradient = jax.tree.map(lambda leaf: leaf * frozen_params["scale"], gradient)
        total = jax.tree.map(jnp.add, total, cast(gradient))
    return total, {"loss": jnp.mean(x)}


def compiled_on(mesh, cast=lambda gradient: gradient, rows=X):
    def function(params, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            frozen_params = {"scale": jnp.float32(2)}
            cast_gradient = functools.partial(gradient_of, cast=cast)
            return mean_over_shards(mesh, cast_gradient, params, (x,), frozen_params)

    return jax.jit(
        function, in_shardings=(parameter_shardings(mesh, PARAMS), batch_sharding(mesh)),
        out_shardings=(state_shardings(mesh, PARAMS), replicated(mesh)),
    ).lower(PARAMS, rows).compile()  # fmt: skip


def values(program, rows=X):
    return jax.tree.map(np.asarray, program(PARAMS, rows))


@functools.cache
def on_one_device(count=len(X)):
    return values(compiled_on(make_mesh(1, devices=jax.devices()[:1]), rows=X[:count]), X[:count])


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (2, 2, 1, 2), (1, 2, 2, 2)], ids=str)
def test_the_gradient_is_that_of_one_device_on_every_mesh(sizes):
    """Where "data" splits a dimension that "fsdp" splits too, parts lie in the order of both."""
    program = compiled_on(make_mesh(*sizes))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                 values(program), on_one_device())  # fmt: skip
    assert {kind for kind, _, between, *_ in sums(program, sizes[3]) if between} <= {"all-reduce"}


def test_what_has_fewer_parts_than_devices_is_summed_whole():
    """Six devices hold a dimension of 64 in two parts, or whole."""
    mesh, rows = make_mesh(6, devices=jax.devices()[:6]), X[:12]
    program = compiled_on(mesh, rows=rows)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                 values(program, rows), on_one_device(12))  # fmt: skip


def sums(program, slices=1):
    """(kind, devices, between slices, count, bytes) of what is sent, but for scalars."""
    return sorted(tuple(c[:5]) for c in collectives(program.as_text(), 8, slices) if c.size > 64)


def test_each_array_is_summed_once_and_scattered():
    size = 2 * 64 * 64 * 4
    # The bias is too small to be split; the loss is summed with it.
    assert sums(compiled_on(make_mesh(8, 1, 1))) == [
        ("all-reduce", 8, False, 1, 65 * 4), ("reduce-scatter", 8, False, 1, size)
    ]
    between = sums(compiled_on(make_mesh(4, 1, 1, 2)), slices=2)
    assert ("reduce-scatter", 4, False, 1, size) in between
    # Between slices only the parts are summed that were scattered within them.
    assert sum(s[4] for s in between if s[2]) == size // 4 + 65 * 4


def test_gradients_are_collected_and_summed_in_the_dtypes_of_the_cast():
    def cast(gradient):
        kernels = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), gradient["blocks"])
        return {**gradient, "blocks": kernels}

    program = compiled_on(make_mesh(8, 1, 1), cast)
    gradient, exact = values(program)[0], on_one_device()[0]
    assert gradient["blocks"]["kernel"].dtype == np.float32
    difference = np.abs(gradient["blocks"]["kernel"] - exact["blocks"]["kernel"]).max()
    assert 1e-3 < difference / np.abs(exact["blocks"]["kernel"]).max() < 2e-2
    np.testing.assert_allclose(gradient["bias"], exact["bias"], rtol=1e-5, atol=1e-6)


def step_of(sum_gradients):
    """The metrics and the first moments of one step by two microbatches on eight devices."""
    fields = {"gradient_accumulation": 2, "sum_gradients": sum_gradients}
    with small_network.registered():
        objective = default.component(DecoupledMeanFlow())
        config = small_network.config(fields, objective=objective)
        recipe = build.recipe(config, make_mesh(8, 1, 1))
    rows = abstract_inputs(recipe)[1]
    draw = np.random.default_rng(0)
    rows = rows._replace(x=draw.integers(0, 255, rows.x.shape, "u1"),
                         y=draw.integers(0, 10, rows.y.shape, "i4"))  # fmt: skip
    state = create_train_state(recipe, jax.random.key(0), {})
    state, metrics = compiled_train_step(recipe)(state, rows, {}, jax.random.key(1))
    return jax.tree.map(np.asarray, (metrics, state.opt_state))


def test_a_step_is_the_same_whenever_gradients_are_summed():
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-8)
    jax.tree.map(close, step_of("once"), step_of("per_term"))
