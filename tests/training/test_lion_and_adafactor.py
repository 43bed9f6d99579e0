"""Lion by hand, Adafactor of each matrix by itself as Optax has it, and runs with either."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_network
import tiny
from test_muon import matrices, random

from configs import default
from dmf.errors import InputError
from dmf.runtime.sharding import make_mesh
from dmf.training import build
from dmf.training.adafactor import Adafactor
from dmf.training.lion import Lion
from dmf.training.loop import train
from dmf.training.optimizer import AdamW
from dmf.training.train_state import initial_train_state, train_state_shardings


def after_steps(transform, params, gradients):
    state = transform.init(params)
    for gradient in gradients:
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_lion_steps_along_the_sign_of_a_momentum():
    optimizer = Lion(learning_rate=0.1, b1=0.8, b2=0.5, weight_decay=0.02, clip_norm=0.0)
    gradients = [np.array([0.3, -0.1, 0.0]), np.array([-0.1, -1.0, 0.2]), np.array([0.1, 0.1, 0.1])]
    p, m = np.array([1.0, -2.0, 0.5]), 0.0
    found = after_steps(optimizer.transform(), jnp.float32(p), map(jnp.float32, gradients))
    for g in gradients:
        p = p - 0.1 * (np.sign(0.8 * m + 0.2 * g) + 0.02 * p)
        m = 0.5 * m + 0.5 * g
    np.testing.assert_allclose(found, p, rtol=1e-6)


def parts(tree):
    """The matrices of a tree one by one, and of all other arrays those of each block."""
    blocks = tree["blocks"]
    others = [blocks["attention"]["qkv"]["bias"], blocks["norm"]["scale"]]
    return [*matrices(tree), *(array[block] for array in others for block in range(2)),
            tree["u_head"]["linear"]["kernel"], tree["time_embedding"]["in"]["kernel"],
            tree["patch_embedding"]["kernel"]]  # fmt: skip


@pytest.mark.parametrize("momentum", [0.9, pytest.param(0.0, marks=pytest.mark.slow)])
def test_adafactor_takes_the_steps_of_optax_for_each_matrix_by_itself(momentum):
    # From three rows and columns on moments are factored.
    fields = {"min_dim_size_to_factor": 3, "multiply_by_parameter_scale": True,
              "clipping_threshold": 0.7}  # fmt: skip
    ours = Adafactor(learning_rate=0.02, weight_decay=0.1, clip_norm=0.0, momentum=momentum,
                     **fields)
    theirs = optax.adafactor(0.02, weight_decay_rate=0.02 * 0.1, momentum=momentum or None,
                             **fields)  # fmt: skip
    params, gradients = random(0), [random(1), random(2)]

    @jax.jit
    def run(params, gradients):
        apart = after_steps(theirs, parts(params), [parts(gradient) for gradient in gradients])
        return parts(after_steps(ours.transform(), params, gradients)), apart

    for found, want in zip(*run(params, gradients), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_adafactor_stores_rows_and_columns_and_splits_no_stack():
    shapes = {"blocks": {"attention": {"qkv": {"kernel": (2, 256, 3, 4, 64)}},
                         "mlp": {"in": {"kernel": (2, 256, 8192)}}}, "table": (4096, 16)}
    params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes,
                          is_leaf=lambda shape: isinstance(shape, tuple))
    transform = Adafactor(skip_nonfinite=2).transform()
    state = jax.eval_shape(
        lambda params: initial_train_state(params, transform, ("main",)), params
    )
    moments = state.opt_state.inner_state[1][0]
    sizes = {name: sorted(leaf.size for leaf in jax.tree.leaves(moments["blocks"][name]))
             for name in shapes["blocks"]}
    # A count, an unused moment, rows and columns: of each of six matrices, and of two.
    assert sizes == {"attention": [6, 6, 6 * 256, 6 * 256], "mlp": [2, 2, 2 * 256, 2 * 8192]}
    shardings = train_state_shardings(make_mesh(data=4, tensor=2), state).opt_state.inner_state
    found = shardings[1][0]
    assert [leaf.spec for leaf in jax.tree.leaves(found["blocks"]["mlp"])
            if not leaf.is_fully_replicated] == [jax.P(None, "data")]
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(found["table"]))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [
    Lion(learning_rate=1e-3, skip_nonfinite=2, weight_decay=0.1),
    Adafactor(learning_rate=1e-2, skip_nonfinite=2, momentum=0.9, min_dim_size_to_factor=8),
    AdamW(learning_rate=1e-3, schedule="wsd", weight_decay=0.1, groups=(("out", 0.5, 0.0),)),
])  # fmt: skip
def test_a_run_resumes_bit_for_bit_and_learns(optimizer, tmp_path):
    states = []
    with small_network.registered():
        for name, lengths in (("whole", (6,)), ("resumed", (3, 6))):
            for steps in lengths:
                config = small_network.config({"run.steps": 6, "run.checkpoint_every": 3})
                config.optimizer = default.component(optimizer)
                config.optimizer.decay_steps = 6 if optimizer.schedule == "wsd" else 0
                config.run.steps = steps
                state = train(config, tmp_path / name)
            states.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[0].params))
    moved = np.abs(states[0].params["out"] - states[0].ema_params["main"]["out"]).max()
    assert moved > 1e-5


@pytest.mark.slow
def test_adafactor_is_the_same_on_every_mesh(tmp_path):
    """With factored moments of a transformer, whole and split over four axes. Its default eps would
    make steps of full size of gradients that are 0 but for rounding, as of the bias of keys."""
    params = []
    for name, mesh in (("data", {}), ("all", {"mesh.fsdp": 2, "mesh.tensor": 2})):
        config = tiny.config({"run.steps": 4, **mesh})
        config.optimizer = default.component(
            Adafactor(learning_rate=3e-3, min_dim_size_to_factor=8, eps=1e-10)
        )
        params.append(jax.device_get(train(config, tmp_path / name).params))
    differences = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), *params)
    assert max(jax.tree.leaves(differences)) < 1e-3, differences


@pytest.mark.parametrize(("name", "field", "value"), [
    ("lion", "b1", 1.0), ("lion", "b2", -0.1), ("lion", "weight_decay", -1.0),
    ("adafactor", "decay_rate", 0.0), ("adafactor", "min_dim_size_to_factor", 1),
    ("adafactor", "clipping_threshold", 0.0), ("adafactor", "momentum", 1.0),
    ("adafactor", "eps", 0.0), ("adafactor", "weight_decay", -1.0),
])  # fmt: skip
def test_what_they_cannot_use_is_named(name, field, value):
    with pytest.raises(InputError, match=f"^optimizer.{field}={value}: "):
        build.optimizer({"name": name, field: value}, 8)
