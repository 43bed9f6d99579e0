"""How losses are computed changes none of them: nothing shared, everything shared, in parts."""

import dataclasses
import functools

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.draws import DecoupledDraws
from dmf.guidance import (
    DrawnGuidance,
    GuidedVelocity,
    SelfGuidance,
    TeacherGuidance,
)
from dmf.identity import Point, differentiated, linearized_once
from dmf.models.dit import DiT
from dmf.objectives import DecoupledMeanFlow, FlowMatching, MeanFlow
from dmf.sharding import batch_sharding, make_mesh, parameter_shardings
from dmf.typing import Batch, GuidedLabels, InputError
from dmf.weighting import Uniform
from dmf.work import Work, where_needed

PLAIN = Work(shared=False, null_parts=0)
WORKS = {
    "shared": Work(),
    "shared-one_pass": Work(null_parts=1),
    "shared-parts": Work(null_parts=4),
    "plain-parts": Work(shared=False, null_parts=8),
}
SELF = SelfGuidance(omega=1.2, kappa=0.5, interval=(0.0, 0.7))
TEACHER = TeacherGuidance(scale=1.5, interval=(0.1, 0.8))
DRAWN = DrawnGuidance(kappa=0.5, low=(0.1, 0.3), high=(0.6, 0.9))
KINDS = {
    "decoupled": DecoupledMeanFlow(guidance=SELF, label_dropout=0.3),
    "decoupled-teacher": DecoupledMeanFlow(guidance=TEACHER, teacher=gv.decoupled("dmf_tiny")),
    "decoupled-unguided": DecoupledMeanFlow(),
    "decoupled-drawn": DecoupledMeanFlow(guidance=DRAWN, label_dropout=0.3),
    "meanflow": MeanFlow(guidance=SELF, label_dropout=0.3),
}
COUNT = 8


def network_of(kind: str, **changes):
    """A network of random parameters, the log-variance and final layer among them, and what
    embeds a guidance where that is drawn."""
    if kind == "decoupled-drawn":
        model, params = network_of("decoupled", **changes)
        model = dataclasses.replace(model, guidance_input=True)
        shapes = jax.eval_shape(model.init, jax.random.key(0))["guidance_embedding"]
        draw = np.random.default_rng(0).standard_normal
        made = jax.tree.map(lambda leaf: jnp.asarray(0.2 * draw(leaf.shape), "f"), shapes)
        return model, {**params, "guidance_embedding": made}
    if kind.startswith("decoupled"):
        return gv.decoupled("dmf_tiny", **changes), gv.decoupled_params("dmf_tiny")
    return gv.meanflow("meanflow_tiny", **changes), gv.meanflow_params("meanflow_tiny")


def batch_of(shape: tuple[int, ...]) -> Batch:
    x_key, y_key = jax.random.split(jax.random.key(5))
    return Batch(jax.random.normal(x_key, (COUNT, *shape)),
                 jax.random.randint(y_key, (COUNT,), 0, 10))


def losses_and_gradients(kind: str, work: Work, mesh=None, **changes):
    """Per-sample losses, metrics, and the gradient of their mean."""
    model, params = network_of(kind, **changes)
    objective = dataclasses.replace(KINDS[kind], work=work)
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
    where = parameter_shardings(mesh, params), *(batch_sharding(mesh),) * 2
    where = (*where, parameter_shardings(mesh, frozen))
    inputs = [jax.device_put(x, on) for x, on in zip((params, batch, draws, frozen), where,
                                                    strict=True)]

    def on_mesh(*inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(*inputs)

    return gv.jit(on_mesh)(*inputs)


plainly = functools.cache(functools.partial(losses_and_gradients, work=PLAIN))


def assert_same(kind: str, ours) -> None:
    losses, metrics, gradient = plainly(kind)
    np.testing.assert_allclose(ours[0], losses, rtol=1e-5)
    for name in metrics:
        gv.assert_near(ours[1][name], metrics[name], 1e-5)
    whole, other = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
                    for tree in (gradient, ours[2]))
    assert np.linalg.norm(other - whole) < 1e-6 * np.linalg.norm(whole)


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ("decoupled", "shared"),
        ("decoupled", "shared-parts"),
        ("decoupled", "plain-parts"),
        ("decoupled-teacher", "shared-parts"),
        ("decoupled-drawn", "shared"),
        ("decoupled-drawn", "shared-parts"),
        ("meanflow", "shared"),
        pytest.param("decoupled", "shared-one_pass", marks=pytest.mark.slow),
        pytest.param("decoupled-teacher", "shared", marks=pytest.mark.slow),
        pytest.param("decoupled-unguided", "shared", marks=pytest.mark.slow),
        pytest.param("meanflow", "plain-parts", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_the_formulas(kind, work):
    assert_same(kind, losses_and_gradients(kind, WORKS[work]))


@pytest.mark.parametrize("work", [PLAIN, Work()], ids=["plain", "shared"])
def test_drawn_guidance_is_its_formula(work):
    """Both halves by hand: the network is given what was drawn, and guided by it where t lies in
    the interval that was drawn and the label is kept; the null label asks for nothing."""
    model, params = network_of("decoupled-drawn")
    objective = dataclasses.replace(KINDS["decoupled-drawn"], weighting=Uniform(), work=work)
    batch = batch_of(model.sample_shape)
    t, dropped = jnp.linspace(0.05, 0.98, COUNT), jnp.arange(COUNT) == 4
    draws = gv.jit(objective.draw)(jax.random.key(3), batch)
    draws = DecoupledDraws(draws.flow_matching._replace(t=t, r=t, dropped=dropped),
                           draws.mean_flow._replace(t=t, r=t / 2, dropped=dropped))
    apply, column = gv.jit(model.apply), lambda values: values[:, None, None, None]
    halves, outside = [], []
    for look in draws:
        t, r, asked = look.t, look.r, look.asked
        outside.append([(~look.dropped & (t < asked.low)).any(),
                        (~look.dropped & (t > asked.high)).any()])
        y = jnp.where(look.dropped, model.num_classes, batch.y)
        given = GuidedLabels(y, asked.scale, asked.low, asked.high)
        x_t = (1 - column(t)) * batch.x + column(t) * look.noise
        own = apply(params, x_t, t, t, given)
        null = apply(params, x_t, t, t, jnp.full_like(y, model.num_classes))
        active = (asked.low <= t) & (t <= asked.high) & ~look.dropped
        assert 0 < active.sum() < COUNT
        omega, kappa = (column(jnp.where(active, on, off))
                        for on, off in ((0.5 * asked.scale, 1.0), (0.5, 0.0)))
        v_g = omega * (look.noise - batch.x) + kappa * own + (1 - omega - kappa) * null
        u, du_dt = gv.jit(lambda x, t, v, r=r, given=given: jax.jvp(
            lambda x, t: model.apply(params, x, t, r, given), (x, t), (v, jnp.ones_like(t))
        ))(x_t, t, v_g)
        halves.append(jnp.mean((u - v_g - column(r - t) * du_dt) ** 2, axis=(1, 2, 3)))
    ours = gv.jit(lambda *looks: objective.loss(model, params, *looks, {})[0])(batch, draws)
    np.testing.assert_allclose(ours, (halves[0] + halves[1]) / 2, rtol=1e-4)
    assert np.any(outside, axis=0).all(), "the test needs times on both sides of their intervals"
    # Were it not given what was drawn, it would be another.
    plain = jax.tree.map(jnp.zeros_like, params["guidance_embedding"])
    other = apply(params | {"guidance_embedding": plain}, x_t, t, r, given)
    assert jnp.abs(other - u).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("work", ["shared", "shared-parts"])
@pytest.mark.parametrize("execution", gv.EXECUTIONS)
@pytest.mark.parametrize("kind", ["decoupled", "meanflow"])
def test_on_every_mesh_and_with_every_remat(kind, execution, work):
    scan, remat, axes = gv.EXECUTIONS[execution]
    mesh = axes and make_mesh(*axes)
    assert_same(kind, losses_and_gradients(kind, WORKS[work], mesh, scan=scan, remat=remat))


def test_split_over_devices_in_parts():
    mesh = make_mesh(2, 2, 2)
    assert_same("decoupled", losses_and_gradients("decoupled", Work(null_parts=2), mesh,
                                                  remat="dots"))


def test_parts_in_which_nothing_is_needed_are_not_computed():
    """Seen by what a skipped row gives: 0, and not its value."""
    needed = jnp.asarray([False, True, False, False, True, False, False, True])
    rows = jnp.arange(8.0) + 1
    doubled = where_needed(lambda x: 2 * x, needed, 4)
    # Rows 1, 4, 7 and, to fill the second part, the first of the others.
    np.testing.assert_array_equal(doubled(rows), [2, 4, 0, 0, 10, 0, 0, 16])
    np.testing.assert_array_equal(where_needed(lambda x: 2 * x, needed, 1)(rows), 2 * rows)


def test_parts_divide_the_rows():
    with pytest.raises(InputError, match=r"^objective.work.null_parts=3: it must divide the 16 ro"):
        losses_and_gradients("decoupled", Work(null_parts=3))
    with pytest.raises(InputError, match=r"^null_parts=-1: give 0"):
        Work(null_parts=-1)


@pytest.mark.parametrize("kappa", [None, 0.5], ids=["unguided", "guided"])
def test_a_gradient_of_the_shared_form_reaches_inputs_too(kappa):
    """x_t, t and r as well as the parameters; as `jax.jvp` differentiated does."""
    model, params = network_of("decoupled")
    batch = batch_of(model.sample_shape)
    t, r = jnp.linspace(0.3, 0.9, COUNT), jnp.linspace(0.2, 0.1, COUNT)
    v = jax.random.normal(jax.random.key(1), batch.x.shape)

    def total(form, x_t, t, r):
        point = Point(x_t, v, t, r, batch.y, jnp.zeros(COUNT, bool))
        guided = GuidedVelocity(v, kappa if kappa is None else jnp.full(COUNT, kappa))
        return jnp.sum(form(model, params, point, guided).u ** 2)

    expected, ours = (
        gv.jit(jax.grad(functools.partial(total, form), argnums=(0, 1, 2)))(batch.x, t, r)
        for form in (differentiated, linearized_once)
    )
    for a, b in zip(ours, expected, strict=True):
        gv.assert_near(a, b, 1e-5)


def forward_passes(objective, model) -> float:
    """What a loss and its gradient cost, by XLA's own count of the unrolled network."""
    model = dataclasses.replace(model, scan=False)
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.eval_shape(lambda: batch_of(model.sample_shape))
    draws = jax.eval_shape(objective.draw, jax.random.key(0), batch)
    times = jax.ShapeDtypeStruct((COUNT,), jnp.float32)

    def mean(params, batch, draws):
        return jnp.mean(objective.loss(model, params, batch, draws, {})[0])

    def count(function, *inputs) -> float:
        return gv.jit(function).lower(*inputs).compile().cost_analysis()["flops"]

    forward = count(model.apply, params, batch.x, times, times, batch.y)
    return count(jax.grad(mean), params, batch, draws) / forward


@pytest.mark.parametrize(
    ("objective", "conditioning", "least", "most"),
    [
        (FlowMatching(), "flow", 2.9, 3.1),
        pytest.param(MeanFlow(guidance=SELF), "meanflow", 5.9, 6.2, marks=pytest.mark.slow),
        (DecoupledMeanFlow(guidance=SELF), "decoupled", 9.2, 9.7),
        pytest.param(DecoupledMeanFlow(guidance=SELF, work=PLAIN), "decoupled", 10.9, 11.4,
                     marks=pytest.mark.slow),
    ],
    ids=["flow_matching", "mean_flow", "shared", "plain"],
)
def test_forward_passes_of_a_step(objective, conditioning, least, most):
    """Of S/2's shape, split at 8 of 12 where decoupled, narrower."""
    decoupled = {"split_depth": 8, "learned_variance": True} if conditioning == "decoupled" else {}
    model = DiT(input_size=32, channels=4, num_classes=10, depth=12, width=256, heads=4,
                conditioning=conditioning, **decoupled)
    assert least < forward_passes(objective, model) < most


def products(jaxpr) -> float:
    """Operations of the products of matrices in a traced function, loops in full."""
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
        total += times * sum(products(leaf) for leaf in inner if hasattr(leaf, "eqns"))
    return total


@pytest.mark.parametrize(
    ("remat", "plain", "shared"),
    [("none", 11.1, 9.45), ("dots", 11.3, 9.7), ("full", 13.1, 12.05)],
)
def test_forward_passes_of_a_step_under_remat(remat, plain, shared):
    """What is recomputed counts too; of S/2's shape, split at 8 of 12."""
    model = DiT(input_size=32, channels=4, num_classes=10, depth=12, width=384, heads=6,
                conditioning="decoupled", split_depth=8, learned_variance=True,
                remat=remat)  # fmt: skip
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.eval_shape(lambda: batch_of(model.sample_shape))
    passes = []
    for work in (PLAIN, Work()):
        objective = DecoupledMeanFlow(guidance=SELF, work=work)
        draws = jax.eval_shape(objective.draw, jax.random.key(0), batch)

        def mean(params, batch, draws, objective=objective):
            return jnp.mean(objective.loss(model, params, batch, draws, {})[0])

        traced = jax.make_jaxpr(jax.grad(mean))(params, batch, draws)
        passes.append(products(traced.jaxpr) / (COUNT * model.flops.forward))
    assert passes == pytest.approx([plain, shared], abs=0.05)
