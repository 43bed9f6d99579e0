"""The derivative du/dt: its velocity, central differences, bounds, and its warm-up."""

import dataclasses
import functools

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network
from small_network import NETWORK, PARAMS

from configs import default
from dmf.errors import InputError
from dmf.objectives import (
    DecoupledMeanFlow,
    MeanFlow,
    SelfGuidance,
    Tangent,
    TeacherGuidance,
    UniformWeighting,
)
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.training import loop, metrics_writer
from dmf.types import Batch

GUIDED = SelfGuidance(omega=1.2, kappa=0.3, interval=(0.0, 0.8))
DU_DT = jax.random.normal(jax.random.key(0), (4, 2, 2, 3)) * jnp.asarray([0, 0.1, 1, 30])[
    :, None, None, None
]


def drawn(network, objective, count: int = 4, step=None):
    x_key, y_key = jax.random.split(jax.random.key(5))
    batch = Batch(jax.random.normal(x_key, (count, *network.sample_shape)),
                  jax.random.randint(y_key, (count,), 0, 10))
    step = None if step is None else jnp.asarray(step)
    return batch, objective.draw(jax.random.key(1), batch, step)


def mean_and_gradient(objective, count: int = 4):
    """Metrics of each sample, and the gradient of the mean loss as one vector."""
    network, params = NETWORK, PARAMS
    batch, draws = drawn(network, objective, count)

    def mean(params):
        losses, metrics = objective.loss(network, params, batch, draws, {})
        return jnp.mean(losses), metrics

    gradient, metrics = gv.jit(jax.grad(mean, has_aux=True))(params)
    return metrics, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])


def test_a_central_difference_agrees_with_the_derivative():
    """The two agree in du/dt, in the error, and in the gradient."""
    exact = DecoupledMeanFlow(guidance=GUIDED, label_dropout=0.3)
    differing = dataclasses.replace(exact, tangent=Tangent(finite_difference=3e-3))
    (metrics, gradient), (metrics_2, gradient_2) = map(mean_and_gradient, (exact, differing))
    for name in ("du_dt_norm", "mean_flow_error"):
        np.testing.assert_allclose(metrics_2[name], metrics[name], rtol=1e-3)
    assert np.linalg.norm(gradient_2 - gradient) < 1e-3 * np.linalg.norm(gradient)
    assert (metrics_2["du_dt_norm"] != metrics["du_dt_norm"]).any()


@pytest.mark.parametrize(
    ("guidance", "sharing"),
    [(GUIDED, ComputeSharing()), (SelfGuidance(), ComputeSharing(enabled=False))],
    ids=["guided_shared", "unguided_plain"],
)
def test_improved_mean_flow_regresses_its_velocity_on_the_guided_one(guidance, sharing):
    """V = u + (t - r) sg(du/dt), with d/dt along u(x_t, t, t, y), against v_g, all by hand."""
    network, params = NETWORK, PARAMS
    objective = MeanFlow(
        guidance=guidance, tangent=Tangent(velocity="predicted"), weighting=UniformWeighting(),
        label_dropout=0.3, compute_sharing=sharing,
    )  # fmt: skip
    batch, draws = drawn(network, objective)
    t, r = draws.t, jnp.minimum(draws.r, 0.7 * draws.t)
    draws = draws._replace(r=r)
    column = lambda v: v[:, None, None, None]  # noqa: E731
    y = jnp.where(draws.dropped, network.num_classes, batch.y)
    x_t, v_t = (1 - column(t)) * batch.x + column(t) * draws.noise, draws.noise - batch.x

    def by_hand(params):
        conditional = network.apply(params, x_t, t, t, y)
        null = network.apply(params, x_t, t, t, jnp.full_like(y, network.num_classes))
        active = (t <= guidance.interval[1]) & ~draws.dropped
        omega = column(jnp.where(active, guidance.omega, 1.0))
        kappa = column(jnp.where(active, guidance.kappa, 0.0))
        v_g = omega * v_t + kappa * conditional + (1 - omega - kappa) * null
        u, du_dt = jax.jvp(lambda x, t: network.apply(params, x, t, r, y), (x_t, t),
                           (conditional, jnp.ones_like(t)))
        velocity = u + column(t - r) * jax.lax.stop_gradient(du_dt)
        return jnp.mean((velocity - jax.lax.stop_gradient(v_g)) ** 2, axis=(1, 2, 3))

    def by_objective(params):
        return objective.loss(network, params, batch, draws, {})[0]

    values, gradients = zip(*(
        gv.jit(lambda p, f=f: (f(p), jax.grad(lambda p: jnp.mean(f(p)))(p)))(params)
        for f in (by_hand, by_objective)
    ), strict=True)
    np.testing.assert_allclose(values[1], values[0], rtol=1e-4)
    whole, other = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
                    for tree in gradients)
    assert np.linalg.norm(other - whole) < 1e-5 * np.linalg.norm(whole)


def test_with_a_teacher_the_predicted_velocity_is_the_student_s():
    network, params = NETWORK, PARAMS
    norms = {}
    for velocity in ("guided", "predicted"):
        objective = DecoupledMeanFlow(
            guidance=TeacherGuidance(scale=1.0), teacher=network,
            tangent=Tangent(velocity=velocity),
        )  # fmt: skip
        batch, draws = drawn(network, objective)
        for name, factor in (("same", 1.0), ("other", 1.1)):
            teacher = jax.tree.map(lambda p, factor=factor: factor * p, params)
            _, metrics = gv.jit(objective.loss, static_argnums=0)(
                network, params, batch, draws, {"teacher": teacher}
            )
            norms[velocity, name] = metrics["du_dt_norm"]
    # The velocities of a teacher that is the student are the same. Another teacher changes the
    # guided velocity alone.
    np.testing.assert_allclose(norms["predicted", "same"], norms["guided", "same"], rtol=1e-4)
    np.testing.assert_array_equal(norms["predicted", "same"], norms["predicted", "other"])
    assert (norms["guided", "same"] != norms["guided", "other"]).all()


def test_bounds_of_the_derivative():
    size = np.sqrt(np.mean(np.asarray(DU_DT) ** 2, axis=(1, 2, 3), keepdims=True))
    np.testing.assert_array_equal(Tangent().bound(DU_DT, None), DU_DT)
    cut = np.asarray(Tangent(max_rms=0.5).bound(DU_DT, None))
    np.testing.assert_allclose(cut[:2], DU_DT[:2], rtol=1e-6)
    np.testing.assert_allclose(cut[2:], 0.5 * DU_DT[2:] / size[2:], rtol=1e-5)
    np.testing.assert_allclose(
        Tangent(normalization=0.1).bound(DU_DT, None), DU_DT / (size + 0.1), rtol=1e-5
    )
    half = jnp.asarray([0.5, 0.5, 1.0, 0.0])
    np.testing.assert_allclose(
        Tangent().bound(DU_DT, half), half[:, None, None, None] * DU_DT, rtol=1e-6
    )


def test_warm_up_of_the_derivative():
    """The target is the guided velocity at step 0, contains half of du/dt half-way, and is that of
    MeanFlow after the warm-up."""
    warming = DecoupledMeanFlow(tangent=Tangent(warmup_steps=10))
    network, params = NETWORK, PARAMS
    metrics = gv.jit(lambda *inputs: warming.loss(network, params, *inputs, {})[1])
    batch, draws = drawn(network, DecoupledMeanFlow())
    noise, t, r, dropped, *_ = draws.mean_flow
    y = jnp.where(dropped, network.num_classes, batch.y)
    column = lambda v: v[:, None, None, None]  # noqa: E731
    x_t, v_t = (1 - column(t)) * batch.x + column(t) * noise, noise - batch.x
    u, du_dt = gv.jit(functools.partial(
        jax.jvp, lambda x, t: network.apply(params, x, t, r, y)
    ))((x_t, t), (v_t, jnp.ones_like(t)))
    for step, weight in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        _, with_step = drawn(network, warming, step=step)
        np.testing.assert_array_equal(with_step.mean_flow.tangent_weight, [weight] * 4)
        error = np.mean((u - v_t - weight * column(r - t) * du_dt) ** 2, axis=(1, 2, 3))
        np.testing.assert_allclose(metrics(batch, with_step)["mean_flow_error"], error, rtol=1e-4)
    assert drawn(network, warming)[1].mean_flow.tangent_weight is None
    assert np.abs(column(r - t) * du_dt).max() > 0.1


@pytest.mark.slow
def test_warm_up_in_a_run(tmp_path):
    """The first step regresses on the velocity of the path alone, the second one on du/dt too."""
    fields = {"run.steps": 2, "run.log_every": 1, "run.checkpoint_every": 0}
    objective = default.component(DecoupledMeanFlow(
        tangent=Tangent(warmup_steps=2), weighting=UniformWeighting()
    ))
    with small_network.registered():
        loop.train(small_network.config(fields, objective=objective), tmp_path)
    first, second = metrics_writer.read_metrics(tmp_path)
    assert first["mean_flow_error"] == pytest.approx(first["velocity_error"], rel=1e-6)
    assert second["mean_flow_error"] != pytest.approx(second["velocity_error"], rel=1e-4)
    assert first["du_dt_norm"] > 0.01


@pytest.mark.parametrize(("fields", "message"), [
    ({"velocity": "along"}, "velocity=along: choose one of guided, predicted"),
    ({"finite_difference": -0.1}, "finite_difference=-0.1: give 0"),
    ({"finite_difference": 1e-9}, r"finite_difference=1e-09: give 0 \(none\), or at least 1e-05$"),
    ({"normalization": 1e-9}, r"normalization=1e-09: give 0 \(none\), or at least 1e-06$"),
    ({"max_rms": -1.0}, "max_rms=-1.0: give 0"),
    ({"normalization": float("nan")}, "normalization=nan: give 0"),
    ({"warmup_steps": -1}, "warmup_steps=-1: give 0"),
    ({"max_rms": 1.0, "normalization": 0.1}, "max_rms=1.0: .*normalization=0.1 .*set one"),
])  # fmt: skip
def test_invalid_fields_are_named(fields, message):
    with pytest.raises(InputError, match=f"^{message}"):
        Tangent(**fields)
