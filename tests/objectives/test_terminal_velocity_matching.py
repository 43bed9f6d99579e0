"""Terminal velocity matching by its formula, its gradient, and the exact flow map."""

import dataclasses

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_data import Gaussian
from two_layers import TwoLayers

from dmf.errors import InputError
from dmf.models.simple_network import SimpleNetwork
from dmf.objectives import (
    COSINE,
    LINEAR,
    SelfGuidance,
    TeacherGuidance,
    TerminalVelocityMatching,
)
from dmf.objectives.path_sample import Draws, FlowMapDraws, PathSample
from dmf.objectives.terminal_velocity_matching import terminal_velocity_loss
from dmf.types import Batch, ClassLabels, Flops

OBJECTIVE = TerminalVelocityMatching()
T, R = np.asarray([0.9, 0.5, 1.0, 0.3, 0.6]), np.asarray([0.1, 0.4, 0.0, 0.3, 0.2])


@dataclasses.dataclass(frozen=True)
class Exact(SimpleNetwork):
    """The flow map of Gaussian data, with a parameter of its size, 1."""

    gaussian: Gaussian
    num_classes = 0
    sample_shape = (2, 2, 1)
    flops = Flops(encode=0.0, decode=0.0)

    def init(self, key):
        return {"scale": np.ones(())}

    def apply(self, params, x_t, t, r, y):
        return params["scale"] * self.gaussian.flow_map(x_t, t, r, y)


@pytest.mark.parametrize("path", [
    LINEAR, pytest.param(COSINE, marks=pytest.mark.slow)
], ids=["linear", "cosine"])
def test_the_exact_flow_map_is_a_fixed_point(path):
    """Whatever the data are that x_t was made of: the loss at r < t sees x_t alone."""
    with jax.enable_x64(True):
        network = Exact(Gaussian(interpolant=path))
        x_t, y = np.random.default_rng(0).standard_normal((5, 2, 2, 1)), np.zeros(5, np.int32)
        sample = jax.tree.map(jnp.asarray, PathSample(
            x_t, 0 * x_t, T, R, ClassLabels(y, 0), np.zeros(5, bool)
        ))

        @gv.jit
        def values(params):
            def loss(params):
                losses, metrics = terminal_velocity_loss(
                    OBJECTIVE, network, params, jax.lax.stop_gradient(params), sample
                )
                return losses, (losses, metrics["du_dr_norm"])

            return jax.jacrev(loss, has_aux=True)(params)

        gradient, (losses, norm) = values(network.init(None))
        np.testing.assert_allclose(losses, 0, atol=1e-20)
        np.testing.assert_allclose(gradient["scale"], 0, atol=1e-9)
        assert (norm[R < T] > 0.01).all()


NETWORK = TwoLayers(side=4)
PARAMS = NETWORK.init(jax.random.key(7))
X, NOISE = np.random.default_rng(0).standard_normal((2, 5, 4, 4, 1)).astype("f")
BATCH = jax.tree.map(jnp.asarray, Batch(X, np.arange(5, dtype=np.int32)))
DROPPED = np.arange(5) == 0
DRAWS = FlowMapDraws(Draws(NOISE, T[::-1], T[::-1], DROPPED), Draws(NOISE, T, R, DROPPED))


def formula(params, fixed=None, kappa=0.0, step=1e-2):
    """[5] losses with omega = 2 and a kappa, and du/dr by a central difference of fourth order;
    targets are computed with `fixed` parameters, or with the parameters without gradient."""
    labels = jnp.where(DROPPED, 10, BATCH.y)
    column = (slice(None), None, None, None)

    def u(x_t, t, r, params=params, labels=labels):
        return NETWORK.apply(params, x_t, t, r, labels)

    own, t = jax.lax.stop_gradient(params), T[::-1]
    fixed = fixed or own
    x_t, v_t = (1 - t[column]) * BATCH.x + t[column] * NOISE, NOISE - BATCH.x
    null = u(x_t, t, t, fixed, jnp.full(5, 10))
    guided = 2 * v_t + kappa * u(x_t, t, t, fixed) - (1 + kappa) * null
    v_g = jnp.where(DROPPED[column], v_t, guided)
    flow_matching = u(x_t, t, t) - v_g
    x_t = (1 - T[column]) * BATCH.x + T[column] * NOISE
    near, far = ((u(x_t, T, R + h) - u(x_t, T, R - h)) / (2 * h) for h in (step, 2 * step))
    du_dr = (4 * near - far) / 3
    length = (T - R)[column]
    x_r = x_t - length * u(x_t, T, R, own)
    terminal = u(x_t, T, R) - length * du_dr - u(x_r, R, R, fixed)
    squares = flow_matching**2 + jnp.where((R < T)[column], terminal**2, 0)
    return jnp.mean(squares, axis=(1, 2, 3))


def test_the_loss_and_its_gradient_are_those_of_the_formula():
    objective = TerminalVelocityMatching(guidance=SelfGuidance(omega=2.0))
    detached = dataclasses.replace(objective, differentiate_tangent=False)

    def values(loss, params):
        gradient = jax.grad(lambda params: jnp.mean(loss(params)))(params)
        return loss(params), jnp.concatenate([g.ravel() for g in jax.tree.leaves(gradient)])

    of_ema = dataclasses.replace(objective, target_ema="main",
                                 guidance=SelfGuidance(omega=2.0, kappa=0.4))

    def loss_of(objective, frozen=None):
        return lambda params: objective.loss(
            NETWORK, params, BATCH, jax.tree.map(jnp.asarray, DRAWS), frozen or {}
        )[0]

    ema = jax.tree.map(lambda leaf: 0.9 * leaf, PARAMS)
    losses = (formula, loss_of(objective), loss_of(detached),
              lambda params: formula(params, ema, 0.4), loss_of(of_ema, {"target": ema}))
    with jax.enable_x64(True):
        expected, found, other, *both = gv.jit(lambda params: [values(f, params) for f in losses])(
            jax.tree.map(lambda leaf: leaf.astype(jnp.float64), PARAMS)
        )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(other[0], expected[0], rtol=1e-5)
    gv.assert_near(found[1], expected[1], 1e-5)
    for of_formula, of_objective in zip(both[0], both[1], strict=True):
        gv.assert_near(of_objective, of_formula, 1e-5)
    assert (both[0][0] != expected[0]).all()
    apart = np.linalg.norm(other[1] - expected[1]) / np.linalg.norm(expected[1])
    assert apart > 0.01, "without the derivative of du/dr the gradient is another one"


@pytest.mark.slow
def test_a_sample_draws_a_time_and_a_jump_for_the_same_noise():
    flow_matching, jump = gv.jit(OBJECTIVE.draw)(jax.random.key(0), BATCH)
    np.testing.assert_array_equal(flow_matching.noise, jump.noise)
    assert (flow_matching.t == flow_matching.r).all() and (jump.r < jump.t).all()
    assert (flow_matching.t != jump.r).all() and (flow_matching.t != jump.t).all()


def test_a_teacher_is_refused():
    with pytest.raises(InputError, match=r"^guidance\.name=teacher: TerminalVelocityMatching "):
        TerminalVelocityMatching(guidance=TeacherGuidance())
