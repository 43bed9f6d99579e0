"""Guidance by its formula: who is guided, by how much, and that targets carry no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.flow import check_interval, per_sample
from dmf.guidance import (
    AskedOf,
    ClassifierFree,
    DrawnGuidance,
    NoGuidance,
    SelfGuidance,
    TeacherGuidance,
    guided_velocity,
    null_needed,
)
from dmf.samplers import sample
from dmf.typing import GuidedLabels, InputError

NAN, INFINITY = float("nan"), float("inf")
NULL = 3
INTERVAL = (0.25, 0.75)
# Inside, at both ends, below, above; then inside with the label dropped.
T = jnp.asarray([0.5, 0.25, 0.75, 0.2, 0.8, 0.5])
DROPPED = jnp.asarray([False, False, False, False, False, True])
Y = jnp.asarray([0, 1, 2, 0, 1, NULL])
ACTIVE = np.asarray([True, True, True, False, False, False])
WITHIN = np.asarray([True, True, True, False, False, True])
X_T = jax.random.normal(jax.random.key(0), (6, 2, 2, 1))
V_T = jax.random.normal(jax.random.key(1), (6, 2, 2, 1))


def flow_map(x_t: jax.Array, t: jax.Array, r: jax.Array, y: jax.Array) -> jax.Array:
    """Depends on all it is given, and tells the null label from the others."""
    level = 1.0 + y.astype(jnp.float32) + 10.0 * t - 3.0 * r
    return jnp.sin(x_t) + per_sample(level, x_t)


def velocity(y: jax.Array) -> np.ndarray:
    return np.asarray(flow_map(X_T, T, T, y))


CONDITIONAL = velocity(Y)
UNCONDITIONAL = velocity(jnp.full_like(Y, NULL))


def velocity_of(guidance, source, y, dropped) -> jax.Array:
    """v_g of a network, which is called only where the guidance asks for it."""
    null = source(X_T, T, T, jnp.full_like(y, NULL)) if guidance.needs_null else None
    guide = guided_velocity(guidance, T, dropped, V_T, null)
    return guide.at(None if guide.kappa is None else source(X_T, T, T, y))


def guided(guidance) -> np.ndarray:
    return np.asarray(velocity_of(guidance, flow_map, Y, DROPPED))


def column(values) -> np.ndarray:
    return np.asarray(values, np.float32).reshape(-1, 1, 1, 1)


def test_no_guidance_is_the_velocity_of_the_path():
    np.testing.assert_array_equal(guided(NoGuidance()), V_T)


@pytest.mark.parametrize(("omega", "kappa"), [(1.0, 0.6), (2.0, 0.0), (1.5, 0.5), (0.5, 0.5)])
def test_self_guidance_where_active_and_the_path_elsewhere(omega, kappa):
    inside = omega * V_T + kappa * CONDITIONAL + (1 - omega - kappa) * UNCONDITIONAL
    expected = np.where(column(ACTIVE), inside, V_T)
    ours = guided(SelfGuidance(omega=omega, kappa=kappa, interval=INTERVAL))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_teacher_guides_every_sample(scale):
    effective = column(np.where(WITHIN, scale, 1.0))
    expected = UNCONDITIONAL + effective * (CONDITIONAL - UNCONDITIONAL)
    ours = guided(TeacherGuidance(scale=scale, interval=INTERVAL))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_effective_scale_of_self_guidance():
    """With u(t, t, y) = v_g the fixed point is v_null + omega / (1 - kappa) (v_t - v_null)."""
    guidance = SelfGuidance(omega=1.2, kappa=0.4)
    scale = 1.2 / (1 - 0.4)
    fixed = UNCONDITIONAL + scale * (V_T - UNCONDITIONAL)

    def consistent(x_t, t, r, y):
        return jnp.where(per_sample(y == NULL, x_t), UNCONDITIONAL, fixed)

    kept = jnp.zeros(6, bool)
    labels = jnp.zeros(6, jnp.int32)
    ours = velocity_of(guidance, consistent, labels, kept)
    np.testing.assert_allclose(ours, fixed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("guidance", "calls"),
    [
        (NoGuidance(), 0),
        (SelfGuidance(omega=1.0, kappa=0.0), 0),
        (SelfGuidance(omega=2.0, kappa=0.0), 1),
        (SelfGuidance(omega=0.5, kappa=0.5), 1),
        (SelfGuidance(omega=1.0, kappa=0.5), 2),
        (TeacherGuidance(scale=1.0), 1),
        (TeacherGuidance(scale=2.0), 2),
    ],
)
def test_networks_are_called_only_where_needed(guidance, calls):
    seen = []

    def counted(x_t, t, r, y):
        seen.append(y)
        return flow_map(x_t, t, r, y)

    velocity_of(guidance, counted, Y, DROPPED)
    assert len(seen) == calls


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (SelfGuidance(omega=1.0, kappa=0.6, interval=INTERVAL), ACTIVE),
        (TeacherGuidance(scale=2.0, interval=INTERVAL), WITHIN),
    ],
)
def test_the_null_label_is_needed_where_its_velocity_counts(guidance, rows):
    np.testing.assert_array_equal(null_needed(guidance, T, DROPPED), rows)
    bases = [
        guided_velocity(guidance, T, DROPPED, V_T, jnp.asarray(UNCONDITIONAL + shift)).base
        for shift in (0.0, 1.0)
    ]
    np.testing.assert_array_equal((bases[0] != bases[1]).any(axis=(1, 2, 3)), rows)


@pytest.mark.parametrize(
    "guidance", [SelfGuidance(omega=1.5, kappa=0.3), TeacherGuidance(scale=2.0)]
)
def test_guided_velocity_carries_no_gradient(guidance):
    def total(weight):
        def scaled(x_t, t, r, y):
            return weight * flow_map(x_t, t, r, y)

        return jnp.sum(velocity_of(guidance, scaled, Y, DROPPED) ** 2)

    value, slope = jax.value_and_grad(total)(jnp.float32(1.0))
    assert slope == 0
    assert total(jnp.float32(2.0)) != value


def test_scale_1_returns_the_flow_map_itself():
    assert ClassifierFree(scale=1.0)(flow_map, NULL) is flow_map


def test_classifier_free_guidance_inside_its_closed_interval():
    r = T / 2
    u = np.asarray(flow_map(X_T, T, r, Y))
    u_null = np.asarray(flow_map(X_T, T, r, jnp.full_like(Y, NULL)))
    expected = np.where(column(WITHIN), u_null + 2.5 * (u - u_null), u)
    ours = ClassifierFree(scale=2.5, interval=INTERVAL)(flow_map, NULL)(X_T, T, r, Y)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "guide", [ClassifierFree(scale=1.0), ClassifierFree(scale=2.5, interval=(0.1, 0.2))]
)
def test_a_step_without_guidance_still_moves(guide):
    """Neither time of the two steps lies in the interval."""
    plain = sample(flow_map, X_T, Y, steps=2)
    ours = sample(guide(flow_map, NULL), X_T, Y, steps=2)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
    assert jnp.abs(ours - X_T).min() > 0.1


@pytest.mark.parametrize(
    ("interval", "t", "rows"),
    [
        (INTERVAL, [0.5] * 6, 12),
        (INTERVAL, [0.2, 0.2, 0.2, 0.25, 0.8, 0.8], 12),
        (INTERVAL, [0.2, 0.2, 0.2, 0.2, 0.8, 0.8], 6),
        ((0.0, 1.0), [1.0] * 6, 12),
        ((0.0, 1.0), [0.0] * 6, 12),
    ],
)
def test_rows_that_guidance_runs_through_the_network(interval, t, rows):
    """Both halves in one call where any time lies in the interval, else those asked for alone; as
    compiled, with the times known only when it runs."""
    seen = []

    def counted(x_t, t, r, y):
        jax.debug.callback(lambda x_t: seen.append(len(x_t)), x_t)
        return flow_map(x_t, t, r, y)

    guide = ClassifierFree(scale=2.0, interval=interval)
    jax.jit(guide(counted, NULL))(X_T, jnp.asarray(t), T, Y)
    jax.effects_barrier()
    assert seen == [rows]


def test_outside_its_interval_guidance_is_the_flow_map_to_the_bit():
    t = jnp.full(6, 0.2)
    ours = ClassifierFree(scale=2.5, interval=INTERVAL)(flow_map, NULL)(X_T, t, T, Y)
    np.testing.assert_array_equal(ours, flow_map(X_T, t, T, Y))


def test_guidance_of_a_flow_map_of_less_precision():
    def coarse(x_t, t, r, y):
        return flow_map(x_t, t, r, y).astype(jnp.bfloat16)

    for interval in (INTERVAL, (0.0, 1.0)):
        guide = ClassifierFree(scale=2.0, interval=interval)
        u = sample(guide(coarse, NULL), X_T, Y, steps=2)
        fine = sample(guide(flow_map, NULL), X_T, Y, steps=2)
        np.testing.assert_allclose(u, fine, atol=0.3)


def test_guidance_changes_the_samples_it_covers():
    plain = sample(flow_map, X_T, Y, steps=2)
    ours = sample(ClassifierFree(scale=2.0, interval=(0.5, 0.5))(flow_map, NULL), X_T, Y, steps=2)
    changed = jnp.abs(ours - plain).max(axis=(1, 2, 3)) > 0.1
    np.testing.assert_array_equal(changed, Y != NULL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfGuidance(kappa=1.0), r"^kappa=1\.0: "),
        (lambda: SelfGuidance(kappa=NAN), "^kappa=nan: "),
        (lambda: SelfGuidance(kappa=-INFINITY), "^kappa=-inf: "),
        (lambda: SelfGuidance(omega=NAN), "^omega=nan: "),
        (lambda: SelfGuidance(omega=INFINITY), "^omega=inf: "),
        (lambda: SelfGuidance(interval=(0.6, 0.4)), r"^interval=\(0\.6, 0\.4\): "),
        # What is no pair at all, where nothing else looks at types.
        (lambda: check_interval("interval", 0.5), r"^interval=0\.5: give \(low, high\)"),
        (lambda: check_interval("interval", (0.5,)), r"^interval=\(0\.5,\): give \(low, high\)"),
        (lambda: check_interval("interval", "ab"), "^interval=ab: give "),
        (lambda: SelfGuidance(interval=(0.0, NAN)), r"^interval=\(0\.0, nan\): "),
        (lambda: TeacherGuidance(interval=(0.0, 2.0)), r"^interval=\(0\.0, 2\.0\): "),
        (lambda: TeacherGuidance(scale=NAN), "^scale=nan: "),
        (lambda: ClassifierFree(interval=(-1.0, 1.0)), r"^sampling\.guidance\.interval=\(-1\.0, "),
        (lambda: ClassifierFree(scale=NAN), r"^sampling\.guidance\.scale=nan: "),
        (lambda: AskedOf(scale=NAN), r"^sampling\.guidance\.scale=nan: "),
        (lambda: ClassifierFree(scale=2.0)(flow_map, 0),
         r"^sampling\.guidance\.scale=2\.0: .* no labels .*; set it to 1$"),
    ],
)  # fmt: skip
def test_bad_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_network_without_labels_is_sampled_without_guidance():
    assert ClassifierFree(scale=1.0)(flow_map, 0) is flow_map


def test_drawn_guidance_is_that_of_each_sample():
    """Scale (1 - kappa) and kappa where t lies in the sample's own interval, none elsewhere."""
    guidance = DrawnGuidance(kappa=0.5)
    asked = GuidedLabels(jnp.zeros(4, jnp.int32), jnp.asarray([2.0, 4.0, 3.0, 5.0]),
                         jnp.asarray([0.2, 0.2, 0.4, 0.0]), jnp.asarray([0.8, 0.5, 0.9, 1.0]))
    dropped = jnp.asarray([False, False, False, True])
    omega, kappa = guidance.coefficients(jnp.asarray([0.2, 0.6, 0.9, 0.5]), dropped, asked)
    np.testing.assert_allclose(omega, [1.0, 1.0, 1.5, 1.0])
    np.testing.assert_allclose(kappa, [0.5, 0.0, 0.5, 0.0])


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_scales_are_drawn_from_their_density(power):
    """In proportion to scale^-power on [1, 8], by its distribution function."""
    guidance = DrawnGuidance(power=power, low=(0.1, 0.3), high=(0.6, 1.0))
    asked = guidance.draw(jax.random.key(0), jnp.arange(20_000))
    np.testing.assert_array_equal(asked.label, np.arange(20_000))
    for at in (1.5, 3.0, 6.0):
        share = np.log(at) / np.log(8) if power == 1 else (1 - 1 / at) / (1 - 1 / 8)
        assert abs(np.mean(np.asarray(asked.scale) < at) - share) < 0.015
    for ends, (least, most) in ((asked.low, (0.1, 0.3)), (asked.high, (0.6, 1.0))):
        assert least <= ends.min() < least + 0.01
        assert most - 0.01 < ends.max() <= most


@pytest.mark.parametrize(("fields", "message"), [
    ({"kappa": 1.0}, "^kappa=1.0"),
    ({"largest": 1.0}, "^largest=1.0: .* more than 1"),
    ({"largest": INFINITY}, "^largest=inf: "),
    ({"power": NAN}, "^power=nan: "),
    ({"low": (0.0, 0.7)}, "^low=.*must end before high=.* begins"),
    ({"high": (0.8, 0.5)}, "^high="),
])  # fmt: skip
def test_what_cannot_be_drawn(fields, message):
    with pytest.raises(InputError, match=message):
        DrawnGuidance(**fields)


def test_a_network_is_asked_for_its_guidance_at_sampling():
    def told(x_t, t, r, y):
        values = jnp.stack([y.label.astype(jnp.float32), y.scale, y.low, y.high], axis=1)
        return values.reshape(2, 2, 2, 1)

    asked = AskedOf(scale=2.5, interval=(0.1, 0.7))(told)(X_T[:2], T[:2], T[:2], Y[:2])
    np.testing.assert_allclose(asked.reshape(2, 4), [[0, 2.5, 0.1, 0.7], [1, 2.5, 0.1, 0.7]])
    with pytest.raises(InputError, match="guidance.scale=0.0: .* positive"):
        AskedOf(scale=0.0)
