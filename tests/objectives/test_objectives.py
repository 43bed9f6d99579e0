"""Objectives by their mathematics: the MeanFlow identity, its tangent, draws, and independence."""

import dataclasses
import functools

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_data import Gaussian
from small_network import NETWORK
from small_network import PARAMS as PARAMS_OF_TWO_LAYERS

from dmf.errors import InputError
from dmf.models.simple_network import SimpleNetwork
from dmf.objectives import (
    COSINE,
    LINEAR,
    AdaptiveWeighting,
    CauchyWeighting,
    DecoupledMeanFlow,
    FlowMatching,
    MeanFlow,
    NoGuidance,
    SelfGuidance,
    TeacherGuidance,
    UniformWeighting,
)
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.objectives.guidance import GuidedVelocity
from dmf.objectives.interpolants import per_sample
from dmf.objectives.mean_flow import average_velocity, mean_flow_loss
from dmf.objectives.objective import Objective, terms_of
from dmf.objectives.path_sample import PathSample
from dmf.runtime.sharding import batch_sharding, make_mesh
from dmf.types import Batch, ClassLabels, Flops

OBJECTIVES = {
    "flow_matching": FlowMatching(),
    "mean_flow": MeanFlow(guidance=SelfGuidance(omega=1.5, kappa=0.3)),
    "decoupled_mean_flow": DecoupledMeanFlow(guidance=SelfGuidance(omega=1.0, kappa=0.4)),
}
# The default level has the one that draws all that the others draw.
over_objectives = pytest.mark.parametrize("objective", [
    pytest.param(each, id=name, marks=pytest.mark.slow if name != "decoupled_mean_flow" else ())
    for name, each in OBJECTIVES.items()
])  # fmt: skip
over_paths = pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])


@dataclasses.dataclass(frozen=True)
class LinearNetwork(SimpleNetwork):
    """u = slope x_t + rate t + row[y]: its derivative along (v, 1, 0) is slope v + rate."""

    num_classes: int = 2
    sample_shape: tuple[int, int, int] = (2, 2, 3)
    encoder_depth: int = 1
    flops: Flops = Flops(encode=24.0, decode=24.0)

    def init(self, key):
        return PARAMS

    def apply(self, params, x_t, t, r, y):
        offset = params["rate"] * t + params["rows"][self.condition(y).labels]
        return params["slope"] * x_t + per_sample(offset, x_t)

    def encode(self, params, x_t, t, y):
        return params["slope"] * x_t, t

    def decode(self, params, hidden, r, y):
        x, t = hidden
        return x + per_sample(params["rate"] * t + params["rows"][self.condition(y).labels], x)

    def apply_with_features(self, params, x_t, t, r, y):
        u = self.apply(params, x_t, t, r, y)
        return u, u.reshape(len(u), 4, -1)

    def log_variance(self, params, t, r):
        return t - r


PARAMS = {
    "slope": jnp.float32(0.8),
    "rate": jnp.float32(-0.5),
    "rows": jnp.asarray([0.2, 1.0, -0.7]),
}


def batch_of(count: int, shape: tuple[int, ...] = (2, 2, 3), classes: int = 2) -> Batch:
    x_key, y_key, feature_key = jax.random.split(jax.random.key(count), 3)
    return Batch(
        jax.random.normal(x_key, (count, *shape)),
        jax.random.randint(y_key, (count,), 0, classes),
        jax.random.normal(feature_key, (count, 4, int(np.prod(shape)) // 4)),
    )


def drawn(objective, seed: int, batch: Batch):
    return gv.jit(objective.draw)(jax.random.key(seed), batch)


def linear_loss(objective, batch: Batch, draws, params=PARAMS):
    """Losses and metrics of the linear network; its teacher is itself, with `PARAMS`."""
    frozen = {"teacher": PARAMS} if objective.needs_teacher else {}
    loss = gv.jit(lambda *inputs: objective.loss(LinearNetwork(), params, *inputs, frozen))
    return loss(batch, draws)


# Computes each formula as it stands.
PLAIN = MeanFlow(
    weighting=UniformWeighting(), compute_sharing=ComputeSharing(enabled=False)
)


def labels(count: int) -> ClassLabels:
    return ClassLabels(jnp.zeros(count, jnp.int32), num_classes=2)


@dataclasses.dataclass(frozen=True)
class ExactFlowMap(SimpleNetwork):
    """The exact flow map of Gaussian data, a network without parameters."""

    gaussian: Gaussian
    num_classes = 0
    sample_shape = (2, 2, 1)
    flops = Flops(encode=0.0, decode=0.0)

    def init(self, key):
        return {}

    def apply(self, params, x_t, t, r, y):
        return self.gaussian.flow_map(x_t, t, r, y)


def linear_loss_without_teacher():
    objective, batch = DecoupledMeanFlow(guidance=TeacherGuidance()), batch_of(2)
    draws = drawn(objective, 0, batch)
    return objective.loss(LinearNetwork(), PARAMS, batch, draws, {})


@over_paths
def test_exact_flow_map_is_a_fixed_point_of_the_identity(path):
    """On Gaussian data, with the marginal velocity, the target is u itself: the error is 0."""
    with jax.enable_x64(True):
        gaussian = Gaussian(interpolant=path)
        x_t = jax.random.normal(jax.random.key(0), (5, 2, 2, 1))
        t = jnp.asarray([0.9, 0.5, 1.0, 0.3, 0.6])
        r = jnp.asarray([0.1, 0.4, 0.0, 0.0, 0.55])
        v = gaussian.velocity(x_t, t)
        sample = PathSample(x_t, v, t, r, labels(5), jnp.zeros(5, bool))
        network = ExactFlowMap(gaussian)
        u, v_g, du_dt = average_velocity(PLAIN, network, {}, sample, GuidedVelocity(v, None))
        target = v_g - per_sample(t - r, u) * du_dt
        np.testing.assert_allclose(target, u, rtol=1e-9, atol=1e-9)
        _, metrics = mean_flow_loss(PLAIN, network, {}, sample, GuidedVelocity(v, None))
        np.testing.assert_allclose(metrics["mean_flow_error"], 0, atol=1e-12)
        assert jnp.abs(per_sample(r - t, u) * du_dt).max() > 0.1


def test_target_is_the_velocity_where_the_times_are_equal():
    x_t, t = jax.random.normal(jax.random.key(0), (3, 2, 2, 1)), jnp.asarray([0.2, 0.5, 0.9])
    sample = PathSample(x_t, x_t, t, t, labels(3), jnp.zeros(3, bool))
    inputs = LinearNetwork(), PARAMS, sample, GuidedVelocity(2 * x_t, None)
    u, _, du_dt = average_velocity(PLAIN, *inputs)
    _, metrics = mean_flow_loss(PLAIN, *inputs)
    error = jnp.mean((u - 2 * x_t) ** 2, axis=(1, 2, 3))
    np.testing.assert_array_equal(metrics["mean_flow_error"], error)
    assert jnp.abs(du_dt).min() > 0


@pytest.mark.parametrize(
    "conditioning", ["decoupled", pytest.param("meanflow", marks=pytest.mark.slow)]
)
def test_tangent_is_the_finite_difference(conditioning):
    if conditioning == "decoupled":
        model, params = gv.decoupled("dmf_tiny"), gv.decoupled_params("dmf_tiny")
    else:
        model, params = gv.meanflow("meanflow_tiny"), gv.meanflow_params("meanflow_tiny")
    batch = batch_of(4, model.sample_shape, 10)
    v = jax.random.normal(jax.random.key(9), batch.x.shape)
    t, r = jnp.asarray([0.9, 0.5, 0.7, 0.4]), jnp.asarray([0.1, 0.4, 0.7, 0.0])
    sample = PathSample(batch.x, v, t, r, model.condition(batch.y), jnp.zeros(4, bool))
    guided = GuidedVelocity(v, None)
    _, _, du_dt = gv.jit(functools.partial(average_velocity, PLAIN, model))(params, sample, guided)
    step, flow_map = 1e-2, gv.jit(functools.partial(model.apply, params))
    later = flow_map(batch.x + step * v, t + step, r, batch.y)
    earlier = flow_map(batch.x - step * v, t - step, r, batch.y)
    gv.assert_near(du_dt, (later - earlier) / (2 * step), 1e-3)


@pytest.mark.parametrize(
    "kind", [pytest.param(MeanFlow, marks=pytest.mark.slow), DecoupledMeanFlow]
)
def test_tangent_and_target_follow_the_guided_velocity(kind):
    """The metrics of the linear network equal the formula written out in numpy."""
    guidance = SelfGuidance(omega=1.5, kappa=0.2, interval=(0.3, 0.8))
    objective = kind(guidance=guidance, weighting=UniformWeighting(), label_dropout=0.4)
    batch = batch_of(64)
    draws = drawn(objective, 1, batch)
    _, metrics = linear_loss(objective, batch, draws)
    draw = draws.mean_flow if kind is DecoupledMeanFlow else draws
    t, r, dropped = (np.asarray(v).reshape(-1, 1, 1, 1) for v in draw[1:4])
    x_t, v_t = (1 - t) * batch.x + t * draw.noise, draw.noise - batch.x
    rows = np.where(dropped, -0.7, np.asarray(PARAMS["rows"])[batch.y].reshape(-1, 1, 1, 1))
    u, u_null = 0.8 * x_t - 0.5 * t + rows, 0.8 * x_t - 0.5 * t - 0.7
    active = (t >= 0.3) & (t <= 0.8) & ~dropped
    v_g = np.where(active, 1.5 * v_t + 0.2 * u - 0.7 * u_null, v_t)
    du_dt = 0.8 * v_g - 0.5
    error = u - v_g - (r - t) * du_dt
    assert 10 < active.sum() < 50
    root_mean_square = np.sqrt((du_dt**2).mean((1, 2, 3)))
    np.testing.assert_allclose(metrics["du_dt_norm"], root_mean_square, rtol=1e-4)
    np.testing.assert_allclose(metrics["mean_flow_error"], (error**2).mean((1, 2, 3)), rtol=1e-3)


def test_distillation_follows_the_teacher_and_no_data():
    """The flow-matching loss of a student that equals its guided teacher vanishes."""
    objective = DecoupledMeanFlow(
        guidance=TeacherGuidance(scale=1.0), weighting=UniformWeighting(), teacher=LinearNetwork()
    )
    batch = batch_of(16)
    draws = drawn(objective, 1, batch)
    _, same = linear_loss(objective, batch, draws)
    np.testing.assert_allclose(same["flow_matching_error"], 0, atol=1e-9)
    other = PARAMS | {"slope": jnp.float32(0.5)}
    _, different = linear_loss(objective, batch, draws, other)
    assert (different["flow_matching_error"] > 1e-3).all()


@over_objectives
def test_no_sample_sees_another(objective):
    """Permuting the batch with its draws permutes losses and metrics."""
    model, params = NETWORK, PARAMS_OF_TWO_LAYERS
    batch = batch_of(6, model.sample_shape, 10)
    draws = drawn(dataclasses.replace(objective, label_dropout=0.5), 2, batch)
    order = np.asarray([3, 0, 5, 1, 4, 2])
    loss = gv.jit(lambda batch, draws: objective.loss(model, params, batch, draws, {}))
    straight = loss(batch, draws)
    permuted = loss(*jax.tree.map(lambda leaf: leaf[order], (batch, draws)))
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.shape == (6,), straight))
    for one, other in zip(jax.tree.leaves(straight), jax.tree.leaves(permuted), strict=True):
        np.testing.assert_allclose(one[order], other, rtol=2e-5, atol=1e-6)


@over_objectives
def test_a_sample_alone_has_the_same_loss(objective):
    batch = batch_of(6)
    draws = drawn(objective, 2, batch)
    loss, _ = linear_loss(objective, batch, draws)
    alone, _ = linear_loss(objective, *jax.tree.map(lambda leaf: leaf[2:3], (batch, draws)))
    np.testing.assert_allclose(loss[2:3], alone, rtol=1e-5)


@over_objectives
def test_fraction_of_dropped_labels(objective):
    batch = batch_of(20_000, (2, 2, 1))
    draws = drawn(dataclasses.replace(objective, label_dropout=0.1), 4, batch)
    for draw in draws if isinstance(objective, DecoupledMeanFlow) else (draws,):
        assert abs(draw.dropped.mean() - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5
        assert ((draw.r >= 0) & (draw.r <= draw.t) & (draw.t <= 1)).all()


def test_labels_are_dropped_whether_or_not_the_times_are_equal():
    draws = drawn(MeanFlow(label_dropout=0.1), 4, batch_of(20_000, (2, 2, 1)))
    assert abs(np.corrcoef(draws.dropped, draws.t == draws.r)[0, 1]) < 0.03


def test_both_losses_share_dropped_labels_and_not_noise():
    draws = drawn(DecoupledMeanFlow(label_dropout=0.5), 0, batch_of(1000))
    one, other = draws
    np.testing.assert_array_equal(one.dropped, other.dropped)
    np.testing.assert_array_equal(one.t, one.r)
    assert abs(np.corrcoef(one.noise.ravel(), other.noise.ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(one.t, other.t)[0, 1]) < 0.13


@over_objectives
def test_draws_do_not_depend_on_the_mesh(objective):
    batch, key = batch_of(8), jax.random.key(7)
    sharding = batch_sharding(make_mesh(4, 2, 1))
    whole = jax.jit(objective.draw)(key, batch)
    split = jax.jit(objective.draw, out_shardings=sharding)(key, jax.device_put(batch, sharding))
    assert not jax.tree.leaves(split)[0].is_fully_replicated
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_array_equal(one, other)


@over_objectives
def test_draws_follow_the_key(objective):
    batch = batch_of(8)
    first, again, second = (drawn(objective, i, batch) for i in (0, 0, 1))
    for one, same, other in zip(*map(jax.tree.leaves, (first, again, second)), strict=True):
        np.testing.assert_array_equal(one, same)
        if one.dtype != bool:
            assert (one != other).all()


def test_alignment_adds_the_distance_times_its_coefficient():
    batch = batch_of(5)
    plain, aligned = FlowMatching(), FlowMatching(alignment_coefficient=0.5)
    draws = drawn(plain, 0, batch)
    loss, _ = linear_loss(plain, batch, draws)
    aligned_loss, metrics = linear_loss(aligned, batch, draws)
    np.testing.assert_allclose(aligned_loss, loss + 0.5 * metrics["alignment_distance"], rtol=1e-5)


@pytest.mark.parametrize("weighting", [AdaptiveWeighting(power=0.0), UniformWeighting()])
def test_loss_is_the_mean_of_both_losses(weighting):
    objective = DecoupledMeanFlow(guidance=NoGuidance(), weighting=weighting)
    batch = batch_of(4)
    loss, metrics = linear_loss(objective, batch, drawn(objective, 0, batch))
    scale = 1 if weighting == UniformWeighting() else 12
    total = metrics["flow_matching_error"] + metrics["mean_flow_error"]
    np.testing.assert_allclose(loss, scale * total / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "terms"),
    [(FlowMatching, ("flow_matching",)), (MeanFlow, ("mean_flow",)),
     (DecoupledMeanFlow, ("flow_matching", "mean_flow"))],
)  # fmt: skip
def test_each_term_reports_its_log_variance(kind, terms):
    """The log-variance of the linear network is t - r."""
    objective, batch = kind(weighting=CauchyWeighting()), batch_of(5)
    draws = drawn(objective, 0, batch)
    _, metrics = linear_loss(objective, batch, draws)
    each_draw = draws if len(terms) == 2 else (draws,)
    names = {name for name in metrics if name.endswith("log_variance")}
    assert names == {f"{term}_log_variance" for term in terms}
    for term, draw in zip(terms, each_draw, strict=True):
        np.testing.assert_allclose(metrics[f"{term}_log_variance"], draw.t - draw.r, atol=1e-6)
    assert (terms == ("flow_matching",)) or jnp.any(each_draw[-1].t != each_draw[-1].r)


@pytest.mark.slow
def test_the_terms_of_decoupled_mean_flow_add_up_to_its_loss():
    objective, batch = OBJECTIVES["decoupled_mean_flow"], batch_of(5)
    draws = drawn(objective, 0, batch)
    inputs = LinearNetwork(), PARAMS, batch, draws, {}
    terms = terms_of(objective, *inputs)
    losses, metrics = objective.loss(*inputs)
    assert [term.weight for term in terms] == [0.5, 0.5]
    total = sum(term.weight * term.loss(PARAMS, *term.inputs)[0] for term in terms)
    np.testing.assert_allclose(total, losses, rtol=1e-6)
    halves = metrics["flow_matching_loss"] + metrics["mean_flow_loss"]
    np.testing.assert_allclose(halves / 2, losses, rtol=1e-6)


class MeanOnly(DecoupledMeanFlow):
    """Derived from a sum of terms, with a loss of its own."""

    def loss(self, network, params, batch, draws, frozen_params):
        return jnp.full(len(batch.x), params["slope"]), {}


def test_a_loss_that_replaces_a_sum_of_terms_is_the_only_term():
    batch = batch_of(3)
    (term,) = terms_of(MeanOnly(), LinearNetwork(), PARAMS, batch, (), {})
    assert term.weight == 1
    losses, metrics = term.loss(PARAMS, *term.inputs)
    np.testing.assert_allclose(losses, 0.8)
    assert metrics == {}


class Empty(Objective):
    """Derived from the base class, with neither a loss nor terms."""


def test_an_objective_without_a_loss_or_terms_says_so():
    batch = batch_of(3)
    with pytest.raises(NotImplementedError, match="^Empty needs a loss, or its terms$"):
        Empty().loss(LinearNetwork(), PARAMS, batch, (), {})
    (term,) = terms_of(Empty(), LinearNetwork(), PARAMS, batch, (), {})
    with pytest.raises(NotImplementedError, match="^Empty needs a loss, or its terms$"):
        term.loss(PARAMS, *term.inputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowMatching(label_dropout=1.5), r"^label_dropout=1\.5: "),
        (lambda: MeanFlow(label_dropout=-0.1), r"^label_dropout=-0\.1: "),
        (lambda: MeanFlow(guidance=TeacherGuidance()), r"^guidance\.name=teacher: "),
        (lambda: linear_loss_without_teacher(), r"teacher\.checkpoint$"),
    ],
)
def test_invalid_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
