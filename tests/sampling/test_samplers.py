"""Samplers on Gaussian data, whose exact flow map and moments are known, and their schedules."""

import functools

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_data import Gaussian

from dmf.errors import InputError
from dmf.objectives import COSINE, LINEAR, ScaledLinear
from dmf.objectives.time_samplers import shift_times
from dmf.sampling import (
    AdamsBashforth,
    ConsistencyTrajectory,
    Euler,
    EulerMaruyama,
    Heun,
    Restart,
    Sampler,
)
from dmf.sampling.samplers import noise_like, sample, uniform_schedule
from dmf.types import ClassLabels

PATHS = {"linear": LINEAR, "cosine": COSINE}
over_paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
MANY = (512, 8, 8, 4)


def start(shape: tuple[int, ...] = (3, 2, 2, 1)) -> tuple[jax.Array, jax.Array]:
    return jax.random.normal(jax.random.key(0), shape), jnp.zeros(shape[0], jnp.int32)


def fresh(shape: tuple[int, ...], index: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(1), index), shape)


def samples(gaussian: Gaussian, sampler, steps: int, shape=MANY, flow_map=None) -> jax.Array:
    z, y = start(shape)
    return gv.jit(
        lambda z: sample(
            flow_map or gaussian.flow_map,
            z,
            y,
            steps=steps,
            sampler=sampler,
            step_noise=functools.partial(fresh, shape),
        )
    )(z)


def assert_moments(x: jax.Array, gaussian: Gaussian, tolerance: float) -> None:
    """Compares mean and standard deviation of 131,072 values, whose standard errors are 0.0011 and
    0.0008."""
    np.testing.assert_allclose(x.mean(), gaussian.mean, atol=tolerance)
    np.testing.assert_allclose(x.std(), gaussian.std, atol=tolerance)


@over_paths
@pytest.mark.parametrize("steps", [1, 5])
def test_euler_is_exact_for_an_exact_flow_map(path, steps):
    gaussian = Gaussian(interpolant=path)
    z, y = start()
    exact = gaussian.carried(z, jnp.ones(3), jnp.zeros(3))
    x = sample(gaussian.flow_map, z, y, steps=steps, shift=1.5)
    np.testing.assert_allclose(x, exact, atol=1e-5)


def test_a_path_to_scaled_noise_starts_and_restarts_from_such_noise():
    gaussian = Gaussian(interpolant=ScaledLinear(noise_scale=3.0))
    for kind, steps in ((Euler, 1), (Restart, 2)):
        sampler = kind(interpolant=gaussian.interpolant)
        assert_moments(samples(gaussian, sampler, steps), gaussian, 0.005)


class UnequalSteps(AdamsBashforth):
    """Steps that are alternately short and twice as long; the formula for equal steps is of first
    order there."""

    def schedule(self, steps, shift):
        lengths = jnp.where(jnp.arange(steps) % 2, 2.0, 1.0)
        ends = jnp.cumsum(lengths) / lengths.sum()
        return 1 - jnp.concatenate([jnp.zeros(1), ends])


@over_paths
@pytest.mark.parametrize(
    ("sampler", "order"),
    [pytest.param(Euler(), 1, marks=pytest.mark.slow), (Heun(), 2), (AdamsBashforth(), 2),
     (UnequalSteps(), 2)],
    ids=["euler", "heun", "adams_bashforth", "unequal_steps"],
)
def test_order_of_convergence_on_a_flow_model(path, sampler, order):
    """log(error) falls along log(steps) with the slope -order."""
    counts = np.asarray([16, 48, 128])
    with jax.enable_x64(True):
        gaussian = Gaussian(interpolant=path)
        z, y = start()
        exact = gaussian.carried(z, jnp.ones(3), jnp.zeros(3))
        generate = functools.partial(sample, gaussian.flow_model, z, y, sampler=sampler)
        errors = [jnp.linalg.norm(generate(steps=int(n)) - exact) for n in counts]
        slope = np.polyfit(np.log(counts), np.log(np.asarray(errors)), 1)[0]
    assert abs(slope + order) < 0.1


@over_paths
@pytest.mark.parametrize(
    "kind", [Restart, ConsistencyTrajectory, functools.partial(ConsistencyTrajectory, gamma=0.9)]
)
def test_fresh_noise_keeps_the_moments_of_the_data(path, kind):
    gaussian = Gaussian(interpolant=path)
    assert_moments(samples(gaussian, kind(interpolant=path), 4), gaussian, 0.004)


@over_paths
@pytest.mark.parametrize("kind", [Restart, ConsistencyTrajectory])
def test_one_step_keeps_the_moments_of_the_path(path, kind):
    gaussian = Gaussian(interpolant=path)
    z, y = start(MANY)
    t, t_next = jnp.float32(1.0), jnp.float32(0.6)
    sampler = kind(interpolant=path)
    x, _ = sampler.step(gaussian.flow_map, z, t, t_next, y, fresh(MANY, 0), sampler.init(z))
    np.testing.assert_allclose(x.mean(), gaussian.mean_at(t_next), atol=0.008)
    np.testing.assert_allclose(x.std(), gaussian.std_at(t_next), atol=0.006)


@pytest.mark.parametrize("path", [
    pytest.param(LINEAR, id="linear", marks=pytest.mark.slow),
    pytest.param(COSINE, id="cosine", marks=pytest.mark.slow),
])
def test_diffusion_approaches_the_moments_of_the_data(path):
    gaussian = Gaussian(interpolant=path)
    x = samples(gaussian, EulerMaruyama(interpolant=path), 200, flow_map=gaussian.flow_model)
    assert_moments(x, gaussian, 0.02)


@over_paths
def test_diffusion_does_not_follow_the_starting_noise(path):
    gaussian = Gaussian(interpolant=path)
    shape = (64, 4, 4, 1)
    z, y = start(shape)
    followed = sample(gaussian.flow_model, z, y, steps=50)
    diffused = samples(
        gaussian, EulerMaruyama(interpolant=path), 50, shape=shape, flow_map=gaussian.flow_model
    )
    correlation = [np.corrcoef(x.ravel(), z.ravel())[0, 1] for x in (followed, diffused)]
    assert correlation[0] > 0.999
    assert correlation[1] < 0.8


@over_paths
@pytest.mark.parametrize(("gamma", "limit"), [(0.0, Euler), (1.0, Restart)])
def test_limits_of_the_fraction_of_fresh_noise(path, gamma, limit):
    gaussian, shape = Gaussian(interpolant=path), (3, 2, 2, 1)
    sampler = limit() if limit is Euler else limit(interpolant=path)
    x = samples(gaussian, ConsistencyTrajectory(gamma=gamma, interpolant=path), 4, shape)
    np.testing.assert_allclose(x, samples(gaussian, sampler, 4, shape), atol=1e-3)


def test_last_step_adds_no_noise():
    """The samples lie on the data, which is a single point here."""
    point = Gaussian(interpolant=LINEAR, std=0.0)
    for sampler in (Restart(), ConsistencyTrajectory()):
        x = samples(point, sampler, 3, (3, 2, 2, 1))
        np.testing.assert_allclose(x, point.mean, atol=1e-6)


@pytest.mark.parametrize("sampler", [Restart(), ConsistencyTrajectory(), EulerMaruyama()],
                         ids=lambda value: type(value).__name__)
def test_the_last_step_does_not_depend_on_its_noise(sampler):
    gaussian = Gaussian(interpolant=LINEAR)
    x, y = start()
    t, t_next, noise = jnp.float32(0.5), jnp.float32(0.0), fresh(x.shape, 0)
    ends = [sampler.step(gaussian.flow_map, x, t, t_next, y, factor * noise, ())[0]
            for factor in (0.0, 1.0)]
    np.testing.assert_array_equal(*ends)


def test_loop_applies_the_step_along_the_schedule():
    """The noise of a step follows from its index, so that every step has its own."""
    gaussian, sampler, shape = Gaussian(interpolant=LINEAR), Restart(), (3, 2, 2, 1)
    x, y = start(shape)
    schedule = sampler.schedule(4, 1.5)
    for i in range(4):
        inputs = (schedule[i], schedule[i + 1], y, fresh(shape, i), ())
        x, _ = sampler.step(gaussian.flow_map, x, *inputs)
    z, _ = start(shape)
    by_loop = sample(
        gaussian.flow_map,
        z,
        y,
        steps=4,
        sampler=sampler,
        shift=1.5,
        step_noise=functools.partial(fresh, shape),
    )
    np.testing.assert_allclose(by_loop, x, atol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [(Euler(), 3), (Heun(), 5), (Restart(), 3), (ConsistencyTrajectory(), 3), (EulerMaruyama(), 3),
     (AdamsBashforth(), 3)],
    ids=lambda value: type(value).__name__,
)
def test_cost_in_calls_of_the_network(sampler, calls):
    """The compiled program makes no call that a step does not need."""
    times = []

    def counted(x_t, t, r, y):
        jax.debug.callback(lambda t: times.append(float(t[0])), t)
        return x_t

    z, y = start()
    step_noise = functools.partial(fresh, z.shape)
    jax.jit(lambda z: sample(counted, z, y, steps=3, sampler=sampler, step_noise=step_noise))(z)
    jax.effects_barrier()
    assert len(times) == calls


@pytest.mark.parametrize("shift", [1.0, 3.0], ids=["equal_steps", "unequal_steps"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_adams_bashforth_is_exact_for_constant_velocity(steps, shift):
    z, y = start()
    velocity = jax.random.normal(jax.random.key(4), z.shape)
    x = sample(lambda x_t, t, r, y: velocity, z, y, steps=steps, sampler=AdamsBashforth(),
               shift=shift)
    np.testing.assert_allclose(x, z - velocity, atol=1e-6)


def test_adams_bashforth_is_exact_for_linear_velocity_after_its_first_step():
    """v(t) = t leads from x to x - 1/2; the first step, from 1 to t_1, is Euler and goes too far by
    (1 - t_1)^2 / 2. A formula for equal steps would be exact for shift=1 alone."""
    z, y = start()
    for shift in (1.0, 2.5):
        t_1 = float(shift_times(jnp.float32(0.8), shift))
        x = sample(lambda x_t, t, r, y: jnp.broadcast_to(t[:, None, None, None], x_t.shape), z, y,
                   steps=5, sampler=AdamsBashforth(), shift=shift)
        np.testing.assert_allclose(x, z - 0.5 - (1 - t_1) ** 2 / 2, atol=1e-6)


class Momentum(Sampler):
    """A sampler whose carry counts its steps and sums the velocities."""

    def init(self, x):
        return jnp.zeros((), jnp.int32), jnp.zeros_like(x)

    def step(self, flow_map, x, t, t_next, y, noise, carry):
        count, total = carry
        ts = jnp.broadcast_to(t, x.shape[:1])
        total += flow_map(x, ts, ts, y)
        return x + (t_next - t) * total / (count + 1), (count + 1, total)


def test_the_carry_of_a_step_is_given_to_the_next():
    z, y = start()
    x = sample(lambda x_t, t, r, y: jnp.broadcast_to(t[:, None, None, None], x_t.shape), z, y,
               steps=2, sampler=Momentum())
    np.testing.assert_allclose(x, z - 0.5 * 1 - 0.5 * (1 + 0.5) / 2, atol=1e-6)


def test_schedule_of_the_diffusion_ends_with_a_short_step():
    schedule = np.asarray(EulerMaruyama().schedule(5, 1.0))
    np.testing.assert_allclose(schedule[[0, -2, -1]], [1, 1e-4, 0], rtol=1e-5)
    np.testing.assert_allclose(np.diff(schedule[:-1]), (1e-4 - 1) / 4, rtol=1e-5)


@pytest.mark.parametrize("sampler", [Euler(), Heun(), AdamsBashforth()],
                         ids=lambda value: type(value).__name__)
def test_state_is_float32_for_a_bfloat16_network(sampler):
    def coarse(x_t, t, r, y):
        assert x_t.dtype == jnp.float32
        return x_t.astype(jnp.bfloat16)

    z, y = start()
    x = sample(coarse, z.astype(jnp.bfloat16), y, steps=2, sampler=sampler)
    assert x.dtype == jnp.float32


def test_noise_of_a_row_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(5), 4)
    noise = noise_like(keys, (2, 3, 1))
    assert noise.shape == (4, 2, 3, 1)
    np.testing.assert_array_equal(noise[2:3], noise_like(keys[2:3], (2, 3, 1)))
    assert len(np.unique(noise)) == noise.size


def test_schedule_is_equally_spaced_from_noise_to_data():
    np.testing.assert_allclose(uniform_schedule(4), [1, 0.75, 0.5, 0.25, 0], atol=1e-7)


@pytest.mark.parametrize("shift", [0.5, 1.5, 3.0])
def test_shift_multiplies_the_odds_of_noise(shift):
    t = uniform_schedule(8, shift)[1:-1]
    plain = uniform_schedule(8)[1:-1]
    np.testing.assert_allclose(t / (1 - t), shift * plain / (1 - plain), rtol=1e-5)
    assert shift_times(jnp.asarray([0.0, 1.0]), shift).tolist() == [0.0, 1.0]


def test_invalid_values_are_named():
    z, y = start()
    for make, message in (
        (lambda: sample(lambda x, t, r, y: x, z, y, sampler=Restart()), r"^step_noise=None: Res"),
        (lambda: sample(lambda x, t, r, y: x, z, y, steps=0), r"^steps=0: "),
        (lambda: sample(lambda x, t, r, y: x, z, y[:1]), "^y: it has 1 conditions, and noise has"),
        (lambda: sample(lambda x, t, r, y: x, z, ClassLabels(y[:1], 10)), "^y: it has 1 cond"),
        (lambda: EulerMaruyama().schedule(1, 1.0), r"^steps=1: "),
        (lambda: uniform_schedule(0), r"^steps=0: "),
        (lambda: uniform_schedule(4, -1.0), r"^shift=-1\.0: "),
        (lambda: uniform_schedule(4, float("nan")), "^shift=nan: "),
        (lambda: ConsistencyTrajectory(gamma=1.5), r"^gamma=1\.5: "),
        *((lambda last=last: EulerMaruyama(last_time=last),
           f"^last_time={last}: give a number from 1e-06 to 0.99") for last in (0.0, -0.1, 1.0)),
    ):
        with pytest.raises(InputError, match=message):
            make()


def test_a_trajectory_holds_x_at_each_time_of_the_schedule():
    noise, y = start()
    halving = functools.partial(sample, lambda x, t, r, y: x, noise, y, steps=2, shift=3.0)
    trajectory = halving(trajectory=True)
    # The times are 1, 3/4 and 0, and each step multiplies x by 1 + t_next - t.
    expected = jnp.stack([noise, 0.75 * noise, 0.1875 * noise])
    np.testing.assert_allclose(trajectory, expected, rtol=1e-6)
    np.testing.assert_array_equal(trajectory[-1], halving())


def test_a_sampler_may_be_named():
    noise, y = start()
    curved = functools.partial(sample, lambda x, t, r, y: x**2, noise, y, steps=2)
    np.testing.assert_array_equal(curved(sampler="heun"), curved(sampler=Heun()))
    with pytest.raises(InputError, match=r"^sampler=heunn: choose one of adams_bashforth, ctm, "):
        curved(sampler="heunn")
