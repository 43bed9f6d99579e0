"""Compute sharing changes no loss and no gradient: nothing shared, all shared, in microbatches."""

import dataclasses
import functools

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.dit import DiT
from dmf.models.in_context_dit import InContextDiT
from dmf.objectives import (
    DecoupledMeanFlow,
    DrawnGuidance,
    FlowMatching,
    ImprovedMeanFlow,
    MeanFlow,
    SelfGuidance,
    TeacherGuidance,
    UniformWeighting,
)
from dmf.objectives.compute_sharing import ComputeSharing, only_where_needed
from dmf.objectives.guidance import GuidedVelocity
from dmf.objectives.mean_flow import average_velocity
from dmf.objectives.path_sample import DecoupledDraws, PathSample
from dmf.runtime.sharding import batch_sharding, local_mesh, make_mesh, parameter_shardings
from dmf.types import Batch, ClassLabels, GuidedCondition

PLAIN = ComputeSharing(enabled=False, unconditional_microbatches=0)
EACH_LOSS = ComputeSharing(unconditional_microbatches=0)
SHARINGS = {
    "shared": EACH_LOSS,
    "shared-default": ComputeSharing(),
    "shared-one_pass": ComputeSharing(unconditional_microbatches=1),
    "shared-microbatches": ComputeSharing(unconditional_microbatches=4),
    "plain-microbatches": ComputeSharing(enabled=False, unconditional_microbatches=8),
}
SELF = SelfGuidance(omega=1.2, kappa=0.5, interval=(0.0, 0.7))
TEACHER = TeacherGuidance(scale=1.5, interval=(0.1, 0.8))
DRAWN = DrawnGuidance(kappa=0.5, start_range=(0.1, 0.3), end_range=(0.6, 0.9))
KINDS = {
    "decoupled": DecoupledMeanFlow(guidance=SELF, label_dropout=0.3),
    "decoupled-teacher": DecoupledMeanFlow(guidance=TEACHER, teacher=gv.decoupled("dmf_tiny")),
    "decoupled-unguided": DecoupledMeanFlow(),
    "decoupled-drawn": DecoupledMeanFlow(guidance=DRAWN, label_dropout=0.3),
    "meanflow": MeanFlow(guidance=SELF, label_dropout=0.3),
}
COUNT = 8


def network_of(kind: str, **changes):
    """A network and random parameters, also of the log-variance head and the final layer, and of
    the embedding of the guidance where that is drawn."""
    if kind == "decoupled-drawn":
        model, params = network_of("decoupled", **changes)
        model = dataclasses.replace(model, guidance_input=True)
        shapes = abstract_params(model)["guidance_embedding"]
        draw = np.random.default_rng(0).standard_normal
        embedding = jax.tree.map(lambda leaf: jnp.asarray(0.2 * draw(leaf.shape), "f"), shapes)
        return model, {**params, "guidance_embedding": embedding}
    if kind.startswith("decoupled"):
        return gv.decoupled("dmf_tiny", **changes), gv.decoupled_params("dmf_tiny")
    return gv.meanflow("meanflow_tiny", **changes), gv.meanflow_params("meanflow_tiny")


def batch_of(shape: tuple[int, ...]) -> Batch:
    x_key, y_key = jax.random.split(jax.random.key(5))
    return Batch(jax.random.normal(x_key, (COUNT, *shape)),
                 jax.random.randint(y_key, (COUNT,), 0, 10))


def losses_and_gradients(kind: str, sharing: ComputeSharing, mesh=None, **changes):
    """Per-sample losses, metrics, and the gradient of their mean."""
    model, params = network_of(kind, **changes)
    objective = dataclasses.replace(KINDS[kind], compute_sharing=sharing)
    frozen = {}
    if objective.needs_teacher:
        frozen = {"teacher": jax.tree.map(lambda p: 1.1 * p, params)}
    batch = batch_of(model.sample_shape)
    draws = gv.jit(objective.draw)(jax.random.key(3), batch)

    def mean(params, batch, draws, frozen):
        losses, metrics = objective.loss(model, params, batch, draws, frozen)
        return jnp.mean(losses), (losses, metrics)

    def run(*inputs):
        (_, (losses, metrics)), gradient = jax.value_and_grad(mean, has_aux=True)(*inputs)
        return losses, metrics, gradient

    if mesh is None:
        return gv.jit(run)(params, batch, draws, frozen)
    shardings = (parameter_shardings(mesh, params), batch_sharding(mesh), batch_sharding(mesh),
                 parameter_shardings(mesh, frozen))
    inputs = [jax.device_put(x, sharding) for x, sharding in
              zip((params, batch, draws, frozen), shardings, strict=True)]

    def on_mesh(*inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(*inputs)

    return gv.jit(on_mesh)(*inputs)


unshared = functools.cache(functools.partial(losses_and_gradients, sharing=PLAIN))


def assert_same(kind: str, shared) -> None:
    losses, metrics, gradient = unshared(kind)
    np.testing.assert_allclose(shared[0], losses, rtol=1e-5)
    for name in metrics:
        gv.assert_near(shared[1][name], metrics[name], 1e-5)
    whole, other = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
                    for tree in (gradient, shared[2]))
    assert np.linalg.norm(other - whole) < 1e-6 * np.linalg.norm(whole)


@pytest.mark.parametrize(
    ("kind", "sharing"),
    [
        # The golden values of these two are computed with compute sharing, and the formula of drawn
        # guidance below is compared with it.
        pytest.param("decoupled-drawn", "shared", marks=pytest.mark.slow),
        pytest.param("decoupled-teacher", "shared-microbatches", marks=pytest.mark.slow),
        pytest.param("meanflow", "shared", marks=pytest.mark.slow),
        pytest.param("decoupled", "shared", marks=pytest.mark.slow),
        pytest.param("decoupled", "shared-microbatches", marks=pytest.mark.slow),
        pytest.param("decoupled", "plain-microbatches", marks=pytest.mark.slow),
        pytest.param("decoupled-drawn", "shared-microbatches", marks=pytest.mark.slow),
        pytest.param("decoupled", "shared-one_pass", marks=pytest.mark.slow),
        pytest.param("decoupled-teacher", "shared", marks=pytest.mark.slow),
        pytest.param("decoupled-unguided", "shared", marks=pytest.mark.slow),
        pytest.param("meanflow", "plain-microbatches", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_the_formulas(kind, sharing):
    assert_same(kind, losses_and_gradients(kind, SHARINGS[sharing]))


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [PLAIN, ComputeSharing()], ids=["plain", "shared"])
def test_drawn_guidance_is_its_formula(sharing):
    """Both losses by hand: the network is given the drawn guidance, and guided by it where t is in
    the drawn interval and the label is not dropped; the null label is given no guidance."""
    model, params = network_of("decoupled-drawn")
    objective = dataclasses.replace(
        KINDS["decoupled-drawn"], weighting=UniformWeighting(), compute_sharing=sharing
    )
    batch = batch_of(model.sample_shape)
    t, dropped = jnp.linspace(0.05, 0.98, COUNT), jnp.arange(COUNT) == 4
    draws = gv.jit(objective.draw)(jax.random.key(3), batch)
    draws = DecoupledDraws(draws.flow_matching._replace(t=t, r=t, dropped=dropped),
                           draws.mean_flow._replace(t=t, r=t / 2, dropped=dropped))

    def column(values):
        return values[:, None, None, None]

    @gv.jit
    def by_hand(params, draw):
        t, r, guidance = draw.t, draw.r, draw.guidance
        labels = ClassLabels(batch.y, model.num_classes).drop(draw.dropped)
        y = GuidedCondition(labels, guidance)
        x_t = (1 - column(t)) * batch.x + column(t) * draw.noise
        conditional = model.apply(params, x_t, t, t, y)
        null = model.apply(params, x_t, t, t, labels.null())
        active = (guidance.start <= t) & (t <= guidance.end) & ~draw.dropped
        omega, kappa = (column(jnp.where(active, inside, elsewhere))
                        for inside, elsewhere in ((0.5 * guidance.scale, 1.0), (0.5, 0.0)))
        v_g = omega * (draw.noise - batch.x) + kappa * conditional + (1 - omega - kappa) * null
        u, du_dt = jax.jvp(lambda x, t: model.apply(params, x, t, r, y), (x_t, t),
                           (v_g, jnp.ones_like(t)))  # fmt: skip
        return jnp.mean((u - v_g - column(r - t) * du_dt) ** 2, axis=(1, 2, 3)), u

    outside = []
    for draw in draws:
        before, after = draw.t < draw.guidance.start, draw.t > draw.guidance.end
        outside.append([(~draw.dropped & side).any() for side in (before, after)])
        assert 0 < (~before & ~after & ~draw.dropped).sum() < COUNT
    assert np.any(outside, axis=0).all(), "the test needs times on both sides of their intervals"
    losses, u = zip(*(by_hand(params, draw) for draw in draws), strict=True)
    loss = gv.jit(lambda *inputs: objective.loss(model, params, *inputs, {})[0])(batch, draws)
    np.testing.assert_allclose(loss, (losses[0] + losses[1]) / 2, rtol=1e-4)
    # The drawn guidance changes the output of the network.
    zeros = jax.tree.map(jnp.zeros_like, params["guidance_embedding"])
    _, other = by_hand(params | {"guidance_embedding": zeros}, draws[0])
    assert jnp.abs(other - u[0]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["shared", "shared-microbatches"])
@pytest.mark.parametrize("execution", gv.EXECUTIONS)
@pytest.mark.parametrize("kind", ["decoupled", "meanflow"])
def test_on_every_mesh_and_with_every_remat(kind, execution, sharing):
    scan, remat, axes = gv.EXECUTIONS[execution]
    mesh = axes and make_mesh(*axes)
    shared = losses_and_gradients(kind, SHARINGS[sharing], mesh, scan=scan, remat=remat)
    assert_same(kind, shared)


@pytest.mark.slow
def test_microbatches_of_the_unconditional_pass_on_a_mesh():
    sharing, mesh = ComputeSharing(unconditional_microbatches=2), make_mesh(2, 2, 2)
    assert_same("decoupled", losses_and_gradients("decoupled", sharing, mesh, remat="dots"))


def test_microbatches_in_which_no_row_is_needed_are_not_computed():
    """A skipped row gives 0 in place of its value."""
    needed = jnp.asarray([False, True, False, False, True, False, False, True])
    rows = jnp.arange(8.0) + 1
    doubled = only_where_needed(lambda x: 2 * x, needed, 4)
    # Rows 1, 4, 7 and, to fill the second microbatch, the first of the others.
    np.testing.assert_array_equal(doubled(rows), [2, 4, 0, 0, 10, 0, 0, 16])
    np.testing.assert_array_equal(only_where_needed(lambda x: 2 * x, needed, 1)(rows), 2 * rows)


def test_microbatches_divide_the_rows():
    message = r"^objective\.compute_sharing\.unconditional_microbatches=3: it must divide the 16 s"
    with pytest.raises(InputError, match=message):
        losses_and_gradients("decoupled", ComputeSharing(unconditional_microbatches=3))
    with pytest.raises(InputError, match=r"^unconditional_microbatches=-1: give 0"):
        ComputeSharing(unconditional_microbatches=-1)


def test_the_unconditional_pass_is_cut_on_one_cpu_alone(monkeypatch):
    sharing = ComputeSharing()
    assert [sharing.microbatches(count) for count in (512, 16, 12, 7)] == [8, 8, 4, 1]
    assert EACH_LOSS.microbatches(16) == ComputeSharing(enabled=False).microbatches(16) == 0
    with jax.sharding.use_abstract_mesh(local_mesh(1).abstract_mesh):
        assert sharing.microbatches(16) == 8
    with jax.sharding.use_abstract_mesh(make_mesh(2, 2, 2).abstract_mesh):
        assert sharing.microbatches(16) == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sharing.microbatches(16) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [
    pytest.param(None, id="unguided", marks=pytest.mark.slow), pytest.param(0.5, id="guided")
])
def test_a_gradient_of_the_shared_form_reaches_inputs_too(kappa):
    """x_t, t and r as well as the parameters; as `jax.jvp` differentiated does."""
    model, params = network_of("decoupled")
    batch = batch_of(model.sample_shape)
    t, r = jnp.linspace(0.3, 0.9, COUNT), jnp.linspace(0.2, 0.1, COUNT)
    v = jax.random.normal(jax.random.key(1), batch.x.shape)

    def total(sharing, x_t, t, r):
        objective = MeanFlow(compute_sharing=sharing)
        y = ClassLabels(batch.y, model.num_classes)
        sample = PathSample(x_t, v, t, r, y, jnp.zeros(COUNT, bool))
        guided = GuidedVelocity(v, kappa if kappa is None else jnp.full(COUNT, kappa))
        u, _, _ = average_velocity(objective, model, params, sample, guided)
        return jnp.sum(u**2)

    plain, shared = (
        gv.jit(jax.grad(functools.partial(total, sharing), argnums=(0, 1, 2)))(batch.x, t, r)
        for sharing in (PLAIN, ComputeSharing())
    )
    for a, b in zip(shared, plain, strict=True):
        gv.assert_near(a, b, 1e-5)


def forward_passes(objective, model) -> float:
    """The cost of a loss and its gradient in forward passes, as XLA counts the operations of the
    unrolled network."""
    model = dataclasses.replace(model, scan=False)
    params = abstract_params(model)
    batch = jax.eval_shape(lambda: batch_of(model.sample_shape))
    draws = jax.eval_shape(objective.draw, jax.random.key(0), batch)
    times = jax.ShapeDtypeStruct((COUNT,), jnp.float32)

    def mean(params, batch, draws):
        return jnp.mean(objective.loss(model, params, batch, draws, {})[0])

    def count(function, *inputs) -> float:
        return gv.jit(function).lower(*inputs).compile().cost_analysis()["flops"]

    forward = count(model.apply, params, batch.x, times, times, batch.y)
    return count(jax.grad(mean), params, batch, draws) / forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "conditioning", "least", "most"),
    [
        (FlowMatching(), "flow", 2.9, 3.1),
        (MeanFlow(guidance=SELF, compute_sharing=EACH_LOSS), "meanflow", 5.9, 6.2),
        (ImprovedMeanFlow(compute_sharing=EACH_LOSS), "in_context", 6.5, 6.6),
        (DecoupledMeanFlow(guidance=SELF, compute_sharing=EACH_LOSS), "decoupled", 9.2, 9.7),
        # Eleven as written; XLA finds that the prediction of flow matching is computed twice.
        (DecoupledMeanFlow(guidance=SELF, compute_sharing=PLAIN), "decoupled", 9.9, 10.4),
    ],
    ids=["flow_matching", "mean_flow", "improved_mean_flow", "shared", "plain"],
)
def test_forward_passes_of_a_step(objective, conditioning, least, most):
    """The network is split at two thirds, as the published ones, where it is decoupled; it is
    shallow and narrow."""
    if conditioning == "in_context":
        # A head is a sixth of the depth, as in iMF-XL/2.
        model = InContextDiT(input_size=16, channels=4, num_classes=10, depth=6, head_depth=1,
                             width=256, heads=4)
    else:
        decoupled = conditioning == "decoupled"
        model = DiT(input_size=32, channels=4, num_classes=10, depth=3, width=256, heads=4,
                    conditioning=conditioning, split_depth=2 if decoupled else None,
                    learned_variance=decoupled)
    assert least < forward_passes(objective, model) < most


def matmul_flops(jaxpr) -> float:
    """Operations of the matmuls of a traced function; each iteration of a loop counts."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * np.prod(out) * np.prod([left[axis] for axis in summed])
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        )
        inner = [getattr(leaf, "jaxpr", leaf) for leaf in inner]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(matmul_flops(leaf) for leaf in inner if hasattr(leaf, "eqns"))
    return total


def traced_passes(objective, model) -> float:
    """The cost of the matmuls of a loss and its gradient in forward passes."""
    batch = jax.eval_shape(lambda: batch_of(model.sample_shape))
    draws = jax.eval_shape(objective.draw, jax.random.key(0), batch)

    def mean(params, batch, draws):
        return jnp.mean(objective.loss(model, params, batch, draws, {})[0])

    traced = jax.make_jaxpr(jax.grad(mean))(abstract_params(model), batch, draws).jaxpr
    # The compiler drops what no result depends on, such as the derivative of a head's other output.
    used, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return matmul_flops(used) / (COUNT * model.flops.forward)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "plain", "shared"),
    [("none", 11.1, 9.45), ("dots", 11.3, 9.7), ("full", 13.1, 12.05)],
)
def test_forward_passes_of_a_step_under_remat(remat, plain, shared):
    """Recomputed operations count too. The network has the shape of S/2, split at 8 of 12."""
    model = DiT(input_size=32, channels=4, num_classes=10, depth=12, width=384, heads=6,
                conditioning="decoupled", split_depth=8, learned_variance=True,
                remat=remat)  # fmt: skip
    passes = [traced_passes(DecoupledMeanFlow(guidance=SELF, compute_sharing=sharing), model)
              for sharing in (PLAIN, EACH_LOSS)]
    assert passes == pytest.approx([plain, shared], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "conditioning"), [("none", "meanflow"), ("dots", "meanflow"), ("none", "decoupled")]
)
def test_forward_passes_of_a_step_of_improved_mean_flow(remat, conditioning):
    """The network is divided as iMF-XL/2 is: a sixth of its depth is a head."""
    split = {"split_depth": 8} if conditioning == "decoupled" else {}
    model = InContextDiT(input_size=32, channels=4, num_classes=10, depth=12, head_depth=2,
                         width=384, heads=6, remat=remat, conditioning=conditioning, **split)
    passes = [traced_passes(ImprovedMeanFlow(compute_sharing=sharing), model)
              for sharing in (PLAIN, EACH_LOSS)]
    assert passes == pytest.approx([9.1, 6.6] if remat == "none" else [9.3, 6.75], abs=0.05)
