"""Guidance at sampling: classifier-free guidance of any condition, and guidance as an input."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.errors import InputError
from dmf.objectives.interpolants import per_sample
from dmf.sampling.guidance import (
    SamplingGuidance,
    autoguidance,
    classifier_free,
    guidance_as_input,
)
from dmf.sampling.samplers import sample
from dmf.types import ClassLabels, Condition, GuidanceInput

NAN = float("nan")
NULL = 3
INTERVAL = (0.25, 0.75)
# Inside the interval, at both ends, below, above; then inside with the null label.
T = jnp.asarray([0.5, 0.25, 0.75, 0.2, 0.8, 0.5])
Y = ClassLabels(jnp.asarray([0, 1, 2, 0, 1, NULL]), num_classes=NULL)
WITHIN = np.asarray([True, True, True, False, False, True]).reshape(-1, 1, 1, 1)
X_T = jax.random.normal(jax.random.key(0), (6, 2, 2, 1))


def flow_map(x_t: jax.Array, t: jax.Array, r: jax.Array, y: ClassLabels) -> jax.Array:
    """A flow map that depends on all its inputs, and differs between all labels."""
    level = 1.0 + y.labels.astype(jnp.float32) + 10.0 * t - 3.0 * r
    return jnp.sin(x_t) + per_sample(level, x_t)


def test_scale_1_returns_the_flow_map_itself():
    assert classifier_free(flow_map, SamplingGuidance(scale=1.0)) is flow_map


def test_classifier_free_guidance_inside_its_closed_interval():
    r = T / 2
    u = np.asarray(flow_map(X_T, T, r, Y))
    u_null = np.asarray(flow_map(X_T, T, r, Y.null()))
    expected = np.where(WITHIN, u_null + 2.5 * (u - u_null), u)
    guided_map = classifier_free(flow_map, SamplingGuidance(scale=2.5, interval=INTERVAL))
    np.testing.assert_allclose(guided_map(X_T, T, r, Y), expected, rtol=1e-5, atol=1e-5)


def test_guidance_of_the_first_channels_leaves_the_others_conditional():
    """As the published sampling of DiT and SiT, which guides three of four latent channels."""
    def four_channels(x_t, t, r, y):
        factors = jnp.asarray([1.0, 2.0, -3.0, 4.0]).reshape(1, 1, 1, 4)
        return jnp.sin(x_t) + per_sample(y.labels * t, x_t) * factors

    x_t, y = jnp.tile(X_T, 4), Y
    u, u_null = (np.asarray(four_channels(x_t, T, T, one)) for one in (y, y.null()))
    for interval in ((0.0, 1.0), INTERVAL):
        guided_map = classifier_free(
            four_channels, SamplingGuidance(scale=2.5, interval=interval, channels=3)
        )
        active = (WITHIN | (interval != INTERVAL)) & (np.arange(4) < 3)
        expected = np.where(active, u_null + 2.5 * (u - u_null), u)
        ours = guided_map(x_t, T, T, y)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(ours[..., 3], u[..., 3])


@pytest.mark.parametrize(
    "guidance", [SamplingGuidance(scale=1.0), SamplingGuidance(scale=2.5, interval=(0.1, 0.2))]
)
def test_a_step_without_guidance_still_moves(guidance):
    """Neither time of the two steps lies in the interval."""
    plain = sample(flow_map, X_T, Y, steps=2)
    guided_samples = sample(classifier_free(flow_map, guidance), X_T, Y, steps=2)
    np.testing.assert_allclose(guided_samples, plain, rtol=1e-5, atol=1e-5)
    assert jnp.abs(guided_samples - X_T).min() > 0.1


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
    """The conditional and the unconditional pass are one call where any time lies in the interval;
    elsewhere there is the conditional pass alone. The times are known only at run time."""
    counts = []

    def counted(x_t, t, r, y):
        jax.debug.callback(lambda x_t: counts.append(len(x_t)), x_t)
        return flow_map(x_t, t, r, y)

    guided_map = classifier_free(counted, SamplingGuidance(scale=2.0, interval=interval))
    jax.jit(guided_map)(X_T, jnp.asarray(t), T, Y)
    jax.effects_barrier()
    assert counts == [rows]


def test_outside_its_interval_guidance_is_the_flow_map_to_the_bit():
    t = jnp.full(6, 0.2)
    guided_map = classifier_free(flow_map, SamplingGuidance(scale=2.5, interval=INTERVAL))
    np.testing.assert_array_equal(guided_map(X_T, t, T, Y), flow_map(X_T, t, T, Y))


def test_guidance_of_a_flow_map_of_less_precision():
    def coarse(x_t, t, r, y):
        return flow_map(x_t, t, r, y).astype(jnp.bfloat16)

    for interval in (INTERVAL, (0.0, 1.0)):
        guidance = SamplingGuidance(scale=2.0, interval=interval)
        coarse_samples, fine_samples = (
            sample(classifier_free(each, guidance), X_T, Y, steps=2) for each in (coarse, flow_map)
        )
        np.testing.assert_allclose(coarse_samples, fine_samples, atol=0.3)


def test_guidance_changes_the_samples_it_covers():
    plain = sample(flow_map, X_T, Y, steps=2)
    guidance = SamplingGuidance(scale=2.0, interval=(0.5, 0.5))
    guided_samples = sample(classifier_free(flow_map, guidance), X_T, Y, steps=2)
    changed = jnp.abs(guided_samples - plain).max(axis=(1, 2, 3)) > 0.1
    np.testing.assert_array_equal(changed, Y.labels != NULL)


def test_a_network_without_labels_is_sampled_without_guidance():
    y = ClassLabels(jnp.zeros(6, jnp.int32), num_classes=0)
    sample(classifier_free(flow_map, SamplingGuidance(scale=1.0)), X_T, y)
    with pytest.raises(InputError, match=r"^model\.num_classes=0: .* no labels .*scale to 1$"):
        classifier_free(flow_map, SamplingGuidance(scale=2.0))(X_T, T, T, y)


def test_guidance_as_an_input_of_the_network():
    def inputs(x_t, t, r, y):
        values = jnp.stack([y.condition.labels.astype(jnp.float32), *y.guidance], axis=1)
        return values.reshape(2, 2, 2, 1)

    guided_map = guidance_as_input(inputs, SamplingGuidance(scale=2.5, interval=(0.1, 0.7)))
    labels = ClassLabels(jnp.arange(2), num_classes=NULL)
    given = guided_map(X_T[:2], T[:2], T[:2], labels)
    np.testing.assert_allclose(given.reshape(2, 4), [[0, 2.5, 0.1, 0.7], [1, 2.5, 0.1, 0.7]])


def guide(x_t, t, r, y):
    """A worse flow map, of the same condition."""
    return flow_map(x_t, t, r, y) - per_sample(0.1 + t * y.labels, x_t)


@pytest.mark.parametrize("interval", [(0.0, 1.0), INTERVAL])
def test_autoguidance_is_its_formula_inside_its_interval(interval):
    u, u_guide = (np.asarray(each(X_T, T, T / 2, Y)) for each in (flow_map, guide))
    guidance = SamplingGuidance(scale=2.5, interval=interval)
    active = WITHIN | (interval != INTERVAL)
    expected = np.where(active, u_guide + 2.5 * (u - u_guide), u)
    guided = autoguidance(flow_map, guide, guidance)(X_T, T, T / 2, Y)
    np.testing.assert_allclose(guided, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(guided - u).max(where=active, initial=0) > 0.1
    itself = autoguidance(flow_map, flow_map, guidance)(X_T, T, T / 2, Y)
    np.testing.assert_array_equal(itself, u)
    assert autoguidance(flow_map, guide, SamplingGuidance(interval=interval)) is flow_map


def test_a_guide_needs_no_null_and_may_have_another_precision():
    """Its condition may be anything that the network knows, also labels that have no null."""
    def coarse(x_t, t, r, y):
        return guide(x_t, t, r, y).astype(jnp.bfloat16)

    guidance, y = SamplingGuidance(scale=2.0, interval=INTERVAL), Y.replace(num_classes=0)
    guided = autoguidance(flow_map, coarse, guidance)(X_T, T, T, y)
    fine = autoguidance(flow_map, guide, guidance)(X_T, T, T, y)
    np.testing.assert_allclose(guided, fine, atol=0.2)


@pytest.mark.parametrize("guidance", [
    SamplingGuidance(scale=2.5, interval=INTERVAL), SamplingGuidance(scale=0.0),
])  # fmt: skip
def test_one_program_serves_every_scale_and_interval(guidance):
    @jax.jit
    def program(values):
        return [made(guidance.shared, values)(X_T, T, T / 2, Y) for made in (
            lambda *parts: classifier_free(flow_map, *parts),
            lambda *parts: autoguidance(flow_map, guide, *parts),
        )]  # fmt: skip

    shared = program(GuidanceInput(*map(jnp.float32, guidance.values)))
    expected = (classifier_free(flow_map, guidance)(X_T, T, T / 2, Y),
                autoguidance(flow_map, guide, guidance)(X_T, T, T / 2, Y))  # fmt: skip
    for ours, its in zip(shared, expected, strict=True):
        np.testing.assert_allclose(ours, its, rtol=1e-5, atol=1e-5)


class Text(flax.struct.PyTreeNode):
    """A condition that is no label: a vector for each of several tokens, and which are present."""

    tokens: jax.Array
    present: jax.Array

    @property
    def count(self):
        return self.tokens.shape[0]

    def drop(self, dropped):
        return self.replace(present=self.present & ~dropped[:, None])

    def null(self):
        return self.drop(jnp.ones(self.count, bool))


def text_map(x_t, t, r, y):
    """The mean of the tokens that are present moves the sample; without a token nothing does."""
    mean = (y.tokens * y.present[..., None]).sum((1, 2)) / jnp.maximum(y.present.sum(1), 1)
    return jnp.sin(x_t) + per_sample(t - r + mean, x_t)


TEXT = Text(jax.random.normal(jax.random.key(2), (6, 5, 4)), jnp.tri(6, 5, -1, bool))


@pytest.mark.parametrize("interval", [(0.0, 1.0), INTERVAL])
def test_guidance_of_a_condition_that_is_no_label(interval):
    """Guidance never looks inside a condition. The first sample has no token, so its condition is
    null already."""
    assert isinstance(TEXT, Condition)
    guidance = SamplingGuidance(scale=3.0, interval=interval)
    guided_map = jax.jit(classifier_free(text_map, guidance))
    u, u_null = (text_map(X_T, T, T / 2, y) for y in (TEXT, TEXT.null()))
    active = WITHIN if interval == INTERVAL else True
    expected = np.where(active, u_null + 3 * (u - u_null), u)
    guided = guided_map(X_T, T, T / 2, TEXT)
    np.testing.assert_allclose(guided, expected, rtol=1e-5, atol=1e-5)
    moved = jnp.abs(guided - u).max((1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(moved, np.ravel(np.arange(6) > 0) & np.ravel(active))


def test_samples_of_a_condition_that_is_no_label():
    """Along v = mean, guided by 2, a sample moves from x to x - 2 mean in any number of steps."""
    straight = classifier_free(lambda x_t, t, r, y: text_map(0 * x_t, t, t, y),
                               SamplingGuidance(scale=2.0))
    mean = text_map(0 * X_T, T, T, TEXT)
    for steps in (1, 3):
        np.testing.assert_allclose(
            sample(straight, X_T, TEXT, steps=steps), X_T - 2 * mean, atol=1e-5
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingGuidance(interval=(-1.0, 1.0)), r"^interval=\(-1\.0, "),
        (lambda: SamplingGuidance(scale=NAN), r"^scale=nan: "),
        (lambda: SamplingGuidance(scale=-1.0), r"^scale=-1.0: give a number from 0 to 1000"),
        (lambda: SamplingGuidance(channels=-1), r"^channels=-1: "),
        (lambda: classifier_free(flow_map, SamplingGuidance(scale=2.0, channels=2))(X_T, T, T, Y),
         r"^channels=2: samples have 1 channels; give 0 to guide all of them$"),
        (lambda: guidance_as_input(flow_map, SamplingGuidance(scale=2.0, channels=1)),
         r"^channels=1: a network that takes its guidance as an input guides all channels"),
        (lambda: guidance_as_input(flow_map, SamplingGuidance(scale=0.5)),
         r"^scale=0\.5: .* is trained with scales from 1 on; give 1, "),
        (lambda: classifier_free(flow_map, SamplingGuidance(scale=2.0))(X_T, T, T, Y.labels),
         r"^y=Array.*: guidance needs a condition that has a null; give ClassLabels\("),
    ],
)  # fmt: skip
def test_invalid_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
