"""Muon takes the steps that Optax takes for each matrix of each block by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from optax import contrib

from configs import default
from dmf.checkpoints.manager import CheckpointManager
from dmf.errors import InputError
from dmf.runtime.sharding import (
    make_mesh,
    parameter_shardings,
    replicated,
    shardings_of,
    state_shardings,
    with_shardings,
)
from dmf.training import build
from dmf.training.hlo_collectives import collectives
from dmf.training.loop import train
from dmf.training.muon import Muon
from dmf.training.train_state import initial_train_state, train_state_shardings

MUON = Muon(learning_rate=0.02, clip_norm=0.0, weight_decay=0.1)
SHAPES = {
    "blocks": {
        "attention": {"qkv": {"kernel": (2, 4, 3, 2, 2), "bias": (2, 3, 2, 2)},
                      "out": {"kernel": (2, 2, 2, 4)}},
        "norm": {"scale": (2, 4)},
        "modulation": {"linear": {"kernel": (2, 4, 2, 5)}},
    },
    "u_head": {"blocks": {"mlp": {"gate": {"kernel": (1, 4, 7)}}}, "linear": {"kernel": (4, 9)}},
    "time_embedding": {"in": {"kernel": (3, 4)}},
    "patch_embedding": {"kernel": (9, 4)},
}


def random(seed: int):
    leaves, tree = jax.tree.flatten(SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))
    numbers = np.random.default_rng(seed)
    return tree.unflatten([jnp.float32(numbers.normal(size=shape)) for shape in leaves])


def matrices(tree) -> list[jax.Array]:
    """The matrices of the blocks, one by one, and after them all other arrays."""
    attention, modulation = (tree["blocks"][name] for name in ("attention", "modulation"))
    found = []
    for block in range(2):
        found += [attention["qkv"]["kernel"][block, :, i].reshape(4, 4) for i in range(3)]
        found += [attention["out"]["kernel"][block].reshape(4, 4)]
        found += [modulation["linear"]["kernel"][block, :, i] for i in range(2)]
    return [*found, tree["u_head"]["blocks"]["mlp"]["gate"]["kernel"][0]]


def others(tree) -> list[jax.Array]:
    return [tree["blocks"]["attention"]["qkv"]["bias"], tree["blocks"]["norm"]["scale"],
            tree["u_head"]["linear"]["kernel"], tree["time_embedding"]["in"]["kernel"],
            tree["patch_embedding"]["kernel"]]


def step(transform, params, gradient):
    updates, _ = transform.update(gradient, transform.init(params), params)
    return optax.apply_updates(params, updates)


def test_a_step_is_that_of_optax_for_each_matrix_by_itself():
    params, gradient = random(0), random(1)
    # A block with a gradient of another size takes a step of the same size.
    qkv = gradient["blocks"]["attention"]["qkv"]
    qkv["kernel"] = qkv["kernel"].at[1].multiply(100.0)

    @jax.jit
    def run(params, gradient):
        # Optax takes what has two axes for a matrix.
        muon = contrib.muon(0.02, weight_decay=0.1, adam_b2=0.95, adam_weight_decay=0.1)
        flat = [[leaf.reshape(-1) for leaf in others(tree)] for tree in (params, gradient)]
        return (step(MUON.transform(), params, gradient),
                step(muon, matrices(params), matrices(gradient)), step(muon, *flat))

    after, expected, expected_others = run(params, gradient)
    for found, want in zip(matrices(after), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)
    for found, want in zip(others(after), expected_others, strict=True):
        np.testing.assert_allclose(found.reshape(-1), want, rtol=1e-5, atol=1e-7)


def test_a_loss_decreases_by_orthogonal_steps():
    """The step of each block has singular values near 1, whatever those of its gradient are."""
    optimizer = Muon(learning_rate=0.05, clip_norm=0.0).transform()
    target = jnp.float32(np.random.default_rng(3).normal(size=(2, 4, 4))) / 2

    def loss(params):
        return jnp.sum((params["blocks"]["kernel"] - target) ** 2)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, updates

    params = {"blocks": {"kernel": jnp.zeros((2, 4, 4))}}
    state, losses = optimizer.init(params), []
    for _ in range(30):
        params, state, value, updates = step(params, state)
        losses.append(float(value))
        singular = np.linalg.svd(updates["blocks"]["kernel"], compute_uv=False) / 0.05
        assert len(losses) > 1 or 0.6 < singular.min() < singular.max() < 1.3
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(("chosen", "extra"), [("blocks", 0), ("all", 2)])
def test_linear_layers_outside_of_blocks_are_matrices_where_they_are_chosen(chosen, extra):
    axes = Muon(matrices=chosen).matrix_axes(random(0))
    assert len(jax.tree.leaves(axes, is_leaf=lambda x: hasattr(x, "output_axis"))) == 4 + extra
    assert axes["patch_embedding"]["kernel"] is None
    assert (axes["u_head"]["linear"]["kernel"] is None) == (chosen == "blocks")


def test_the_last_layers_of_each_network_are_matrices():
    kernel = {"linear": {"kernel": jnp.ones((4, 2, 4))}}
    params = {"final": {"modulation": kernel, **kernel}, "v_head": {"final": kernel}}
    axes = jax.tree.leaves(Muon(matrices="all").matrix_axes(params),
                           is_leaf=lambda x: hasattr(x, "output_axis"))
    assert axes == [((-2,), (-1,)), ((-3,), (-1,)), ((-2,), (-1,))]


def test_the_state_is_sharded_like_the_parameters():
    shapes = {"blocks": {"mlp": {"in": {"kernel": (2, 64, 128)}}}, "label": {"table": (640, 16)}}
    params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes,
                          is_leaf=lambda shape: isinstance(shape, tuple))
    start = functools.partial(
        initial_train_state, optimizer=MUON.transform(), ema_names=("main",)
    )
    state = jax.eval_shape(start, params)
    shardings = train_state_shardings(make_mesh(data=4, tensor=2), state)
    (clip, muon), ema = shardings.opt_state, shardings.ema_params["main"]
    del clip
    momentum = muon.inner_states["muon"].inner_state[0].mu
    moments = muon.inner_states["adam"].inner_state[0]
    assert momentum["blocks"] == ema["blocks"]
    assert moments.mu["label"] == moments.nu["label"] == ema["label"]
    for sharding in jax.tree.leaves((momentum, moments.mu)):
        assert not sharding.is_fully_replicated


def test_the_state_is_saved_and_steps_may_be_skipped(tmp_path):
    optimizer, params = Muon(skip_nonfinite=3).transform(), random(0)
    state = jax.jit(optimizer.init)(params)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"opt_state": state}, {"step": 1})
        checkpoints.finish()
        _, trees = checkpoints.restore({"opt_state": abstract})
    assert jax.tree.structure(trees["opt_state"]) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, trees["opt_state"], state)
    after = jax.eval_shape(
        lambda finite: optimizer.update(params, state, params, finite=finite), jnp.bool_(True)
    )[1]
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.slow
def test_a_run_is_the_same_on_another_mesh(tmp_path):
    params = []
    for name, mesh in (("data", {}), ("all", {"mesh.fsdp": 2, "mesh.tensor": 2})):
        config = tiny.config({"run.steps": 4, **mesh})
        config.optimizer = default.component(Muon(learning_rate=3e-3, matrices="all"))
        state = train(config, tmp_path / name)
        params.append(jax.flatten_util.ravel_pytree(jax.device_get(state.params))[0])
    first, second = params
    assert np.linalg.norm(first - second) < 1e-4 * np.linalg.norm(first)


def test_what_muon_cannot_use_is_refused():
    with pytest.raises(InputError, match="^optimizer.matrices=heads: choose one of blocks, all"):
        build.optimizer({"name": "muon", "matrices": "heads"}, 8)
    for name in ("momentum", "b1", "b2"):
        with pytest.raises(InputError, match=f"^optimizer.{name}=1.0: a decay rate lies in"):
            build.optimizer({"name": "muon", name: 1.0}, 8)
    with pytest.raises(InputError, match="^optimizer.learning_rate=-1.0: it must be positive"):
        build.optimizer({"name": "muon", "learning_rate": -1.0}, 8)
    assert build.optimizer({"name": "muon", "schedule": "cosine"}, 8).decay_steps == 8
    with pytest.raises(InputError, match="^optimizer.name=muon: the network has no blocks"):
        MUON.transform().init({"in": jnp.ones((3, 4))})


@pytest.mark.parametrize(("depth", "width"), [(8, 64), (3, 64), (4, 36)])
def test_no_iteration_gathers_a_matrix(depth, width):
    """A step gathers what it updated, once; the fifteen products of each matrix gather nothing.
    Eight devices split a width of 36 into 4 parts."""
    mesh, transform = make_mesh(data=8), MUON.transform()
    params = {"blocks": {"kernel": jax.ShapeDtypeStruct((depth, width, width), jnp.float32)}}
    state = jax.eval_shape(transform.init, params)
    gradient, state = with_shardings((params, state), state_shardings(mesh, (params, state)))
    params = with_shardings(params, parameter_shardings(mesh, params))

    def train(gradient, state, params):
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        jitted = jax.jit(train, out_shardings=(replicated(mesh), shardings_of(state)))
        program = jitted.lower(gradient, state, params).compile()
    found = collectives(program.as_text(), 8)
    size = depth * width * width * 4
    assert sum(each.size for each in found if each.kind == "all-gather") <= size
    assert sum(each.sent for each in found) < 3 * size
