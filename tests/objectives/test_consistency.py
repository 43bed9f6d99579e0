"""Consistency training as MeanFlow at r = 0, and what holds for the exact consistency model."""

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
    Consistency,
    DrawnGuidance,
    LogitNormal,
    MeanFlow,
    NormalizedWeighting,
    OrderedPair,
    SelfGuidance,
    Tangent,
    ToData,
    UniformWeighting,
)
from dmf.objectives.guidance import GuidedVelocity
from dmf.objectives.mean_flow import mean_flow_loss
from dmf.objectives.path_sample import PathSample
from dmf.types import Batch, ClassLabels, Flops

NETWORK = TwoLayers(side=4)
PARAMS = NETWORK.init(jax.random.key(7))
X = np.random.default_rng(0).standard_normal((8, 4, 4, 1)).astype("f")
BATCH = jax.tree.map(jnp.asarray, Batch(X, np.arange(8, dtype=np.int32)))


def test_it_is_a_regression_on_the_normalized_tangent():
    """The gradient is that of |u - sg(u + g / (|g| + 0.1))|^2 with g = v_t - u - w t du/dt, in the
    middle of the warm-up w of du/dt."""
    objective = Consistency(tangent=Tangent(warmup_steps=10), label_dropout=0.0)
    draws = gv.jit(objective.draw)(jax.random.key(0), BATCH, 3)
    assert not draws.r.any() and draws.t.all()

    def formula(params):
        t = draws.t[:, None, None, None]
        x_t, v_t = (1 - t) * BATCH.x + t * draws.noise, draws.noise - BATCH.x

        def u_of(x_t, t):
            return NETWORK.apply(params, x_t, t, jnp.zeros(8), BATCH.y)

        u, du_dt = jax.jvp(u_of, (x_t, draws.t), (v_t, jnp.ones(8)))
        g = v_t - u - 0.3 * t * du_dt
        norm = jnp.sqrt(jnp.sum(g**2, axis=(1, 2, 3), keepdims=True))
        return jnp.sum((u - jax.lax.stop_gradient(u + g / (norm + 0.1))) ** 2) / 8

    def loss(params):
        return jnp.mean(objective.loss(NETWORK, params, BATCH, draws, {})[0])

    def mean_flow(params):
        other = MeanFlow(weighting=NormalizedWeighting())
        return jnp.mean(other.loss(NETWORK, params, BATCH, draws, {})[0])

    losses = loss, formula, mean_flow
    found, expected, same = gv.jit(lambda params: [jax.grad(f)(params) for f in losses])(PARAMS)
    for name in ("in", "out"):
        gv.assert_near(found[name], expected[name], 1e-5)
        gv.assert_near(found[name], same[name], 1e-6)


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
def test_the_exact_consistency_model_is_a_fixed_point(path):
    """Along the marginal velocity v there is no error. Along v + w and v - w, which Gaussian data
    have with equal probability given x_t, there are errors, and gradients that cancel."""
    with jax.enable_x64(True):
        network, t = Exact(Gaussian(interpolant=path)), jnp.asarray([0.9, 0.5, 1.0, 0.3] * 3)
        x_t, w = np.random.default_rng(0).standard_normal((2, 4, 2, 2, 1))
        x_t, added = np.tile(x_t, (3, 1, 1, 1)), np.concatenate([0 * w, w, -w])
        x_t, y = jnp.asarray(x_t), ClassLabels(jnp.asarray(np.zeros(12, np.int32)), 0)

        def losses(params):
            velocity = network.gaussian.velocity(x_t, t) + added
            sample = PathSample(x_t, velocity, t, jnp.zeros(12), y, jnp.zeros(12, bool))
            return [mean_flow_loss(Consistency(weighting=weighting), network, params, sample,
                                   GuidedVelocity(velocity, None))[0]
                    for weighting in (UniformWeighting(), NormalizedWeighting())]

        for gradient in gv.jit(jax.jacrev(losses))(network.init(None)):
            along, ahead, behind = gradient["scale"].reshape(3, 4)
            np.testing.assert_allclose(along, 0, atol=1e-9)
            assert (abs(ahead) > 1e-3).all()
            np.testing.assert_allclose(ahead + behind, 0, atol=1e-9)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Consistency(time_pair=OrderedPair(
        first=LogitNormal(), second=LogitNormal())), r"^time_pair\.name=OrderedPair: .*to_data"),
    (lambda: Consistency(guidance=SelfGuidance(omega=2.0)),
     r"^time_pair\.equal_probability=0\.0: .* such as 0\.25$"),
    (lambda: Consistency(guidance=DrawnGuidance()), r"^time_pair\.equal_probability=0\.0: "),
    (lambda: Consistency(tangent=Tangent(velocity="predicted")),
     r"^time_pair\.equal_probability=0\.0: "),
    (lambda: ToData(equal_probability=-1.0), r"^equal_probability=-1\.0: "),
    (lambda: NormalizedWeighting(offset=0.0), r"^offset=0\.0: it is positive"),
])  # fmt: skip
def test_invalid_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_guidance_is_taken_where_velocities_are_trained():
    pair = ToData(equal_probability=0.25)
    Consistency(time_pair=pair, guidance=SelfGuidance(omega=2.0))
    t, r = gv.jit(lambda key: pair(key, 4000, LINEAR))(jax.random.key(0))
    assert abs((r == t).mean() - 0.25) < 0.03
    assert not np.asarray(r)[r < t].any()
