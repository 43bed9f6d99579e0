"""A loss as a sum of terms: the gradient is that of the sum, in the memory of the largest term."""

import dataclasses

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import default
from dmf import build, compiling, components
from dmf.objectives import DecoupledMeanFlow
from dmf.sharding import make_mesh
from dmf.step import abstract_inputs, initial_state, training_step
from dmf.terms import Objective, Summed, Term, after, mean_gradient, terms_of, total
from dmf.typing import Batch

X = jnp.arange(1.0, 5.0)
PARAMS = {"a": jnp.float32(3.0), "b": jnp.float32(-2.0)}


def power(exponent: int, name: str) -> Term:
    """a x^exponent, and b among its metrics."""
    def loss(params, x):
        return params["a"] * x**exponent, {name: params["b"] * jnp.ones_like(x)}

    return Term(loss, (X,))


TERMS = [power(1, "first"), power(2, "second"), power(3, "third")]


def test_the_gradient_is_that_of_the_sum_and_the_loss_its_mean():
    gradient, means = gv.jit(lambda params: mean_gradient(TERMS, params))(PARAMS)
    slope = jnp.mean(X + X**2 + X**3)
    np.testing.assert_allclose(gradient["a"], slope, rtol=1e-6)
    assert gradient["b"] == 0
    np.testing.assert_allclose(means.pop("loss"), 3 * slope, rtol=1e-6)
    assert means == {"first": -2, "second": -2, "third": -2}
    losses, metrics = total(TERMS, PARAMS)
    np.testing.assert_allclose(losses, 3 * (X + X**2 + X**3), rtol=1e-6)
    assert set(metrics) == {"first", "second", "third"}


def test_the_gradient_goes_through_what_is_seen_of_the_parameters():
    held = lambda params: params | {"a": 5 * jax.lax.stop_gradient(params["a"])}  # noqa: E731
    gradient, means = mean_gradient(TERMS, PARAMS, held)
    assert gradient["a"] == 0
    np.testing.assert_allclose(means["loss"], 15 * jnp.mean(X + X**2 + X**3), rtol=1e-6)


@pytest.mark.parametrize("done", [1.0, -7.0, jnp.nan, jnp.inf], ids=str)
def test_what_waits_keeps_its_values(done):
    """Also where what it waits for is not finite: the two terms' metrics tell which went wrong."""
    inputs = {"x": X, "y": jnp.arange(3), "dropped": jnp.asarray([True, False]), "none": None}
    waited = gv.jit(after)({"g": jnp.full(4, done)}, inputs)
    assert waited["none"] is None
    for name in ("x", "y", "dropped"):
        np.testing.assert_array_equal(waited[name], inputs[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together(DecoupledMeanFlow):
    """The same loss, which is no sum to whoever takes its gradient."""

    def loss(self, *inputs):
        return super().loss(*inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decayed(DecoupledMeanFlow):
    """A third term."""

    decay: float = 0.5

    def terms(self, network, params, batch, draws, frozen):
        def loss(params, batch):
            squares = self.decay * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
            return jnp.full(len(batch.x), squares), {"decay": jnp.full(len(batch.x), squares)}

        return [*super().terms(network, params, batch, draws, frozen), Term(loss, (batch,))]


components.register("objective", "together", Together)
components.register("objective", "decayed", Decayed)


def config_of(name: str, fields: dict):
    objective = default.decoupled_mean_flow(default.self_guidance(1.0, 0.6, (0.0, 0.7)))
    config = tiny.flow_map()
    config.objective = objective
    config.objective.name = name
    if name == "decayed":
        config.objective.decay = 0.5
    config.update_from_flattened_dict(fields)
    return config


def stepped(name: str, fields: dict):
    """The state after one step of a config, its metrics, and the bytes of its temporaries."""
    recipe = build.recipe(config_of(name, fields), make_mesh(devices=jax.devices()[:1]))
    state, rows, frozen = abstract_inputs(recipe)
    step = training_step(recipe, jax.tree.map(lambda leaf: leaf.sharding, state))
    draw = np.random.default_rng(0)
    rows = rows._replace(
        x=jax.device_put(draw.integers(0, 255, rows.x.shape, "u1"), rows.x.sharding),
        y=jax.device_put(draw.integers(0, 10, rows.y.shape, "i4"), rows.y.sharding),
    )
    state = jax.device_put(initial_state(recipe, jax.random.key(0), {}),
                           jax.tree.map(lambda leaf: leaf.sharding, state))
    compiled = step.lower(state, rows, frozen, jax.random.key(1)).compile()
    bytes_of = compiled.memory_analysis().temp_size_in_bytes
    return *compiled(state, rows, frozen, jax.random.key(1)), bytes_of


LARGE = {"model.depth": 8, "model.split_depth": 5, "data.batch_size": 64}


def test_a_step_takes_the_memory_of_one_half_and_gives_the_same():
    (state, metrics, bytes_of), (other, expected, together) = (
        stepped(name, LARGE) for name in ("decoupled_mean_flow", "together")
    )
    assert bytes_of < 0.7 * together
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-9, err_msg=name)
    moments, others = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(made.optimizer)])
                       for made in (state, other))
    gv.assert_near(moments, others, 1e-4)


def test_a_derived_objective_adds_a_term():
    plain, more = (stepped(name, {})[1] for name in ("decoupled_mean_flow", "decayed"))
    assert more["decay"] > 1
    np.testing.assert_allclose(more["loss"], plain["loss"] + more["decay"], rtol=1e-5)
    assert more["gradient_norm"] > 1.01 * plain["gradient_norm"]


def test_a_loss_of_its_own_is_the_only_term():
    network = gv.decoupled("dmf_tiny")
    batch = Batch(jnp.zeros((2, *network.sample_shape)), jnp.arange(2))
    draws = DecoupledMeanFlow().draw(jax.random.key(0), batch)
    inputs = network, gv.decoupled_params("dmf_tiny"), batch, draws, {}
    assert len(terms_of(DecoupledMeanFlow(), *inputs)) == 2
    (only,) = terms_of(Together(), *inputs)
    assert only.inputs == (batch, draws)

    assert isinstance(DecoupledMeanFlow(), Objective)
    with pytest.raises(TypeError, match="terms"):
        Summed()


@pytest.mark.parametrize(
    ("scan", "remat"),
    [
        (True, "dots"),
        pytest.param(True, "none", marks=pytest.mark.slow),
        pytest.param(True, "full", marks=pytest.mark.slow),
        pytest.param(False, "none", marks=pytest.mark.slow),
        pytest.param(False, "dots", marks=pytest.mark.slow),
        pytest.param(False, "full", marks=pytest.mark.slow),
    ],
)
def test_shared_work_takes_no_more_memory_than_plain(scan, remat):
    fields = {
        "model.depth": 6, "model.split_depth": 4, "model.width": 128, "model.heads": 4,
        "model.patch_size": 1, "data.batch_size": 16, "model.scan": scan, "model.remat": remat,
    }  # fmt: skip
    shared, plain = (
        compiling.compile_step(
            config_of("decoupled_mean_flow", fields | {"objective.work.shared": form}),
            jax.devices()[:1],
        ).temporaries
        for form in (True, False)
    )
    assert shared < 1.05 * plain
