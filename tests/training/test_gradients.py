"""A loss that is a sum of terms: its gradient takes the memory of its largest term."""

import dataclasses
import functools

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_objectives import PARAMS as PARAMS_OF_LINEAR
from test_objectives import LinearNetwork, batch_of

from configs import default
from dmf import registry
from dmf.models.simple_network import SimpleNetwork
from dmf.objectives import DecoupledMeanFlow, FlowMatching, SelfGuidance
from dmf.objectives.objective import Objective, Sum, Term, terms_of
from dmf.runtime.sharding import make_mesh
from dmf.training import build, compile
from dmf.training.abstract_inputs import abstract_inputs
from dmf.training.freezing import FreezeMask
from dmf.training.train_step import (
    accumulated_gradient,
    after,
    compiled_train_step,
    initial_state,
    mean_gradient,
)
from dmf.types import Batch

X = jnp.arange(1.0, 5.0)
PARAMS = {"a": jnp.float32(3.0), "b": jnp.float32(-2.0)}


def power(exponent: int, name: str) -> Term:
    """a x^exponent, and b among its metrics."""
    def loss(params, x):
        return params["a"] * x**exponent, {name: params["b"] * jnp.ones_like(x)}

    return Term(loss, (X,))


TERMS = Sum([power(1, "first"), power(2, "second"), power(3, "third")])


def test_the_gradient_is_that_of_the_sum_and_the_loss_its_mean():
    gradient, means = gv.jit(lambda params: mean_gradient(TERMS, params))(PARAMS)
    slope = jnp.mean(X + X**2 + X**3)
    np.testing.assert_allclose(gradient["a"], slope, rtol=1e-6)
    assert gradient["b"] == 0
    np.testing.assert_allclose(means.pop("loss"), 3 * slope, rtol=1e-6)
    assert means == {"first": -2, "second": -2, "third": -2}
    losses, metrics = TERMS.value(PARAMS)
    np.testing.assert_allclose(losses, 3 * (X + X**2 + X**3), rtol=1e-6)
    assert set(metrics) == {"first", "second", "third"}


def test_a_weight_scales_the_loss_and_its_gradient():
    halved = (Sum(TERMS[:1]) + Sum(TERMS[1:])) / 2
    (gradient, means), (whole, expected) = (mean_gradient(s, PARAMS) for s in (halved, TERMS))
    np.testing.assert_allclose(gradient["a"], whole["a"] / 2, rtol=1e-6)
    np.testing.assert_allclose(means["loss"], expected["loss"] / 2, rtol=1e-6)
    assert means["first"] == expected["first"] == -2


def test_the_gradient_is_stopped_where_the_parameters_are_frozen():
    def stop_gradient(params):
        return params | {"a": 5 * jax.lax.stop_gradient(params["a"])}

    gradient, means = mean_gradient(TERMS, PARAMS, stop_gradient)
    assert gradient["a"] == 0
    np.testing.assert_allclose(means["loss"], 15 * jnp.mean(X + X**2 + X**3), rtol=1e-6)


class Affine(SimpleNetwork):
    """A multiple of x_t, and a value for each label."""

    num_classes, sample_shape = 3, (2, 2, 1)

    def init(self, key):
        return {"factor": jnp.float32(0.5), "values": jnp.arange(4.0)}

    def apply(self, params, x_t, t, r, y):
        values = params["values"][self.condition(y).labels]
        return params["factor"] * x_t + values[:, None, None, None]


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_have_the_mean_gradient_and_the_mean_metrics_of_the_batch(microbatches):
    """To the scale, which clipping and Adam would hide."""
    network, objective = Affine(), FlowMatching(time_bins=2)
    x = jax.random.normal(jax.random.key(0), (8, 2, 2, 1))
    batch = Batch(x, jnp.arange(8, dtype=jnp.int32) % 3)
    draws, params = objective.draw(jax.random.key(1), batch), network.init(jax.random.key(2))
    whole, accumulated = (
        gv.jit(functools.partial(accumulated_gradient, build.Recipe(
            network=network, objective=objective, optimizer=None, emas={}, mesh=None,
            batch_transform=None, patch_features=None, batch_size=8, gradient_accumulation=count,
            freeze_mask=FreezeMask(),
        )))(params, batch, draws, {}) for count in (1, microbatches)
    )  # fmt: skip
    assert float(whole[1]["loss"]) > 0.1
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, accumulated, whole)


@pytest.mark.parametrize("done", [1.0, -7.0, jnp.nan, jnp.inf], ids=str)
def test_inputs_that_wait_keep_their_values(done):
    """Also where the other term is not finite: the metrics of both show which one is not."""
    inputs = {"x": X, "y": jnp.arange(3), "dropped": jnp.asarray([True, False]), "none": None}
    waited = gv.jit(after)({"g": jnp.full(4, done)}, inputs)
    assert waited["none"] is None
    for name in ("x", "y", "dropped"):
        np.testing.assert_array_equal(waited[name], inputs[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleTerm(DecoupledMeanFlow):
    """The same loss as a single term."""

    def loss(self, *inputs):
        return super().loss(*inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decayed(DecoupledMeanFlow):
    """A third term."""

    decay: float = 0.5

    def terms(self, network, params, batch, draws, frozen_params):
        def loss(params, batch):
            squares = self.decay * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
            return jnp.full(len(batch.x), squares), {"decay": jnp.full(len(batch.x), squares)}

        decay = Sum([Term(loss, (batch,))])
        return super().terms(network, params, batch, draws, frozen_params) + decay


registry.register("objective", single_term=SingleTerm, decayed=Decayed)


def config_of(name: str, fields: dict):
    guidance = SelfGuidance(omega=1.0, kappa=0.6, interval=(0.0, 0.7))
    config = tiny.flow_map()
    config.objective = default.component(DecoupledMeanFlow(guidance=guidance))
    config.objective.name = name
    if name == "decayed":
        config.objective.decay = 0.5
    config.update_from_flattened_dict(fields)
    return config


def one_step(name: str, fields: dict):
    """The state after one step of a config, its metrics, and the bytes of its temporaries."""
    recipe = build.recipe(config_of(name, fields), make_mesh(devices=jax.devices()[:1]))
    state, rows, frozen_params = abstract_inputs(recipe)
    step = compiled_train_step(recipe)
    draw = np.random.default_rng(0)
    rows = rows._replace(
        x=jax.device_put(draw.integers(0, 255, rows.x.shape, "u1"), rows.x.sharding),
        y=jax.device_put(draw.integers(0, 10, rows.y.shape, "i4"), rows.y.sharding),
    )
    state = jax.device_put(initial_state(recipe, jax.random.key(0), {}),
                           jax.tree.map(lambda leaf: leaf.sharding, state))
    compiled = step.lower(state, rows, frozen_params, jax.random.key(1)).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return *compiled(state, rows, frozen_params, jax.random.key(1)), temporaries


LARGE = {"model.depth": 8, "model.split_depth": 5, "data.batch_size": 64}


@pytest.mark.slow
def test_a_step_takes_the_memory_of_one_term_and_gives_the_same():
    (state, metrics, temporaries), (single_state, expected, single_temporaries) = (
        one_step(name, LARGE) for name in ("decoupled_mean_flow", "single_term")
    )
    assert temporaries < 0.7 * single_temporaries
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-9, err_msg=name)
    moments, expected_moments = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each.opt_state)])
        for each in (state, single_state)
    )
    gv.assert_near(moments, expected_moments, 1e-4)


@pytest.mark.slow
def test_a_derived_objective_adds_a_term():
    network, batch, gradients, metrics = LinearNetwork(), batch_of(8), [], []
    draws = DecoupledMeanFlow().draw(jax.random.key(0), batch)
    for objective in (DecoupledMeanFlow(), SingleTerm(), Decayed(decay=0.5)):
        terms = terms_of(objective, network, PARAMS_OF_LINEAR, batch, draws, {})
        gradient, means = mean_gradient(terms, PARAMS_OF_LINEAR)
        gradients.append(gradient)
        metrics.append(means)
    plain, single, decayed = metrics
    assert decayed["decay"] > 0.1
    np.testing.assert_allclose(single["loss"], plain["loss"], rtol=1e-6)
    np.testing.assert_allclose(decayed["loss"], plain["loss"] + decayed["decay"], rtol=1e-5)
    for name, leaf in PARAMS_OF_LINEAR.items():
        whole, one, other = (gradient[name] for gradient in gradients)
        np.testing.assert_allclose(one, whole, rtol=1e-5, atol=1e-6)
        # The gradient of decay |p|^2 is 2 decay p.
        np.testing.assert_allclose(other, whole + leaf, rtol=1e-5, atol=1e-6)


def test_an_overridden_loss_is_the_only_term():
    network = gv.decoupled("dmf_tiny")
    batch = Batch(jnp.zeros((2, *network.sample_shape)), jnp.arange(2))
    draws = DecoupledMeanFlow().draw(jax.random.key(0), batch)
    inputs = network, gv.decoupled_params("dmf_tiny"), batch, draws, {}
    assert len(terms_of(DecoupledMeanFlow(), *inputs)) == 2
    (only,) = terms_of(SingleTerm(), *inputs)
    assert only.inputs == (batch, draws)

    assert isinstance(DecoupledMeanFlow(), Objective)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scan", "remat"),
    [
        (True, "dots"), (True, "none"), (True, "full"), (False, "none"), (False, "full"),
    ],
)  # fmt: skip
def test_compute_sharing_takes_no_more_memory(scan, remat):
    fields = {
        "model.depth": 6, "model.split_depth": 4, "model.width": 128, "model.heads": 4,
        "model.patch_size": 1, "data.batch_size": 16, "model.scan": scan, "model.remat": remat,
    }  # fmt: skip
    shared, plain = (
        compile.compile_step(
            config_of("decoupled_mean_flow",
                      fields | {"objective.compute_sharing.enabled": enabled}),
            jax.devices()[:1],
        ).temporaries
        for enabled in (True, False)
    )
    assert shared < 1.05 * plain
