"""Conditions: class labels, and a condition together with guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.errors import InputError
from dmf.types import ClassLabels, Condition, GuidanceInput, GuidedCondition

LABELS = ClassLabels(jnp.array([3, 7, 10]), num_classes=10)
GUIDANCE = GuidanceInput(jnp.array([1.0, 2.0, 3.0]), jnp.zeros(3), jnp.ones(3))
GUIDED = GuidedCondition(LABELS, GUIDANCE)


@pytest.mark.parametrize("condition", [LABELS, GUIDED], ids=["labels", "guided"])
def test_conditions_follow_the_protocol(condition):
    assert isinstance(condition, Condition)
    assert condition.count == 3
    assert {leaf.shape for leaf in jax.tree.leaves(condition)} == {(3,)}
    halves = jax.tree.map(lambda leaf: leaf[:2], condition)
    assert type(halves) is type(condition)
    assert halves.count == 2


def test_integers_are_no_condition():
    assert not isinstance(jnp.arange(3), Condition)
    assert not isinstance(np.arange(3), Condition)


def test_dropped_labels_are_the_null_label():
    dropped = LABELS.drop(jnp.array([False, True, False]))
    assert dropped.labels.tolist() == [3, 10, 10]
    assert dropped.num_classes == 10
    assert LABELS.labels.tolist() == [3, 7, 10]
    assert LABELS.drop(jnp.zeros(3, bool)).labels.tolist() == [3, 7, 10]


def test_the_null_condition_drops_every_label():
    assert LABELS.null().labels.tolist() == [10, 10, 10]
    assert LABELS.null().labels.dtype == LABELS.labels.dtype


def test_a_network_without_labels_has_no_null_condition():
    """Label dropout leaves its only label, 0, as it is; an unconditional pass is refused."""
    labels = ClassLabels(jnp.zeros(2, jnp.int32), num_classes=0)
    assert labels.drop(jnp.array([True, False])).labels.tolist() == [0, 0]
    with pytest.raises(InputError, match=r"^model\.num_classes=0: .*no labels.*scale to 1$"):
        labels.null()
    with pytest.raises(InputError, match=r"^model\.num_classes=0: "):
        GuidedCondition(labels, GUIDANCE).null()


def test_a_dropped_guided_condition_keeps_its_guidance():
    dropped = GUIDED.drop(jnp.array([True, False, False]))
    assert dropped.condition.labels.tolist() == [10, 7, 10]
    np.testing.assert_array_equal(dropped.guidance.scale, GUIDANCE.scale)


def test_the_null_of_a_guided_condition_has_no_guidance():
    assert isinstance(GUIDED.null(), ClassLabels)
    assert GUIDED.null().labels.tolist() == [10, 10, 10]


def test_a_condition_passes_through_transformations():
    """Its arrays are traced; the number of classes is static."""
    dropped = jax.jit(lambda y: y.drop(y.labels == 7))(LABELS)
    assert dropped.labels.tolist() == [3, 10, 10]
    assert dropped.num_classes == 10
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), LABELS, LABELS.null())
    assert joined.labels.tolist() == [3, 7, 10, 10, 10, 10]
