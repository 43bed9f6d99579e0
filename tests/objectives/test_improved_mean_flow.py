"""Improved MeanFlow by its formula: both heads, the guidance by the velocity head, the tangent."""

import dataclasses
import functools

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_data import Gaussian
from two_heads import TwoHeads

from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.dit import DiT
from dmf.models.in_context_dit import InContextDiT
from dmf.models.simple_network import SimpleNetwork
from dmf.objectives import (
    COSINE,
    LINEAR,
    AdaptiveWeighting,
    CauchyWeighting,
    DrawnGuidance,
    ImprovedMeanFlow,
    NoGuidance,
    Tangent,
    UniformWeighting,
)
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.objectives.path_sample import Draws, path_sample
from dmf.types import Batch, ClassLabels, Flops, GuidanceInput, GuidedCondition

PLAIN = ComputeSharing(enabled=False, unconditional_microbatches=0)
MICROBATCHES = ComputeSharing(unconditional_microbatches=8)
SHARINGS = {
    "plain": PLAIN,
    "shared": ComputeSharing(unconditional_microbatches=0),
    "one_pass": ComputeSharing(unconditional_microbatches=1),
    "microbatches": MICROBATCHES,
    "plain-microbatches": ComputeSharing(enabled=False, unconditional_microbatches=8),
}
NETWORK = TwoHeads()
PIXELS = TwoHeads(prediction="data")
PARAMS = NETWORK.init(jax.random.key(7))
# Kept: t inside the interval (twice), below and above it, inside it with r = t and, with a time
# below the least that x-prediction divides by, above it; dropped: inside it, with r < t and r = t.
T = jnp.asarray([0.5, 0.7, 0.2, 0.9, 0.6, 0.03, 0.6, 0.5])
R = jnp.asarray([0.1, 0.6, 0.0, 0.2, 0.6, 0.01, 0.3, 0.5])
DROPPED = jnp.arange(8) >= 6
GUIDANCE = GuidanceInput(jnp.linspace(1.5, 7.5, 8), jnp.full(8, 0.4).at[5].set(0.0),
                         jnp.full(8, 0.8).at[5].set(0.02))  # fmt: skip
DRAWS = Draws(jax.random.normal(jax.random.key(1), (8, 4, 4, 1)), T, R, DROPPED, GUIDANCE)
BATCH = Batch(jax.random.normal(jax.random.key(2), (8, 4, 4, 1)), jnp.arange(8, dtype=jnp.int32))


def column(values):
    return values[:, None, None, None]


def formula(network, params):
    """[b] summed squared errors of u and v, as in the paper, and the root mean square of du/dt."""
    t, r, y, null = T, R, BATCH.y, jnp.full(8, 10)
    scale, start, end = GUIDANCE
    start, end = jnp.where(r == t, 0.0, start), jnp.where(r == t, 1.0, end)
    x_t = (1 - column(t)) * BATCH.x + column(t) * DRAWS.noise
    v_t = DRAWS.noise - BATCH.x
    if network.prediction == "data":
        v_t = (x_t - BATCH.x) / jnp.maximum(column(t), 0.05)

    def given(labels, *guidance):
        return GuidedCondition(ClassLabels(labels, 10), GuidanceInput(*guidance))

    now = jnp.where((start <= t) & (t <= end), scale, 1.0)
    ones, zeros = jnp.ones(8), jnp.zeros(8)
    v_c = network.apply_heads(params, x_t, t, t, given(y, now, zeros, ones))[1]
    v_u = network.apply_heads(params, x_t, t, t, given(null, ones, zeros, ones))[1]
    v_g = v_t + column(jnp.where(DROPPED, 0.0, 1 - 1 / now)) * (v_c - v_u)
    seen = given(jnp.where(DROPPED, null, y), scale, start, end)
    (u, v), (du_dt, _) = jax.jvp(
        lambda x, t: network.apply_heads(params, x, t, r, seen), (x_t, t), (v_c, ones)
    )
    v_g, du_dt = jax.lax.stop_gradient((v_g, du_dt))
    e_u = jnp.sum((u + column(t - r) * du_dt - v_g) ** 2, axis=(1, 2, 3))
    e_v = jnp.sum((v - v_g) ** 2, axis=(1, 2, 3))
    return e_u, e_v, jnp.sqrt(jnp.mean(du_dt**2, axis=(1, 2, 3)))


def formula_loss(network, params, weighting):
    e_u, e_v, norm = formula(network, params)
    metrics = {"mean_flow_error": e_u / 16, "velocity_head_error": e_v / 16,
               "du_dt_norm": jnp.where(R == T, 0.0, norm)}
    return weighting(e_u, 16) + weighting(e_v, 16), metrics


def values_and_gradients(losses, params):
    """Losses, metrics and the gradient of the mean loss of several losses, in one program."""

    def one(loss, params):
        def mean(params):
            losses, metrics = loss(params)
            return jnp.mean(losses), (losses, metrics)

        gradient, (values, metrics) = jax.grad(mean, has_aux=True)(params)
        return values, metrics, jnp.concatenate([g.ravel() for g in jax.tree.leaves(gradient)])

    return gv.jit(lambda params: [one(loss, params) for loss in losses])(params)


@pytest.mark.parametrize(("network", "weighting", "sharings"), [
    pytest.param(PIXELS, AdaptiveWeighting(), ["plain", "microbatches"], id="data"),
    pytest.param(PIXELS, AdaptiveWeighting(power=0.0), SHARINGS, id="data-unweighted",
                 marks=pytest.mark.slow),
    pytest.param(NETWORK, AdaptiveWeighting(), SHARINGS, id="velocity", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_loss_is_its_formula_whatever_is_shared(network, weighting, sharings):
    def loss_of(sharing):
        objective = ImprovedMeanFlow(weighting=weighting, compute_sharing=SHARINGS[sharing])
        return lambda params: objective.loss(network, params, BATCH, DRAWS, {})

    by_hand = functools.partial(formula_loss, network, weighting=weighting)
    expected, *found = values_and_gradients([by_hand, *map(loss_of, sharings)], PARAMS)
    for values in found:
        np.testing.assert_allclose(values[0], expected[0], rtol=1e-5)
        for name, metric in expected[1].items():
            gv.assert_near(values[1][name], metric, 1e-5)
        gv.assert_near(values[2], expected[2], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", [
    InContextDiT(input_size=8, channels=1, num_classes=10, depth=4, head_depth=1, width=32, heads=2,
                 conditioning="decoupled", split_depth=2),
    DiT(input_size=8, channels=1, num_classes=10, depth=3, width=32, heads=2, guidance_input=True,
        conditioning="meanflow", velocity_head=True, head_depth=1),
], ids=["decoupled", "dit"])
def test_sharing_changes_nothing_for_other_networks(model):
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * draw(leaf.shape), "f"),
                          abstract_params(model))
    batch = Batch(jnp.asarray(draw((8, *model.sample_shape)), "f"), BATCH.y)
    draws = DRAWS._replace(noise=jnp.asarray(draw((8, *model.sample_shape)), "f"))
    plain, shared = values_and_gradients([
        lambda params, o=ImprovedMeanFlow(compute_sharing=sharing):
        o.loss(model, params, batch, draws, {}) for sharing in (PLAIN, MICROBATCHES)
    ], params)
    assert (plain[1]["du_dt_norm"] > 0).tolist() == (R < T).tolist()
    np.testing.assert_allclose(shared[0], plain[0], rtol=1e-5)
    gv.assert_near(shared[2], plain[2], 1e-5)
    for name, metric in plain[1].items():
        gv.assert_near(shared[1][name], metric, 1e-5)


@dataclasses.dataclass(frozen=True)
class ExactGuidedFlowMap(SimpleNetwork):
    """The flow map and the velocity of Gaussian data of classes with means 0.7, -0.3 and, for the
    null label, 0.2, under the guidance that is given: that of a Gaussian whose mean is guided."""

    num_classes = 2
    sample_shape = (2, 2, 1)
    guidance_input = velocity_head = True
    flops = Flops(encode=0.0, decode=0.0)

    def init(self, key):
        return {"u": jnp.ones(()), "v": jnp.ones(())}

    def gaussian(self, y):
        means = jnp.asarray([0.7, -0.3, 0.2])
        mean = means[2] + y.guidance.scale * (means[y.condition.labels] - means[2])
        return Gaussian(interpolant=LINEAR, mean=column(mean))

    def apply(self, params, x_t, t, r, y):
        return params["u"] * self.gaussian(y).flow_map(x_t, t, r, None)

    def velocity(self, params, x_t, t, y):
        return params["v"] * self.gaussian(y).velocity(x_t, t)

    def apply_heads(self, params, x_t, t, r, y):
        return self.apply(params, x_t, t, r, y), self.velocity(params, x_t, t, y)


def test_the_exact_guided_flow_map_is_a_fixed_point():
    """With the marginal velocities of the classes for v_t: no error, and no gradient."""
    with jax.enable_x64(True):
        network, count = ExactGuidedFlowMap(), 5
        labels, t = jnp.asarray([0, 1, 0, 1, 0]), jnp.asarray([0.9, 0.5, 1.0, 0.3, 0.6])
        r = jnp.asarray([0.1, 0.4, 0.0, 0.3, 0.55])
        whole = GuidanceInput(jnp.ones(count), jnp.zeros(count), jnp.ones(count))
        x_t = jax.random.normal(jax.random.key(0), (count, 2, 2, 1), jnp.float64)
        y = GuidedCondition(ClassLabels(labels, 2), whole)
        v = network.velocity(network.init(None), x_t, t, y)
        guidance = whole._replace(scale=jnp.asarray([1.0, 2.0, 4.0, 3.0, 8.0]))
        draws = Draws(x_t + (1 - column(t)) * v, t, r, jnp.zeros(count, bool), guidance)
        batch = Batch(x_t - column(t) * v, labels)
        objective = ImprovedMeanFlow(weighting=UniformWeighting())
        ((losses, metrics, gradient),) = values_and_gradients(
            [lambda params: objective.loss(network, params, batch, draws, {})], network.init(None)
        )
        np.testing.assert_allclose(losses, 0, atol=1e-12)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)
        # The guidance and the tangent are not nothing.
        assert metrics["velocity_error"][4] > 0.1
        assert (metrics["du_dt_norm"] == 0).tolist() == [False, False, False, True, False]


def test_no_sample_sees_another_and_every_error_has_its_bins():
    objective = ImprovedMeanFlow(time_bins=2)
    loss = gv.jit(lambda batch, draws: objective.loss(NETWORK, PARAMS, batch, draws, {}))
    order = jnp.asarray([3, 0, 5, 1, 4, 7, 2, 6])
    straight = loss(BATCH, DRAWS)
    permuted = loss(*jax.tree.map(lambda leaf: leaf[order], (BATCH, DRAWS)))
    for one, other in zip(jax.tree.leaves(straight), jax.tree.leaves(permuted), strict=True):
        assert one.shape[0] == 8
        np.testing.assert_allclose(one[order], other, rtol=2e-5, atol=1e-6)
    for name in ("mean_flow_error", "velocity_head_error"):
        bins = straight[1][f"{name}_bins"]
        assert bins.shape == (8, 2, 2, 2)
        np.testing.assert_allclose(bins[:, 0].sum((1, 2)), straight[1][name], rtol=1e-6)


def test_draws_are_those_of_the_paper():
    objective = ImprovedMeanFlow()
    batch = Batch(jnp.zeros((20_000, 1, 1, 1)), jnp.zeros(20_000, jnp.int32))
    draws = gv.jit(objective.draw)(jax.random.key(0), batch)
    assert abs((draws.t == draws.r).mean() - 0.5) < 0.015
    assert abs(draws.dropped.mean() - 0.1) < 0.01
    assert abs((draws.guidance.scale < 3).mean() - np.log(3) / np.log(8)) < 0.015
    assert draws.guidance.scale.min() >= 1 and draws.guidance.scale.max() <= 8
    assert abs(np.corrcoef(draws.dropped, draws.t == draws.r)[0, 1]) < 0.03


def losses_of(*objectives_and_draws):
    return gv.jit(lambda params: [objective.loss(NETWORK, params, BATCH, draws, {})
                                  for objective, draws in objectives_and_draws])(PARAMS)


def test_bounds_and_warm_up_act_on_the_tangent_alone():
    """At the first step of a warm-up and with a bound of nearly 0, V_u is u."""
    weight = ImprovedMeanFlow(tangent=Tangent(velocity="predicted", warmup_steps=10))
    bound = ImprovedMeanFlow(tangent=Tangent(velocity="predicted", max_rms=1e-9))
    first = weight.draw(jax.random.key(0), BATCH, jnp.zeros((), jnp.int32)).tangent_weight
    np.testing.assert_array_equal(first, 0)

    (_, usual), *others = losses_of((ImprovedMeanFlow(), DRAWS), (bound, DRAWS),
                                    (weight, DRAWS._replace(tangent_weight=first)))
    for _, metrics in others:
        found, expected = metrics["mean_flow_error"], usual["mean_flow_error"]
        np.testing.assert_allclose(found, others[0][1]["mean_flow_error"], 1e-5)
        assert (found != expected).tolist() == (R < T).tolist()
        gv.assert_near(metrics["velocity_head_error"], usual["velocity_head_error"], 1e-5)


@pytest.mark.slow
def test_a_central_difference_agrees_with_the_derivative():
    difference = Tangent(velocity="predicted", finite_difference=3e-3)
    (_, exact), (_, other) = losses_of(
        (ImprovedMeanFlow(), DRAWS), (ImprovedMeanFlow(tangent=difference), DRAWS)
    )
    for name in exact:
        np.testing.assert_allclose(other[name], exact[name], rtol=1e-3)
    assert (other["du_dt_norm"] != exact["du_dt_norm"]).any()


def test_the_velocity_of_a_network_that_predicts_data():
    """v_t on the linear path, and from (x_t - x) / min_time below the least time."""
    sample = path_sample(LINEAR, PIXELS, BATCH, DRAWS)
    v_t = DRAWS.noise - BATCH.x
    ratio = jnp.where(T < 0.05, T / 0.05, 1.0)
    np.testing.assert_allclose(sample.v_t, column(ratio) * v_t, rtol=1e-4, atol=1e-5)
    assert (ratio < 1).any()


def loss_of(network=NETWORK, **fields):
    jax.eval_shape(lambda: ImprovedMeanFlow(**fields).loss(network, PARAMS, BATCH, DRAWS, {}))


@dataclasses.dataclass(frozen=True)
class OneHead(TwoHeads):
    """A network that takes guidance and has no velocity head."""

    velocity_head: bool = False
    apply_heads = SimpleNetwork.apply_heads
    velocity = SimpleNetwork.velocity


@pytest.mark.parametrize(("make", "message"), [
    (lambda: loss_of(OneHead()), r"^model\.velocity_head=False: "),
    (lambda: loss_of(TwoHeads(guidance_input=False)), r"^model\.guidance_input=False: .* to True"),
    (lambda: loss_of(PIXELS, interpolant=COSINE), r"^model\.prediction=data: .*linear"),
    (lambda: ImprovedMeanFlow(guidance=NoGuidance()), r"^guidance\.name=NoGuidance: .*drawn$"),
    (lambda: ImprovedMeanFlow(tangent=Tangent()), r"^tangent\.velocity=guided: .*predicted$"),
    (lambda: ImprovedMeanFlow(weighting=CauchyWeighting()), r"^weighting\.name=CauchyWeighting: "),
    (lambda: DrawnGuidance(kappa=None, max_scale=0.5), r"^max_scale=0\.5: .* more than 1"),
    (lambda: DrawnGuidance(kappa=None, start_range=(0.5, 0.2)), r"^start_range=\(0\.5, 0\.2\): "),
    (lambda: ImprovedMeanFlow(label_dropout=2.0), r"^label_dropout=2\.0: "),
])  # fmt: skip
def test_invalid_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
