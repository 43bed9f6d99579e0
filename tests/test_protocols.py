"""Protocols of evaluation: roundings against exact arithmetic, labels of samples, and choices."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from dmf.images import ROUNDINGS, to_uint8
from dmf.protocols import LABELS, METRICS, PROTOCOLS, Protocol, labels_of
from dmf.typing import InputError

# floor(numerator / denominator + 1/2), and so on, of whole numbers: none of it rounds in between.
EXACT = {
    "nearest": lambda n, d: round(Fraction(n, d)),
    "half_up": lambda n, d: (2 * n + d) // (2 * d),
    "down": lambda n, d: n // d,
}
over_roundings = pytest.mark.parametrize("rounding", ROUNDINGS)


def rounded(x: np.ndarray, rounding: str) -> list[int]:
    """8 bits of numbers, as if they were an image."""
    made = to_uint8(x.astype(np.float32)[:, None, None], rounding)
    assert made.dtype == jnp.uint8
    assert made.shape == (len(x), 1, 1)
    return np.asarray(made).ravel().tolist()


@over_roundings
def test_levels_round_as_whole_numbers_do(rounding):
    parts = np.arange(255 * 64 + 1)
    found = ROUNDINGS[rounding](jnp.asarray(parts / 64, jnp.float32))
    expected = [EXACT[rounding](n, 64) for n in parts.tolist()]
    assert np.asarray(found).tolist() == expected


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
    assert labels_of(np.arange(7), 3, seed=seed).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert labels_of(np.array([5, 4, 9]), 3, "balanced", seed).tolist() == [2, 1, 0]
    assert (np.bincount(labels_of(np.arange(1000), 10)) == 100).all()


def test_a_random_label_depends_on_seed_and_index_alone():
    every = labels_of(np.arange(300), 10, "random", 7)
    for indices in (np.arange(300)[::-1], np.arange(100, 140), np.array([299, 5, 5, 0])):
        np.testing.assert_array_equal(labels_of(indices, 10, "random", 7), every[indices])
    other = labels_of(np.arange(300), 10, "random", 8)
    assert 0.8 < np.mean(every != other) < 0.98
    assert 0.8 < np.mean(every[1:] != every[:-1]) < 0.98


def test_random_labels_are_of_all_classes_alike():
    counts = np.bincount(labels_of(np.arange(10_000), 10, "random"), minlength=10)
    assert counts.shape == (10,)
    # Nine degrees of freedom: 27.9 is passed once in a thousand seeds.
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9
    assert labels_of(np.arange(10_000), 1000, "random").max() == 999


@pytest.mark.parametrize("how", LABELS)
def test_without_classes_every_label_is_0(how):
    found = labels_of(np.arange(5), 0, how, 3)
    assert found.tolist() == [0] * 5
    assert found.dtype == labels_of(np.arange(5), 2, how, 3).dtype == np.int32


# Protocols.


@pytest.mark.parametrize(
    ("name", "metrics", "rounding", "labels", "features", "kept"),
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
def test_what_each_protocol_measures(name, metrics, rounding, labels, features, kept):
    protocol = PROTOCOLS[name]
    assert protocol == Protocol(metrics=metrics, rounding=rounding, labels=labels)
    assert protocol.metrics == metrics
    assert (protocol.features, protocol.kept) == (features, kept)


def test_every_metric_has_its_features():
    plain = {"rounding": "down", "labels": "random"}
    for name, kind in METRICS.items():
        protocol = Protocol(metrics=(name,), **plain)
        assert protocol.features == (kind,)
        assert protocol.kept == ((kind,) if name in ("precision", "recall", "label_agreement")
                                 else ())
    assert Protocol(metrics=(), **plain).features == ()


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [("metrics", ("fid", "kid"), "kid"), ("rounding", "up", "up"), ("labels", "even", "even")],
)
def test_what_no_protocol_can_be(field, given, value):
    fields = {"metrics": ("fid",), "rounding": "down", "labels": "random"}
    choices = {"metrics": METRICS, "rounding": ROUNDINGS, "labels": LABELS}[field]
    with pytest.raises(InputError, match=f"^evaluation.{field}={value}: choose") as error:
        Protocol(**fields | {field: given})
    assert str(error.value).endswith(", ".join(choices))
    assert "\n" not in str(error.value)
