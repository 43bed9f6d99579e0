"""alpha-Flow by its formulas: targets and weights, its limits, Gaussian data, and the schedule."""

import dataclasses
import functools

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gaussian_data import Gaussian, GaussianMap
from two_layers import TwoLayers

from configs import default
from dmf import registry
from dmf.errors import InputError
from dmf.models.dit import DiT
from dmf.objectives import (
    LINEAR,
    AlphaFlow,
    MeanFlow,
    SelfGuidance,
    Tangent,
    TeacherGuidance,
    UniformWeighting,
)
from dmf.objectives.alpha_flow import AlphaFlowDraws
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.objectives.path_sample import Draws
from dmf.runtime.sharding import batch_sharding, make_mesh
from dmf.training import build
from dmf.types import Batch

NETWORK = TwoLayers(side=2)
SHARED = AlphaFlow(guidance=SelfGuidance(omega=1.5, kappa=0.3), last_step=9)
PLAIN = dataclasses.replace(SHARED, compute_sharing=ComputeSharing(enabled=False))
# r = t in one row; the label is dropped in two.
T = jnp.asarray([0.3, 0.9, 0.83, 0.5, 0.95, 0.7, 0.6, 0.85])
R = jnp.asarray([0.1, 0.2, 0.4, 0.5, 0.1, 0.6, 0.2, 0.0])
DROPPED = jnp.arange(8) >= 6


def column(values):
    return jnp.asarray(values)[:, None, None, None]


def inputs(dtype=jnp.float64, network=NETWORK) -> tuple[dict, Batch, Draws]:
    """Parameters, a batch and MeanFlow's draws."""
    keys = jax.random.split(jax.random.key(3), 2)
    x, noise = (jax.random.normal(key, (8, *network.sample_shape), dtype) for key in keys)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), network.init(jax.random.key(7)))
    draws = Draws(noise, T.astype(dtype), R.astype(dtype), DROPPED)
    return params, Batch(x, jnp.arange(8, dtype=jnp.int32)), draws


def with_alpha(draws: Draws, alpha) -> AlphaFlowDraws:
    return AlphaFlowDraws(draws, jnp.full(len(draws.t), alpha, draws.t.dtype))


def loss_and_gradient(objective, network, params, batch, draws):
    """The [b] losses, and the gradient of their mean as one vector, by one compiled program."""
    def mean(params):
        losses, metrics = objective.loss(network, params, batch, draws, {})
        return losses.mean(), (losses, metrics)

    gradient, (losses, metrics) = jax.grad(mean, has_aux=True)(params)
    leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(gradient)]
    return losses, jnp.concatenate(leaves), metrics


def paper_loss(params, batch, draws, alpha, clip):
    """The weighted loss of the paper, alpha m / sg(m + c): of the sum m of squares, and with
    alpha^2 c where the paper has c."""
    u, sg = functools.partial(NETWORK.apply, params), jax.lax.stop_gradient
    noise, t, r, dropped = draws[:4]
    y, null = jnp.where(dropped, 10, batch.y), jnp.full(8, 10)
    x_t, v = (1 - column(t)) * batch.x + column(t) * noise, noise - batch.x
    guided = 1.5 * v + 0.3 * u(x_t, t, t, y) - 0.8 * u(x_t, t, t, null)
    v_g = sg(jnp.where(column(dropped), v, guided))
    alpha = jnp.where(r < t, alpha, 1.0)
    s = t - alpha * (t - r)
    x_s = x_t - column(t - s) * v_g
    target = column(alpha) * v_g + column(1 - alpha) * u(x_s, s, r, y)
    target = jnp.where(column(r < t), jnp.clip(target, -clip, clip), target)
    square = jnp.sum((u(x_t, t, r, y) - sg(target)) ** 2, axis=(1, 2, 3))
    return alpha * square / sg(square + alpha**2 * 0.01)


def test_one_program_has_the_gradient_of_the_paper_for_every_alpha_and_is_mean_flow_for_none():
    with jax.enable_x64(True):
        params, batch, draws = inputs()
        mean_flow = MeanFlow(guidance=SHARED.guidance, compute_sharing=PLAIN.compute_sharing)
        clipped = dataclasses.replace(SHARED, clip=0.8)

        @gv.jit
        def found(alpha):
            return [loss_and_gradient(each, NETWORK, params, batch, with_alpha(draws, alpha))
                    for each in (SHARED, PLAIN, clipped)]

        @gv.jit
        def papers(alpha):
            return [jax.grad(lambda p: paper_loss(p, batch, draws, alpha, clip).mean())(params)
                    for clip in (jnp.inf, jnp.inf, 0.8)]

        for alpha in (0.1, 0.5, 1.0):
            for (losses, gradient, _), each in zip(found(alpha), papers(alpha), strict=True):
                expected = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each)])
                np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)
                assert (losses > 0.5).all()
        assert jnp.abs(gradient - found(1.0)[0][1]).max() > 1e-3  # values are clipped

        limit = gv.jit(functools.partial(loss_and_gradient, mean_flow, NETWORK))(
            params, batch, draws
        )
        for losses, gradient, metrics in found(0.0):
            np.testing.assert_allclose(losses, limit[0], rtol=1e-12)
            np.testing.assert_allclose(gradient, limit[1], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(metrics["mean_flow_error"], limit[2]["mean_flow_error"])
            np.testing.assert_array_equal(metrics["alpha"], np.zeros(8))
        # Of first order: at half the alpha, half the distance.
        errors = [np.concatenate(found(alpha)[0][:2]) - np.concatenate(limit[:2])
                  for alpha in (1e-3, 5e-4)]
        assert np.abs(errors[0][8:]).max() > 1e-6
        np.testing.assert_allclose(errors[0], 2 * errors[1], rtol=0.02, atol=1e-8)
        # Where r = t nothing is divided by alpha.
        error = found(1e-5)[0][2]["mean_flow_error"][3]
        np.testing.assert_allclose(error, limit[2]["mean_flow_error"][3], rtol=1e-13)
        assert found._cache_size() == 1


def gaussian_gradients(network, alpha):
    """The gradients of the loss at points x_t where the velocities of the data are v + w, v - w and
    v, and the losses of the last."""
    _, batch, draws = inputs()
    gaussian = network.gaussian
    x_t, t, objective = batch.x, draws.t, AlphaFlow(weighting=UniformWeighting(), last_step=9)
    v, offset = gaussian.velocity(x_t, t), 0.5 * draws.noise

    def at(velocity):
        data = Batch(x_t - column(t) * velocity, jnp.zeros(8, jnp.int32))
        noise = x_t + (1 - column(t)) * velocity
        rows = with_alpha(draws._replace(noise=noise, dropped=DROPPED & False), alpha)
        losses, gradient, _ = loss_and_gradient(
            objective, network, {"u": jnp.float64(1)}, data, rows
        )
        return gradient[0], losses

    gradients, losses = jax.vmap(at)(jnp.stack([v + offset, v - offset, v]))
    return gradients, losses[2]


def test_the_gradient_vanishes_on_gaussian_data_at_the_map_that_alpha_leads_to():
    """At the exact flow map for alpha = 0, at Euler's method for others. The error of the exact
    flow map is of first order in alpha."""
    with jax.enable_x64(True):
        gaussian = Gaussian(interpolant=LINEAR)
        exact = gv.jit(functools.partial(gaussian_gradients, GaussianMap(gaussian)))
        first, second, _ = exact(0.0)[0]
        assert abs(first) > 1e-3
        np.testing.assert_allclose(first + second, 0, atol=1e-12)
        np.testing.assert_allclose(exact(0.0)[1], 0, atol=1e-24)
        (_, _, biased), error = exact(2e-3)
        assert abs(biased) > 1e-6
        # A square of errors.
        np.testing.assert_allclose(error, 4 * exact(1e-3)[1], rtol=0.02, atol=1e-20)
        euler = gv.jit(functools.partial(gaussian_gradients, GaussianMap(gaussian, 0.3)))
        (first, second, _), error = euler(0.3)
        assert abs(first) > 1e-3
        np.testing.assert_allclose(first + second, 0, atol=1e-12)
        np.testing.assert_allclose(error, 0, atol=1e-20)


def test_alpha_falls_over_the_schedule():
    objective = AlphaFlow(first_step=600, last_step=1000)
    steps = np.asarray([0, 600, 700, 780, 800, 884, 886, 1000, 2000])
    x = 25 * (steps - 800) / 400
    expected = 1 / (1 + np.exp(x))
    expected = np.where(expected < 0.005, 0, np.where(expected > 0.995, 1, expected))
    found = gv.jit(objective.alpha)(jnp.asarray(steps))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[1] == 1 > expected[3] and expected[-4] > 0 == expected[-3]
    assert objective.alpha(None) == 0
    assert AlphaFlow(constant_alpha=0.3).alpha(jnp.int32(5)) == np.float32(0.3)
    batch = Batch(jnp.zeros((8, 1, 1, 1)), jnp.zeros(8, jnp.int32))
    mean_flow = MeanFlow(time_pair=objective.time_pair)
    draws, of_mean_flow = gv.jit(lambda key: [
        objective.draw(key, batch, jnp.int32(780)), mean_flow.draw(key, batch)
    ])(jax.random.key(0))
    np.testing.assert_allclose(draws.alpha, np.full(8, expected[3]), rtol=1e-5)
    np.testing.assert_array_equal(draws.mean_flow.noise, of_mean_flow.noise)
    np.testing.assert_array_equal(draws.mean_flow.t, of_mean_flow.t)


def recipe(objective):
    config = tiny.config({"run.steps": 70, "model.conditioning": "meanflow"},
                         objective=default.component(objective))
    return build.recipe(config, make_mesh(devices=jax.devices()[:1]))


def test_a_run_gives_the_schedule_its_length():
    assert recipe(AlphaFlow()).objective.last_step == 70
    assert recipe(AlphaFlow(last_step=30)).objective.last_step == 30
    constant = AlphaFlow(constant_alpha=0.0, tangent=Tangent(warmup_steps=9))
    assert recipe(constant).objective == constant
    assert registry.build("objective", registry.to_config(constant)) == constant


@pytest.mark.parametrize(("make", "message"), [
    (lambda: AlphaFlow(constant_alpha=1.5), r"^constant_alpha=1\.5: give 0, or a number from"),
    (lambda: AlphaFlow(constant_alpha=1e-7), r"^constant_alpha=1e-07: "),
    (lambda: AlphaFlow(constant_alpha=0.5, last_step=9), r"^last_step=9: constant_alpha=0\.5 "),
    (lambda: AlphaFlow(constant_alpha=0.5, first_step=9), r"^first_step=9: constant_alpha=0\.5 "),
    (lambda: AlphaFlow(constant_alpha=0.0, clip=4.0), r"^clip=4\.0: constant_alpha=0 has no"),
    (lambda: AlphaFlow(constant_alpha=0.5, tangent=Tangent(max_rms=1.0)),
     r"^constant_alpha=0\.5: settings of the tangent"),
    (lambda: AlphaFlow(constant_alpha=1.0, tangent=Tangent(velocity="predicted")),
     r"^constant_alpha=1\.0: settings of the tangent"),
    (lambda: AlphaFlow(clip=-1.0), r"^clip=-1\.0: give a number from 0\.0 to"),
    (lambda: AlphaFlow(first_step=9, last_step=9), r"^first_step=9: the schedule of alpha must"),
    (lambda: AlphaFlow(last_step=-1), r"^last_step=-1: "),
    (lambda: AlphaFlow(tangent=Tangent(warmup_steps=9)),
     r"^tangent\.warmup_steps=9: du/dt enters at .* leave it 0, or give constant_alpha=0$"),
    (lambda: recipe(AlphaFlow(first_step=80)), r"^objective\.first_step=80: .* at step 70$"),
    (lambda: AlphaFlow().alpha(3), r"^last_step=0: give the training step .* alpha reaches 0"),
    (lambda: AlphaFlow(guidance=TeacherGuidance()), r"^guidance\.name=teacher: AlphaFlow guides"),
])  # fmt: skip
def test_invalid_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("velocity", ["guided", "predicted"])
@pytest.mark.parametrize("conditioning", ["meanflow", "decoupled"])
def test_sharing_changes_nothing_for_a_transformer(conditioning, velocity):
    split = {"split_depth": 1} if conditioning == "decoupled" else {}
    network = DiT(input_size=4, patch_size=2, channels=1, num_classes=10, depth=2, width=32,
                  heads=2, conditioning=conditioning, **split)
    tangent = Tangent(velocity=velocity)
    _, batch, draws = inputs(jnp.float32, network)
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * draw(leaf.shape), "f"),
                          jax.eval_shape(network.init, jax.random.key(0)))
    mean_flow = MeanFlow(guidance=PLAIN.guidance, tangent=tangent)

    def gradient(objective):
        return jax.jit(functools.partial(
            loss_and_gradient, dataclasses.replace(objective, tangent=tangent), network
        ))

    shared, plain = gradient(SHARED), gradient(PLAIN)
    for alpha in (0.0, 0.01, 0.5, 1.0):
        expected, found = (each(params, batch, with_alpha(draws, alpha))
                           for each in (plain, shared))
        if alpha == 0:
            expected = gradient(mean_flow)(params, batch, draws)
        scale = np.abs(expected[1]).max()
        assert scale > 1e-3
        for one, other in zip(found[:2], expected[:2], strict=True):
            # u - u(x_s, s, r) is divided by alpha.
            np.testing.assert_allclose(one, other, atol=1e-4 * scale / max(alpha, 0.1), rtol=2e-3)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh():
    params, *rows = inputs(jnp.float32)
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])

    def loss(batch, draws):
        return SHARED.loss(NETWORK, params, batch, draws, {})[0]

    def sharded(batch, draws):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return loss(batch, draws)

    batch, draws = rows
    for alpha in (0.0, 0.5, 1.0):
        inputs_ = batch, with_alpha(draws, alpha)
        split = jax.jit(sharded)(*jax.device_put(inputs_, batch_sharding(mesh)))
        assert not split.is_fully_replicated
        np.testing.assert_allclose(split, jax.jit(loss)(*inputs_), rtol=1e-4)
