"""Guidance by its formula: which samples are guided, by how much; targets carry no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dmf.errors import InputError
from dmf.objectives import DrawnGuidance, NoGuidance, SelfGuidance, TeacherGuidance
from dmf.objectives.guidance import guided_velocity, unconditional_needed
from dmf.objectives.interpolants import check_interval, per_sample
from dmf.types import ClassLabels, GuidanceInput

NAN, INFINITY = float("nan"), float("inf")
NULL = 3
INTERVAL = (0.25, 0.75)
# Inside the interval, at both ends, below, above; then inside with the label dropped.
T = jnp.asarray([0.5, 0.25, 0.75, 0.2, 0.8, 0.5])
DROPPED = jnp.asarray([False, False, False, False, False, True])
Y = ClassLabels(jnp.asarray([0, 1, 2, 0, 1, NULL]), num_classes=NULL)
ACTIVE = np.asarray([True, True, True, False, False, False])
WITHIN = np.asarray([True, True, True, False, False, True])
X_T = jax.random.normal(jax.random.key(0), (6, 2, 2, 1))
V_T = jax.random.normal(jax.random.key(1), (6, 2, 2, 1))


def flow_map(x_t: jax.Array, t: jax.Array, r: jax.Array, y: ClassLabels) -> jax.Array:
    """A flow map that depends on all its inputs, and differs between all labels."""
    level = 1.0 + y.labels.astype(jnp.float32) + 10.0 * t - 3.0 * r
    return jnp.sin(x_t) + per_sample(level, x_t)


def velocity(y: ClassLabels) -> np.ndarray:
    return np.asarray(flow_map(X_T, T, T, y))


CONDITIONAL = velocity(Y)
UNCONDITIONAL = velocity(Y.null())


def velocity_of(guidance, source, y, dropped) -> jax.Array:
    """v_g of a flow map, which is called only where the guidance needs it."""
    null = source(X_T, T, T, y.null()) if guidance.needs_unconditional else None
    v_g = guided_velocity(guidance, T, dropped, V_T, null)
    return v_g.at(None if v_g.kappa is None else source(X_T, T, T, y))


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
    v_g = guided(SelfGuidance(omega=omega, kappa=kappa, interval=INTERVAL))
    np.testing.assert_allclose(v_g, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_teacher_guides_every_sample(scale):
    effective = column(np.where(WITHIN, scale, 1.0))
    expected = UNCONDITIONAL + effective * (CONDITIONAL - UNCONDITIONAL)
    v_g = guided(TeacherGuidance(scale=scale, interval=INTERVAL))
    np.testing.assert_allclose(v_g, expected, rtol=1e-5, atol=1e-5)


def test_effective_scale_of_self_guidance():
    """With u(t, t, y) = v_g the fixed point is v_null + omega / (1 - kappa) (v_t - v_null)."""
    guidance = SelfGuidance(omega=1.2, kappa=0.4)
    scale = 1.2 / (1 - 0.4)
    fixed = UNCONDITIONAL + scale * (V_T - UNCONDITIONAL)

    def consistent(x_t, t, r, y):
        return jnp.where(per_sample(y.labels == NULL, x_t), UNCONDITIONAL, fixed)

    labels = ClassLabels(jnp.zeros(6, jnp.int32), num_classes=NULL)
    v_g = velocity_of(guidance, consistent, labels, jnp.zeros(6, bool))
    np.testing.assert_allclose(v_g, fixed, rtol=1e-5, atol=1e-5)


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
    conditions = []

    def counted(x_t, t, r, y):
        conditions.append(y)
        return flow_map(x_t, t, r, y)

    velocity_of(guidance, counted, Y, DROPPED)
    assert len(conditions) == calls


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (SelfGuidance(omega=1.0, kappa=0.6, interval=INTERVAL), ACTIVE),
        (TeacherGuidance(scale=2.0, interval=INTERVAL), WITHIN),
    ],
)
def test_the_unconditional_pass_is_needed_where_its_velocity_has_a_coefficient(guidance, rows):
    np.testing.assert_array_equal(unconditional_needed(guidance, T, DROPPED), rows)
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfGuidance(kappa=1.0), r"^kappa=1\.0: "),
        (lambda: SelfGuidance(kappa=NAN), "^kappa=nan: "),
        (lambda: SelfGuidance(kappa=-INFINITY), "^kappa=-inf: "),
        (lambda: SelfGuidance(omega=NAN), "^omega=nan: "),
        (lambda: SelfGuidance(omega=INFINITY), "^omega=inf: "),
        (lambda: SelfGuidance(interval=(0.6, 0.4)), r"^interval=\(0\.6, 0\.4\): "),
        # Values that are no pair, which nothing else refuses.
        (lambda: check_interval("interval", 0.5), r"^interval=0\.5: give \(start, end\)"),
        (lambda: check_interval("interval", (0.5,)), r"^interval=\(0\.5,\): give \(start, end\)"),
        (lambda: check_interval("interval", "ab"), "^interval=ab: give "),
        (lambda: SelfGuidance(interval=(0.0, NAN)), r"^interval=\(0\.0, nan\): "),
        (lambda: TeacherGuidance(interval=(0.0, 2.0)), r"^interval=\(0\.0, 2\.0\): "),
        (lambda: TeacherGuidance(scale=NAN), "^scale=nan: "),
        (lambda: SelfGuidance(omega=-1.0), r"^omega=-1\.0: give a number from 0 to 1000"),
        (lambda: SelfGuidance(kappa=-0.5), r"^kappa=-0\.5: .* from 0 to below 1"),
        (lambda: TeacherGuidance(scale=-1.0), r"^scale=-1\.0: give a number from 0 to 1000"),
    ],
)  # fmt: skip
def test_invalid_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_drawn_guidance_is_that_of_each_sample():
    """Scale (1 - kappa) and kappa where t lies in the sample's own interval, none elsewhere."""
    guidance = DrawnGuidance(kappa=0.5)
    drawn = GuidanceInput(
        scale=jnp.asarray([2.0, 4.0, 3.0, 5.0]),
        start=jnp.asarray([0.2, 0.2, 0.4, 0.0]),
        end=jnp.asarray([0.8, 0.5, 0.9, 1.0]),
    )
    dropped = jnp.asarray([False, False, False, True])
    omega, kappa = guidance.coefficients(jnp.asarray([0.2, 0.6, 0.9, 0.5]), dropped, drawn)
    np.testing.assert_allclose(omega, [1.0, 1.0, 1.5, 1.0])
    np.testing.assert_allclose(kappa, [0.5, 0.0, 0.5, 0.0])


@pytest.mark.parametrize(("power", "largest"), [
    (1.0, 8.0), (2.0, 8.0), (1 + 1e-7, 8.0), (-20.0, 100.0), (40.0, 1000.0),
])
def test_scales_are_drawn_from_their_density(power, largest):
    """In proportion to scale^-power on [1, M], by its distribution function."""
    guidance = DrawnGuidance(power=power, max_scale=largest, start_range=(0.1, 0.3),
                             end_range=(0.6, 1.0))
    drawn = guidance.draw(jax.random.key(0), 20_000)
    scales, log_max = np.asarray(drawn.scale, np.float64), (1 - power) * np.log(largest)
    assert (scales >= 1).all() and (scales <= largest).all()
    shares = (np.log(scales) / np.log(largest) if power == 1 else
              np.expm1((1 - power) * np.log(scales)) / np.expm1(log_max))
    assert stats.kstest(shares, stats.uniform.cdf).pvalue > 0.01
    for ends, (least, most) in ((drawn.start, (0.1, 0.3)), (drawn.end, (0.6, 1.0))):
        assert least <= ends.min() < least + 0.01
        assert most - 0.01 < ends.max() <= most


@pytest.mark.parametrize(("fields", "message"), [
    ({"kappa": 1.0}, "^kappa=1.0"),
    ({"kappa": 1 - 1e-8}, "^kappa=0.99999999: .* below 1, in float32 too$"),
    ({"max_scale": 1.0}, "^max_scale=1.0: .* more than 1"),
    ({"max_scale": INFINITY}, "^max_scale=inf: "),
    ({"power": NAN}, "^power=nan: "),
    ({"start_range": (0.0, 0.7)}, "^start_range=.*must end before end_range=.* begins"),
    ({"end_range": (0.8, 0.5)}, "^end_range="),
])  # fmt: skip
def test_invalid_fields_of_drawn_guidance_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        DrawnGuidance(**fields)
