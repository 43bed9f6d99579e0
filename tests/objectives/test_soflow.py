"""SoFlow by its formulas: the gradient without divisions, Gaussian data, schedule, guidance."""

import dataclasses
import functools
from typing import Any

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gaussian_data import Gaussian, GaussianMap
from two_layers import TwoLayers

from configs import default
from dmf.errors import InputError
from dmf.objectives import (
    LINEAR,
    CauchyWeighting,
    MeanFlow,
    SelfGuidance,
    SoFlow,
    TeacherGuidance,
    UniformWeighting,
)
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.objectives.guidance import GuidedVelocity
from dmf.objectives.mean_flow import average_velocity
from dmf.objectives.path_sample import Draws, PathSample
from dmf.objectives.soflow import SoFlowDraws, average_velocity_and_target
from dmf.runtime.sharding import make_mesh
from dmf.training import build
from dmf.types import Batch, ClassLabels

NETWORK = TwoLayers(side=2)
PUBLISHED = SelfGuidance(omega=0.75, kappa=0.75, decay_start=0.8)
PLAIN = ComputeSharing(enabled=False, unconditional_microbatches=0)
# Rows in turn are trained by flow matching and by consistency: before and in the decay of the
# guidance, and with the label dropped.
T = jnp.asarray([0.3, 0.9, 0.83, 0.5, 0.95, 0.7, 0.6, 0.85])
R = jnp.asarray([0.1, 0.2, 0.4, 0.0, 0.1, 0.6, 0.2, 0.8])
RATIO = jnp.asarray([0.1, 0.1, 0.1, 0.02, 0.1, 1.0, 0.1, 0.002])
DROPPED = jnp.arange(8) >= 6


def column(values):
    return jnp.asarray(values)[:, None, None, None]


def draws_of(noise, t, r, dropped, ratio) -> SoFlowDraws:
    return SoFlowDraws(Draws(noise, t, t, dropped), Draws(noise, t, r, dropped), ratio)


def inputs(dtype: Any = jnp.float32) -> tuple[dict, Batch, SoFlowDraws]:
    """Parameters, a batch and draws; times with ratios that halve the batch."""
    keys = jax.random.split(jax.random.key(3), 2)
    x, noise = (jax.random.normal(key, (8, 2, 2, 1), dtype) for key in keys)
    cast = functools.partial(jnp.asarray, dtype=dtype)
    draws = draws_of(noise, cast(T), cast(R), DROPPED, cast(RATIO))
    params = jax.tree.map(cast, NETWORK.init(jax.random.key(7)))
    return params, Batch(x, jnp.arange(8, dtype=jnp.int32)), draws


def paper_losses(params, batch, draws):
    """The losses as the paper has them, by f(x, t, s) and with divisions by times; and the loss
    whose gradient is computed without them."""
    noise, t, s, dropped = draws.consistency[:4]
    u, sg = functools.partial(NETWORK.apply, params), jax.lax.stop_gradient
    y, null = jnp.where(dropped, 10, batch.y), jnp.full(8, 10)
    x_t, v = (1 - column(t)) * batch.x + column(t) * noise, noise - batch.x
    z = (1 - t) / 0.2
    d = jnp.where(t <= 0.8, 1.0, 1 - jnp.exp(-0.025 * z / jnp.where(t <= 0.8, 1.0, 1 - z)))
    guided = 0.25 * (v + column(d) * 2 * (v - u(x_t, t, t, null))) + 0.75 * u(x_t, t, t, y)
    v_g = sg(jnp.where(column(dropped), v, guided))

    def f(u, x, t):
        return x + column(s - t) * u(x, t, s, y)

    later = t + (s - t) * draws.ratio
    x_l = x_t + column(later - t) * v_g
    difference = f(u, x_t, t) - sg(f(u, x_l, later))
    q = difference / column(t - later)
    weight = 1 / sg(jnp.sum(q**2, axis=(1, 2, 3)) + 0.01)
    divided = weight * jnp.sum(difference**2, axis=(1, 2, 3)) / ((t - later) * (t - s))
    product = jnp.sum(u(x_t, t, s, y) * sg(q * column(weight)), axis=(1, 2, 3))
    error = jnp.sum((u(x_t, t, t, y) - v_g) ** 2, axis=(1, 2, 3))
    velocity = error / sg(error + 0.01)
    value = weight * jnp.sum(q**2, axis=(1, 2, 3))
    return velocity, value, divided, 2 * jnp.sign(s - t) * product


def test_the_gradient_is_that_of_the_divided_form_and_the_loss_is_the_weighted_error():
    with jax.enable_x64(True):
        params, batch, draws = inputs(jnp.float64)
        consistency = jnp.arange(8) % 2 == 1

        def means(params):
            """Of the divided form, of the form without divisions, and of ours."""
            velocity, value, *forms = paper_losses(params, batch, draws)
            expected = [jnp.where(consistency, form, velocity) for form in forms]
            losses, metrics = SoFlow(guidance=PUBLISHED, consistency_share=0.5).loss(
                NETWORK, params, batch, draws, {}
            )
            values = jnp.where(consistency, value, velocity)
            return jnp.mean(jnp.stack([*expected, losses]), axis=1), (values, losses, metrics)

        gradients, (values, losses, metrics) = gv.jit(jax.jacrev(means, has_aux=True))(params)
        first, *others = np.concatenate([np.reshape(leaf, (3, -1)) for leaf in
                                         jax.tree.leaves(gradients)], axis=1)  # fmt: skip
        assert np.abs(first).max() > 0.01
        for other in others:
            np.testing.assert_allclose(other, first, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(losses, values, rtol=1e-9)
        assert metrics["flow_matching_error"].shape == (4,)
        np.testing.assert_array_equal(metrics["consistency_ratio"], RATIO[1::2])


def gaussian_sample(gaussian: Gaussian) -> PathSample:
    """Points at times as above, with the marginal velocity."""
    x_t = jax.random.normal(jax.random.key(0), (8, 2, 2, 1), jnp.float64)
    t, r = T.astype(jnp.float64), R.astype(jnp.float64)
    labels = ClassLabels(jnp.zeros(8, jnp.int32), 0)
    return PathSample(x_t, gaussian.velocity(x_t, t), t, r, labels, jnp.zeros(8, bool))


def residual(network, sample, ratio, params=None) -> jax.Array:
    """q: the target minus u."""
    ratio = jnp.broadcast_to(jnp.asarray(ratio, sample.t.dtype), sample.t.shape)
    params = network.init(jax.random.key(0)) if params is None else params
    guided = GuidedVelocity(sample.v_t, None)
    u, target = average_velocity_and_target(SoFlow(), network, params, sample, guided, ratio)
    return target - u


def test_the_error_of_the_exact_flow_map_is_that_of_one_euler_step():
    """q = (x_l* - x_l) / (t - l) carried to r, where x_l* lies on the path of x_t: of first order
    in rho, and 0 where the paths are straight lines."""
    with jax.enable_x64(True):
        def errors(std, ratio):
            """q of the exact flow map, and what one step of Euler's method gives."""
            gaussian = Gaussian(interpolant=LINEAR, std=std)
            sample = gaussian_sample(gaussian)
            x_t, v, t, r = sample[:4]
            later = t - ratio * (t - r)
            missed = gaussian.carried(x_t, t, later) - (x_t - column(t - later) * v)
            carried = column(gaussian.std_at(r) / gaussian.std_at(later)) * missed
            return residual(GaussianMap(gaussian), sample, ratio), carried / column(t - later)

        stds, ratios = jnp.asarray([0.4, 0.4, 0.4, 0.0]), jnp.asarray([0.1, 1e-3, 1e-4, 0.1])
        found, expected = gv.jit(jax.vmap(errors))(stds, ratios)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        assert jnp.abs(found[0]).max() > 1e-2
        np.testing.assert_allclose(found[1], 10 * found[2], rtol=2e-3, atol=1e-9)
        np.testing.assert_allclose(found[3], 0, atol=1e-12)


def test_the_gradient_vanishes_where_each_point_of_a_path_is_carried_to_one_end():
    """Both losses, with velocities of the data and not of their mean: v +- w for each point x_t.
    What SoFlow learns at a fixed rho is Euler's method, which tends to the flow map with rho."""
    with jax.enable_x64(True):
        gaussian, ratio = Gaussian(interpolant=LINEAR), 0.1
        network, sample = GaussianMap(gaussian, ratio), gaussian_sample(gaussian)
        objective = SoFlow(weighting=UniformWeighting(), consistency_share=0.5)

        def mean_loss(params, sign):
            x_t, v, t, r = sample[:4]
            each = v + sign * jax.random.normal(jax.random.key(1), x_t.shape, jnp.float64)
            batch = Batch(x_t - column(t) * each, jnp.zeros(8, jnp.int32))
            noise, ratios = x_t + (1 - column(t)) * each, jnp.full(8, ratio, jnp.float64)
            draws = draws_of(noise, t, r, jnp.zeros(8, bool), ratios)
            return objective.loss(network, params, batch, draws, {})[0].mean()

        gradients = jax.vmap(jax.grad(mean_loss), in_axes=(None, 0))
        found = gv.jit(gradients)(network.init(jax.random.key(0)), jnp.asarray([1.0, -1.0]))["u"]
        assert abs(found[0]) > 1e-4
        np.testing.assert_allclose(found.sum(), 0, atol=1e-12)
        times = sample.x_t, sample.t, sample.r, None
        far = gv.jit(lambda: [
            jnp.abs(GaussianMap(gaussian, rho).apply({"u": 1.0}, *times)
                    - gaussian.flow_map(*times)).max() for rho in (0.2, 0.1)
        ])()
        assert 1.8 < far[0] / far[1] < 2.2


def test_the_target_tends_to_that_of_mean_flow():
    with jax.enable_x64(True):
        params, batch, _ = inputs(jnp.float64)
        gaussian = gaussian_sample(Gaussian(interpolant=LINEAR))
        sample = gaussian._replace(y=NETWORK.condition(batch.y))

        def distances(params):
            guided = GuidedVelocity(sample.v_t, None)
            plain = MeanFlow(compute_sharing=ComputeSharing(enabled=False))
            u, v_g, du_dt = average_velocity(plain, NETWORK, params, sample, guided)
            error = v_g - column(sample.t - sample.r) * du_dt - u
            return [residual(NETWORK, sample, rho, params) - error for rho in (1e-3, 1e-4)]

        first, second = gv.jit(distances)(params)
        assert jnp.abs(first).max() > 1e-3
        np.testing.assert_allclose(first, 10 * second, rtol=0.05, atol=1e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoForwardMode(TwoLayers):
    """A network as one that only has kernels for the forward and the backward pass."""

    def apply(self, params, x_t, t, r, y):
        @jax.custom_vjp
        def kernel(params, x_t):
            return TwoLayers.apply(self, params, x_t, t, r, y)

        def backward(inputs, cotangent):
            return jax.vjp(lambda *p: TwoLayers.apply(self, *p, t, r, y), *inputs)[1](cotangent)

        kernel.defvjp(lambda *inputs: (kernel(*inputs), inputs), backward)
        return kernel(params, x_t)


def test_the_network_is_never_differentiated_forwards():
    params, batch, draws = inputs()
    network = NoForwardMode(side=2)

    def gradient(objective, draws):
        return jax.eval_shape(jax.grad(
            lambda params: objective.loss(network, params, batch, draws, {})[0].mean()
        ), params)

    assert set(gradient(SoFlow(guidance=PUBLISHED), draws)) == set(params)
    # The network can tell: MeanFlow's derivative is refused.
    with pytest.raises(NotImplementedError, match="rule for 'custom_lin' not implemented"):
        gradient(MeanFlow(compute_sharing=PLAIN), draws.consistency)


def test_every_error_has_its_bins_and_its_log_variance():
    objective = SoFlow(guidance=PUBLISHED, weighting=CauchyWeighting(), time_bins=2)
    params, batch, draws = inputs()
    loss = gv.jit(lambda batch, draws: objective.loss(NETWORK, params, batch, draws, {}))
    losses, metrics = loss(batch, draws)
    assert losses.shape == (8,)
    for name, r in (("flow_matching", T), ("consistency", R)):
        part = jnp.arange(8) % 4 == 3 if name == "consistency" else jnp.arange(8) % 4 < 3
        phi = NETWORK.log_variance(params, T, r)[part]
        np.testing.assert_allclose(metrics[f"{name}_log_variance"], phi, rtol=1e-5)
    for name, shape in (("flow_matching", (6, 2, 2)), ("consistency", (2, 2, 2, 2))):
        bins = metrics[f"{name}_error_bins"]
        assert bins.shape == shape
        summed = bins[:, 0].sum(tuple(range(1, bins.ndim - 1)))
        np.testing.assert_allclose(summed, metrics[f"{name}_error"], rtol=1e-6)


def test_draws_have_the_ratio_of_the_step_and_times_of_their_own():
    objective = SoFlow(last_step=100)
    batch = Batch(jnp.zeros((4000, 1, 1, 1)), jnp.zeros(4000, jnp.int32))
    draw = gv.jit(objective.draw)
    for step, ratio in ((0, 0.1), (50, 0.1 * 0.02**0.5), (100, 0.002), (1000, 0.002)):
        found = draw(jax.random.key(0), batch, jnp.int32(step)).ratio
        np.testing.assert_allclose(found, np.full(4000, ratio), rtol=1e-5)
    velocity, consistency, _ = draw(jax.random.key(0), batch, jnp.int32(0))
    assert SoFlow().ratio(None) == np.float32(0.002)
    np.testing.assert_array_equal(velocity.t, velocity.r)
    assert (consistency.r < consistency.t).all()
    assert abs(np.corrcoef(velocity.t, consistency.t)[0, 1]) < 0.06
    assert abs(velocity.dropped.mean() - 0.1) < 0.02


def test_a_run_gives_the_schedule_its_length():
    def built(objective):
        config = tiny.config({"run.steps": 70, "model.conditioning": "meanflow"},
                             objective=default.component(objective))
        return build.recipe(config, make_mesh(devices=jax.devices()[:1])).objective.last_step

    assert built(SoFlow()) == 70
    assert built(SoFlow(last_step=30)) == 30


def test_published_guidance_decays_smoothly_and_ends_without_guidance():
    t = jnp.asarray([0.1, 0.8, 0.82, 0.9, 1.0, 0.9])
    omega, kappa = gv.jit(PUBLISHED.coefficients)(t, jnp.arange(6) == 5)
    d = np.asarray([1, 1, 1 - np.exp(-0.025 * 9), 1 - np.exp(-0.025), 0])
    np.testing.assert_allclose(omega[:5], 0.25 * (1 + 2 * d), rtol=1e-4)
    np.testing.assert_array_equal(kappa, [0.75] * 5 + [0])
    assert omega[5] == 1


def six_rows():
    params, batch, draws = inputs()
    rows = jax.tree.map(lambda rows: rows[:6], (batch, draws))
    SoFlow().loss(NETWORK, params, *rows, {})


@pytest.mark.parametrize(("make", "message"), [
    (six_rows, r"^objective\.consistency_share=0\.25: .* 6 samples"),
    (lambda: SoFlow(consistency_share=1.0), r"^consistency_share=1\.0: "),
    (lambda: SoFlow(first_ratio=0.0), r"^first_ratio=0\.0: give a number from 1e-05 to 1"),
    (lambda: SoFlow(last_ratio=1.5), r"^last_ratio=1\.5: "),
    (lambda: SoFlow(last_step=-1), r"^last_step=-1: "),
    (lambda: SoFlow().ratio(3), r"^last_step=0: give the training step .*last_ratio=0\.002"),
    (lambda: SoFlow(label_dropout=2.0), r"^label_dropout=2\.0: "),
    (lambda: SoFlow(guidance=TeacherGuidance()), r"^guidance\.name=teacher: SoFlow guides itself"),
    (lambda: SelfGuidance(decay_start=0.8), r"^decay_start=0\.8: .* is 1 already"),
    (lambda: SelfGuidance(omega=2.0, decay_start=0.8, interval=(0.1, 0.8)),
     r"^decay_start=0\.8: no time in the interval \(0\.1, 0\.8\) is later"),
    (lambda: SelfGuidance(omega=2.0, decay_start=1.5), r"^decay_start=1\.5: "),
])  # fmt: skip
def test_invalid_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
