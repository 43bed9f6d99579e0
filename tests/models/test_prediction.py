"""Velocities of networks that predict data or noise, against the ends of straight paths."""

import dataclasses
import json
import types

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_data import Gaussian

from dmf.checkpoints import load
from dmf.default_config import get_config
from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.dit import DiT
from dmf.models.in_context_dit import InContextDiT
from dmf.models.prediction import velocity_of
from dmf.models.transformer import Transformer
from dmf.objectives import MeanFlow, UniformWeighting
from dmf.objectives.compute_sharing import ComputeSharing, shared_encoder_jvp
from dmf.objectives.guidance import GuidedVelocity
from dmf.objectives.interpolants import COSINE, LINEAR, ScaledLinear
from dmf.objectives.mean_flow import average_velocity
from dmf.objectives.path_sample import Draws, PathSample, path_sample
from dmf.training.initial_checkpoint import check_same, inherit
from dmf.types import Batch, ClassLabels

TINY = {"input_size": 4, "channels": 1, "patch_size": 2, "depth": 2, "width": 8, "heads": 1,
        "num_classes": 3}  # fmt: skip
# Below 0.05, between, and above 0.95.
T = jnp.asarray([0.02, 0.3, 0.6, 0.98])
KEYS = jax.random.split(jax.random.key(0), 2)
X, NOISE = (jax.random.normal(key, (4, 4, 4, 1)) for key in KEYS)


def column(values):
    return values[:, None, None, None]


def kind(prediction, min_time=0.05):
    return types.SimpleNamespace(prediction=prediction, min_time=min_time)


@pytest.mark.parametrize("path", [LINEAR, ScaledLinear(noise_scale=3.0)])
def test_the_ends_of_a_path_give_exactly_its_velocity(path):
    x_t, v_t = path.interpolate(X, NOISE, T), path.velocity(X, NOISE, T)
    ends = {"velocity": v_t, "data": X, "noise": path.noise_scale * NOISE}
    exact = {"velocity": T >= 0, "data": T >= 0.05, "noise": T <= 0.95}
    for prediction, end in ends.items():
        found = velocity_of(kind(prediction), end, x_t, T)
        np.testing.assert_allclose(found[exact[prediction]], v_t[exact[prediction]], atol=2e-5)
    for prediction, rest in (("data", T / 0.5), ("noise", (1 - T) / 0.5)):
        found = velocity_of(kind(prediction, 0.5), ends[prediction], x_t, T)
        np.testing.assert_allclose(found, column(jnp.minimum(rest, 1)) * v_t, atol=2e-5)


@pytest.mark.parametrize("prediction", ["velocity", "data", "noise"])
def test_du_dt_goes_through_the_division(prediction):
    """Of the exact flow map, predicted in any way: u = v - (t - r) du/dt, and du/dt is its
    difference quotient along the path."""
    gaussian, t, r = Gaussian(interpolant=LINEAR), T[1:3], T[1:3] / 2

    def flow_map(x_t, t):
        u = gaussian.flow_map(x_t, t, r, None)
        end = {"velocity": u, "data": x_t - column(t) * u, "noise": x_t + column(1 - t) * u}
        return velocity_of(kind(prediction), end[prediction], x_t, t)

    v, h = gaussian.velocity(X[1:3], t), 1e-2
    u, du_dt = jax.jvp(flow_map, (X[1:3], t), (v, jnp.ones_like(t)))
    np.testing.assert_allclose(u, v - column(t - r) * du_dt, atol=1e-4)
    ahead, behind = (flow_map(X[1:3] + sign * h * v, t + sign * h) for sign in (1, -1))
    np.testing.assert_allclose(du_dt, (ahead - behind) / (2 * h), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("path", [LINEAR, ScaledLinear(noise_scale=3.0)])
def test_losses_regress_on_the_velocity_at_which_sampling_starts(path):
    network = DiT(**TINY, prediction="noise")
    draws = Draws(NOISE, T, T, jnp.zeros(4, bool))
    sample = path_sample(path, network, Batch(X, jnp.zeros(4, jnp.int32)), draws)
    np.testing.assert_array_equal(sample.v_t, path.velocity(X, NOISE, T))
    with pytest.raises(InputError, match=r"^model.prediction=noise: \(noise - x_t\) / \(1 - t\) "):
        path_sample(COSINE, network, Batch(X, jnp.zeros(4, jnp.int32)), draws)


def linear_transformer(module, variables, *inputs, method="__call__"):
    """In place of the transformer: `encode` gives tokens 2 x_t, and what is predicted of u is
    tokens + t - 3 r, of v its half."""
    if method == "encode":
        return 2 * inputs[0]
    first, t, r, *_ = inputs
    tokens = first if method in ("decode", "decode_heads") else 2 * first
    u = tokens + column(t - 3 * r)
    return {"decode_heads": (u, u / 2), "with_features": (u, u[:, 0])}.get(method, u)


@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_every_output_of_a_dit_is_a_velocity(prediction, monkeypatch):
    """Also the derivative through `encode` and `decode`, with which du/dt is computed."""
    monkeypatch.setattr(Transformer, "apply", linear_transformer)
    network = DiT(**TINY, prediction=prediction, conditioning="meanflow", velocity_head=True,
                  head_depth=1, alignment_depth=1)  # fmt: skip
    y, r = jnp.zeros(4, jnp.int32), T / 2

    def expected(share, x_t, t, r):
        predicted = share * (2 * x_t + column(t - 3 * r))
        if prediction == "data":
            return (x_t - predicted) / column(jnp.maximum(t, 0.05))
        return (predicted - x_t) / column(jnp.maximum(1 - t, 0.05))

    u, v = expected(1.0, X, T, r), expected(0.5, X, T, r)
    np.testing.assert_allclose(network.apply({}, X, T, r, y), u, rtol=1e-5)
    np.testing.assert_allclose(network.apply_with_features({}, X, T, r, y)[0], u, rtol=1e-5)
    for found, value in zip(network.apply_heads({}, X, T, r, y), (u, v), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(
        network.velocity({}, X, T, y), expected(0.5, X, T, T), rtol=1e-5, atol=1e-6
    )
    sample = PathSample(X, NOISE, T, r, ClassLabels(y, 3), jnp.zeros(4, bool))
    du_dt = jax.jvp(lambda x, t: expected(1.0, x, t, r), (X, T), (NOISE, jnp.ones(4)))[1]
    found = shared_encoder_jvp(
        network, {}, sample, GuidedVelocity(NOISE, None), MeanFlow().tangent
    )
    np.testing.assert_allclose(found[2], du_dt, rtol=1e-4, atol=1e-3)


NETWORKS = {
    "meanflow": DiT(**TINY, conditioning="meanflow"),
    "decoupled": DiT(**TINY, conditioning="decoupled", split_depth=1),
    "in_context": InContextDiT(**TINY, conditioning="decoupled", split_depth=1, head_depth=1,
                               velocity_head=False),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_shared_encoder_changes_no_value(name, prediction):
    """u, du/dt and the gradient of the loss, with and without compute sharing, and du/dt as a
    central difference."""
    network = dataclasses.replace(NETWORKS[name], prediction=prediction)
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * draw(leaf.shape), "f"), abstract_params(network)
    )
    batch = Batch(X[1:3], jnp.asarray([0, 2], jnp.int32))
    draws = Draws(NOISE[1:3], T[1:3], T[1:3] / 2, jnp.zeros(2, bool))

    @gv.jit
    def run(params):
        results = []
        for sharing in (ComputeSharing(), ComputeSharing(enabled=False)):
            objective = MeanFlow(weighting=UniformWeighting(), compute_sharing=sharing)
            sample = path_sample(LINEAR, network, batch, draws)
            guided = GuidedVelocity(sample.v_t, None)
            gradient = jax.grad(
                lambda params, objective=objective: objective.loss(
                    network, params, batch, draws, {})[0].mean()
            )(params)
            outputs = average_velocity(objective, network, params, sample, guided)
            results.append((outputs, gradient))
        x_t, v, t, r = sample.x_t, sample.v_t, sample.t, sample.r
        ahead, behind = (network.apply(params, x_t + s * v, t + s, r, sample.y)
                         for s in (5e-3, -5e-3))
        return results, (ahead - behind) / 1e-2

    (shared, plain), difference = run(params)
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max() + 1e-6))
    du_dt = plain[0][2]
    assert np.linalg.norm(du_dt - difference) < 0.02 * np.linalg.norm(du_dt)


@pytest.mark.parametrize("fields", [
    {"prediction": "score"}, {"min_time": 0.0, "prediction": "noise"},
    {"min_time": 1.5, "prediction": "data"}, {"min_time": 0.1},
])  # fmt: skip
def test_what_is_no_prediction_is_named(fields):
    name = next(iter(fields))
    for make, others in ((DiT, {}), (InContextDiT, {"head_depth": 1})):
        with pytest.raises(InputError, match=f"^{name}={fields[name]}: "):
            make(**TINY, **others, **fields)


def test_a_checkpoint_keeps_what_its_network_predicts(tmp_path):
    stored = get_config()
    stored.model.update({"prediction": "noise", "min_time": 0.1})
    (tmp_path / "config.json").write_text(json.dumps({"format": 2, **stored.to_dict()}))
    for field, value in (("prediction", "data"), ("min_time", 0.05)):
        config = load.read_config(tmp_path)
        config.model[field] = value
        with pytest.raises(InputError, match=f"^model.{field}={value}: the network of .* trained"):
            load.load_network(tmp_path, config=config)
    given = get_config()
    given.init.checkpoint = str(tmp_path)
    taken, _ = inherit(given, ())
    assert (taken.model.prediction, taken.model.min_time) == ("noise", 0.1)
    with pytest.raises(InputError, match="^model.prediction=velocity: init.checkpoint=.* noise;"):
        check_same(given)
