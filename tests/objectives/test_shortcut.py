"""Shortcut models by their formula: steps, targets, parts of the batch, and the exact flow map."""

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
from dmf.objectives import LINEAR, AlphaFlow, Shortcut, TeacherGuidance
from dmf.objectives.alpha_flow import average_velocity_and_target
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.objectives.guidance import GuidedVelocity
from dmf.objectives.path_sample import Draws, FlowMapDraws, PathSample
from dmf.objectives.shortcut import draw_steps, self_consistency_loss, step_and_target
from dmf.types import Batch, ClassLabels, Flops

# Steps of all lengths; the last one is the shortest of 8.
T, R = np.asarray([1.0, 0.5, 1.0, 0.75, 0.25]), np.asarray([0.0, 0.0, 0.5, 0.5, 0.0])
SHORTCUT = Shortcut(shortest_steps=8, compute_sharing=ComputeSharing(enabled=False))


@dataclasses.dataclass(frozen=True)
class Exact(SimpleNetwork):
    """The flow map of Gaussian data times a parameter, which is 1; or its velocity, whatever r."""

    gaussian: Gaussian = Gaussian(interpolant=LINEAR)
    flow_map: bool = True
    num_classes = 0
    sample_shape = (2, 2, 1)
    flops = Flops(encode=0.0, decode=0.0)

    def init(self, key):
        return {"scale": np.ones(())}

    def apply(self, params, x_t, t, r, y):
        u = self.gaussian.flow_map if self.flow_map else self.gaussian.flow_model
        return params["scale"] * u(x_t, t, r, y)


def sample_of(t, r):
    x_t = np.random.default_rng(0).standard_normal((len(t), 2, 2, 1))
    labels = ClassLabels(np.zeros(len(t), np.int32), 0)
    sample = PathSample(x_t, x_t, t, r, labels, np.zeros(len(t), bool))
    return jax.tree.map(jnp.asarray, sample)


def test_the_exact_flow_map_is_a_fixed_point():
    """Two exact steps are one: no error and no gradient; but for the shortest step, whose halves
    are velocities."""
    with jax.enable_x64(True):
        sample = sample_of(T, R)

        def losses(params):
            fixed = jax.lax.stop_gradient(params)
            both = [self_consistency_loss(objective, Exact(), params, fixed, sample)[0]
                    for objective in (SHORTCUT, dataclasses.replace(SHORTCUT, shortest_steps=128))]
            return both, both

        (_, gradient), (coarse, fine) = gv.jit(jax.jacrev(losses, has_aux=True))(Exact().init(None))
        np.testing.assert_allclose(fine, 0, atol=1e-20)
        np.testing.assert_allclose(gradient["scale"], 0, atol=1e-9)
        assert (coarse > 1e-8).tolist() == [False, False, False, True, True]


def test_a_half_step_along_the_velocity_is_alpha_flow_with_alpha_one_half():
    """alpha-Flow's target alpha v + (1 - alpha) u(x_s, s, r) with x_s = x_t - alpha (t - r) v,
    where the first half of a shortcut is along v."""
    with jax.enable_x64(True):
        network, sample, alpha = Exact(flow_map=False), sample_of(T, R), 0.5
        params, objective = network.init(None), AlphaFlow(constant_alpha=alpha)

        @gv.jit
        def targets(sample):
            v = GuidedVelocity(network.gaussian.velocity(sample.x_t, sample.t), None)
            inputs = network, params, sample
            u, target = average_velocity_and_target(objective, *inputs, v, jnp.full(len(T), alpha))
            # The regression is on u - (u - target of the paper) / alpha.
            shortcut = step_and_target(SHORTCUT, network, params, *inputs[1:])[1]
            return u - alpha * (u - target), shortcut

        expected, target = targets(sample)
        np.testing.assert_allclose(target, expected, rtol=1e-12)


NETWORK = TwoLayers(side=4)
PARAMS = NETWORK.init(jax.random.key(7))
EMA = jax.tree.map(lambda leaf: 0.9 * leaf, PARAMS)
X, NOISE = np.random.default_rng(0).standard_normal((2, 8, 4, 4, 1)).astype("f")
BATCH = jax.tree.map(jnp.asarray, Batch(X, np.arange(8, dtype=np.int32)))
STARTS, DROPPED = np.linspace(0.1, 0.9, 8, dtype="f"), np.arange(8) % 3 == 0
# Of the rows that are trained as steps, one has the shortest step of 8, and one a longer step.
ENDS = np.float32([0, 0, 0, 0.75, 0, 0, 0, 1.0]), np.float32([0, 0, 0, 0.5, 0, 0, 0, 0.5])
DRAWS = jax.tree.map(jnp.asarray, FlowMapDraws(
    flow_matching=Draws(NOISE, STARTS, STARTS, DROPPED),
    flow_map=Draws(NOISE, *ENDS, DROPPED),
))


def formula(params, fixed=None):
    """[8] mean squared errors: of every four rows the last one is a step, with a target of `fixed`
    parameters, or of the parameters without gradient."""
    def u(x_t, t, r, params=params):
        return NETWORK.apply(params, x_t, t, r, jnp.where(DROPPED, 10, BATCH.y))

    fixed = fixed or jax.lax.stop_gradient(params)
    t, (end, r) = STARTS, ENDS
    column = (slice(None), None, None, None)
    x_t = (1 - t[column]) * X + t[column] * NOISE
    flow_matching = u(x_t, t, t) - (NOISE - X)
    x_t = (1 - end[column]) * X + end[column] * NOISE
    s = (end + r) / 2
    shortest = end - r == 1 / 4
    first = u(x_t, end, jnp.where(shortest, end, s), fixed)
    second = u(x_t - (end - s)[column] * first, s, jnp.where(shortest, s, r), fixed)
    step = u(x_t, end, r) - (first + second) / 2
    error = jnp.where((jnp.arange(8) % 4 == 3)[column], step, flow_matching)
    return jnp.mean(error**2, axis=(1, 2, 3))


@pytest.fixture(scope="module")
def computed():
    """Losses and the gradient of their mean by the formula, by the objective with and without
    sharing, as the sum of its terms, and by formula and objective with the targets of an EMA."""
    shared = dataclasses.replace(SHORTCUT, compute_sharing=ComputeSharing())

    of_ema = dataclasses.replace(shared, target_ema="main")

    def loss_of(objective, frozen=None):
        return lambda params: objective.loss(NETWORK, params, BATCH, DRAWS, frozen or {})[0]

    def terms(params):
        terms = shared.terms(NETWORK, params, BATCH, DRAWS, {})
        means = [term.weight * jnp.mean(term.loss(params, *term.inputs)[0]) for term in terms]
        return jnp.full(8, sum(means))

    losses = (formula, loss_of(SHORTCUT), loss_of(shared), terms,
              lambda params: formula(params, EMA), loss_of(of_ema, {"target": EMA}))

    def both(loss, params):
        gradient = jax.grad(lambda params: jnp.mean(loss(params)))(params)
        return loss(params), jnp.concatenate([g.ravel() for g in jax.tree.leaves(gradient)])

    return gv.jit(lambda params: [both(loss, params) for loss in losses])(PARAMS)


@pytest.mark.parametrize(("found", "expected"), [(1, 0), (2, 0), (5, 4)],
                         ids=["plain", "shared", "ema"])
def test_the_loss_is_its_formula_in_the_order_of_the_rows(computed, found, expected):
    np.testing.assert_allclose(computed[found][0], computed[expected][0], rtol=1e-5)
    gv.assert_near(computed[found][1], computed[expected][1], 1e-5)
    apart = computed[4][0] != computed[0][0]
    np.testing.assert_array_equal(apart, np.arange(8) % 4 == 3)


def test_the_terms_have_the_weights_of_their_shares(computed):
    np.testing.assert_allclose(computed[3][0][0], np.mean(computed[0][0]), rtol=1e-5)
    gv.assert_near(computed[3][1], computed[0][1], 1e-5)


def test_steps_have_every_length_with_equal_probability():
    drawn = gv.jit(draw_steps, static_argnums=(1, 2))(jax.random.key(0), 20_000, 128)
    t, r = map(np.asarray, drawn)
    lengths, counts = np.unique(t - r, return_counts=True)
    np.testing.assert_array_equal(lengths, 2.0 ** np.arange(-6, 1))
    assert abs(counts / 20_000 - 1 / 7).max() < 0.01
    np.testing.assert_array_equal(t % (t - r), 0)
    assert r.min() == 0 and t.max() == 1
    quarter = t[t - r == 0.25]
    assert abs(np.mean(quarter) - 0.625) < 0.02


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Shortcut(shortest_steps=100), r"^shortest_steps=100: give a power of two"),
    (lambda: Shortcut(shortest_steps=1), r"^shortest_steps=1: "),
    (lambda: Shortcut(self_consistency_share=0.0), r"^self_consistency_share=0\.0: "),
    (lambda: Shortcut(guidance=TeacherGuidance()), r"^guidance\.name=teacher: Shortcut guides"),
    (lambda: Shortcut(label_dropout=2.0), r"^label_dropout=2\.0: "),
    (lambda: Shortcut(self_consistency_share=0.3).loss(
        NETWORK, PARAMS, BATCH, DRAWS, {}),
     r"^objective\.self_consistency_share=0\.3: .* 8 samples"),
])  # fmt: skip
def test_invalid_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
