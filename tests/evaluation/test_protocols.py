"""Protocols of evaluation: roundings against exact arithmetic, labels of samples, and choices."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from dmf.data.pixels import ROUNDINGS, to_uint8
from dmf.errors import InputError
from dmf.evaluation.protocols import PROTOCOLS, Protocol
from dmf.registry import components
from dmf.sampling.class_labels import LABEL_SAMPLING, class_labels

# floor(numerator / denominator + 1/2), and so on, of whole numbers: none of it rounds in between.
EXACT = {
    "nearest": lambda n, d: round(Fraction(n, d)),
    "half_up": lambda n, d: (2 * n + d) // (2 * d),
    "down": lambda n, d: n // d,
}
over_roundings = pytest.mark.parametrize("rounding", ROUNDINGS)


def rounded(x: np.ndarray, rounding: str) -> list[int]:
    """8 bits of numbers, as if they were an image."""
    levels = to_uint8(x.astype(np.float32)[:, None, None], rounding)
    assert levels.dtype == jnp.uint8
    assert levels.shape == (len(x), 1, 1)
    return np.asarray(levels).ravel().tolist()


@over_roundings
def test_levels_round_as_whole_numbers_do(rounding):
    parts = np.arange(255 * 64 + 1)
    actual = ROUNDINGS[rounding](jnp.asarray(parts / 64, jnp.float32))
    expected = [EXACT[rounding](n, 64) for n in parts.tolist()]
    assert np.asarray(actual).tolist() == expected


@over_roundings
def test_values_round_as_exact_arithmetic_does(rounding):
    # Multiples of 2^-12, whose levels have no more than 21 bits; some are beyond -1 and 1.
    parts = np.arange(-2 * 4096, 2 * 4096 + 1)
    clipped = parts.clip(-4096, 4096) + 4096
    expected = [EXACT[rounding](255 * n, 2 * 4096) for n in clipped.tolist()]
    assert rounded(parts / 4096, rounding) == expected
    assert (expected[0], expected[-1]) == (0, 255)


@pytest.mark.parametrize(
    ("rounding", "levels"),
    [("nearest", lambda n: n + n % 2), ("half_up", lambda n: n + 1), ("down", lambda n: n)],
    ids=["nearest", "half_up", "down"],
)
def test_halves_go_to_the_even_level_or_up_or_down(rounding, levels):
    lower = np.arange(255)
    x = ((2 * lower + 1) / 255 - 1).astype(np.float32)
    halves = (x + 1) * np.float32(127.5) == lower + np.float32(0.5)
    assert halves.sum() > 50
    assert {0, 1} == set((lower[halves] % 2).tolist())
    assert rounded(x[halves], rounding) == levels(lower[halves]).tolist()


@over_roundings
@pytest.mark.parametrize(("value", "level"), [(-np.inf, 0), (-1.5, 0), (-1, 0), (1, 255),
                                              (1.001, 255), (3e38, 255), (np.inf, 255)])
def test_what_is_beyond_is_clipped(rounding, value, level):
    assert rounded(np.array([value]), rounding) == [level]


# Labels.


@pytest.mark.parametrize("seed", [0, 3])
def test_balanced_labels_are_in_turn(seed):
    assert class_labels(np.arange(7), 3, seed=seed).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert class_labels(np.array([5, 4, 9]), 3, "balanced", seed).tolist() == [2, 1, 0]
    assert (np.bincount(class_labels(np.arange(1000), 10)) == 100).all()


def test_a_random_label_depends_on_seed_and_index_alone():
    every = class_labels(np.arange(300), 10, "random", 7)
    for indices in (np.arange(300)[::-1], np.arange(100, 140), np.array([299, 5, 5, 0])):
        np.testing.assert_array_equal(class_labels(indices, 10, "random", 7), every[indices])
    other = class_labels(np.arange(300), 10, "random", 8)
    assert 0.8 < np.mean(every != other) < 0.98
    assert 0.8 < np.mean(every[1:] != every[:-1]) < 0.98


def test_random_labels_are_of_all_classes_alike():
    counts = np.bincount(class_labels(np.arange(10_000), 10, "random"), minlength=10)
    assert counts.shape == (10,)
    # Nine degrees of freedom: 27.9 is passed once in a thousand seeds.
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9
    assert class_labels(np.arange(10_000), 1000, "random").max() == 999


@pytest.mark.parametrize("how", LABEL_SAMPLING)
def test_without_classes_every_label_is_0(how):
    actual = class_labels(np.arange(5), 0, how, 3)
    assert actual.tolist() == [0] * 5
    assert actual.dtype == class_labels(np.arange(5), 2, how, 3).dtype == np.int32


# Protocols.


@pytest.mark.parametrize(
    ("name", "metrics", "rounding", "label_sampling", "features", "stored"),
    [
        ("adm", ("fid", "sfid", "inception_score", "precision", "recall"), "down", "random",
         ("pool3", "probabilities", "spatial"), ("pool3",)),
        ("edm2", ("fid", "fd_dinov2"), "down", "random", ("dinov2", "pool3"), ()),
        ("meanflow", ("fid", "inception_score"), "half_up", "random",
         ("pool3", "probabilities"), ()),
        ("pixels", ("fd_pixels", "label_agreement"), "nearest", "balanced",
         ("pixels",), ("pixels",)),
    ],
)
def test_what_each_protocol_measures(name, metrics, rounding, label_sampling, features, stored):
    protocol = PROTOCOLS[name]
    assert protocol == Protocol(metrics=metrics, rounding=rounding, label_sampling=label_sampling)
    assert protocol.metrics == metrics
    assert (protocol.features, protocol.stored_features) == (features, stored)


def test_every_metric_has_its_features():
    plain = {"rounding": "down", "label_sampling": "random"}
    expected = {
        "fid": "pool3", "sfid": "spatial", "fd_dinov2": "dinov2", "fd_pixels": "pixels",
        "kid": "pool3", "inception_score": "probabilities", "precision": "pool3",
        "recall": "pool3", "label_agreement": "pixels",
    }  # fmt: skip
    assert components("metric").keys() == expected.keys()
    for name, kind in expected.items():
        protocol = Protocol(metrics=(name,), **plain)
        assert protocol.features == (kind,)
        stores = name in ("kid", "precision", "recall", "label_agreement")
        assert protocol.stored_features == ((kind,) if stores else ())
        stores |= name == "fd_pixels"
        assert protocol.stored_reference_features == ((kind,) if stores else ())
    assert Protocol(metrics=(), **plain).features == ()


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [("metrics", ("fid", "kd"), "kd"), ("rounding", "up", "up"),
     ("label_sampling", "even", "even")],
)
def test_what_no_protocol_can_be(field, given, value):
    fields = {"metrics": ("fid",), "rounding": "down", "label_sampling": "random"}
    choices = {"metrics": sorted(components("metric")), "rounding": ROUNDINGS,
               "label_sampling": LABEL_SAMPLING}[field]
    with pytest.raises(InputError, match=f"^{field}={value}: choose") as error:
        Protocol(**fields | {field: given})
    assert f"choose one of {', '.join(choices)}" in str(error.value)
    assert "\n" not in str(error.value)
