"""A sweep file becomes runs under names that are readable, safe, unique, and their own."""

import pytest

from dmf import sweeping
from dmf.typing import InputError


def names(*sweep):
    return [variant.name for variant in sweeping.variants(sweep)]


def written(tmp_path, text):
    path = tmp_path / "sweep.py"
    path.write_text(text)
    return str(path)


def test_a_run_is_called_after_its_overrides():
    assert names({"model.split_depth": 3, "seed": 0}) == ["split_depth=3,seed=0"]
    assert names({"objective.guidance.kappa": 0.6}) == ["kappa=0.6"]
    assert names({}) == ["base"]
    assert names({"sampling.steps": (1, 2), "model.scan": True}) == ["scan=True,steps=1+2"]


def test_a_name_depends_neither_on_the_order_nor_on_the_other_runs():
    one, other = {"model.split_depth": 3, "seed": 0}, {"seed": 0, "model.split_depth": 4}
    alone = {names(one)[0], names(other)[0]}
    assert set(names(one, other)) == set(names(other, one)) == alone
    assert names(dict(reversed(one.items()))) == names(one)
    path = {"init.checkpoint": "runs/a b/c"}
    assert names(path, one) == names(path) + names(one)


def test_fields_that_end_alike_keep_what_tells_them_apart():
    assert names({"init.ema": "a", "teacher.ema": "b", "sampling.ema": "c", "seed": 1}) == [
        "init.ema=a,sampling.ema=c,seed=1,teacher.ema=b"
    ]
    assert names({"times.first.mean": 0.1, "times.second.mean": 0.2}) == [
        "first.mean=0.1,second.mean=0.2"
    ]


def test_a_name_is_safe_short_and_unique():
    awkward = ["/abs/x", "../x", "a b", "a\nb", "ä", "x" * 300, "x" * 301, "", "*", "?"]
    found = names(*({"init.checkpoint": text} for text in awkward))
    assert len(set(found)) == len(awkward)
    for name in found:
        assert len(name) <= sweeping.LONGEST
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789_=,.+-")
    # The text and the number look alike; their digests do not.
    one, other = names({"a": "1+2"}, {"a": (1, 2)})
    assert one != other and one.startswith("a=1+2-")


def test_overrides_are_flags_of_train():
    (variant,) = sweeping.variants([{"a.b": (1, 2), "c": 0.5, "d": False, "e": "x y"}])
    assert variant.flags == [
        "--config.a.b=(1, 2)", "--config.c=0.5", "--config.d=False", "--config.e=x y"
    ]


def test_a_grid_has_every_combination():
    found = list(sweeping.grid({"a": (1, 2), "seed": range(3)}))
    assert len(found) == 6
    assert found[:2] == [{"a": 1, "seed": 0}, {"a": 1, "seed": 1}]


@pytest.mark.parametrize("verb", ["return [{'b': [1], 'a': 2}]", "yield {'b': [1], 'a': 2}"])
def test_a_file_gives_its_runs(tmp_path, verb):
    found = sweeping.read(written(tmp_path, f"def get_sweep():\n    {verb}\n"))
    (variant,) = sweeping.variants(found)
    assert list(variant.overrides.items()) == [("a", 2), ("b", (1,))]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = 1", "KeyError: 'get_sweep'"),
        ("def get_sweep(): return 1 / 0", "ZeroDivisionError"),
        ("def get_sweep(:", "SyntaxError"),
        ("def get_sweep(): return [3]", "and not 3"),
        ("def get_sweep(): return []", "gives no run"),
    ],
)
def test_another_file_is_refused(tmp_path, text, named):
    with pytest.raises(InputError, match=named) as error:
        sweeping.read(written(tmp_path, text))
    assert "sweep.py: " in str(error.value)
    assert "\n" not in str(error.value) or named == "SyntaxError"
    with pytest.raises(InputError, match=r"--sweep=nowhere.py: no such file"):
        sweeping.read("nowhere.py")


@pytest.mark.parametrize(
    ("sweep", "named"),
    [
        ([{"seed": 1}, {"a": 2}, {"seed": 1}], "seed=1 and seed=1: .* twice"),
        ([{}, {}], "nothing set"),
        ([{"a b": 1}], "a b=1: give fields by dotted name"),
        ([{"a": {"name": "x"}}], "a={'name': 'x'}: a sweep sets numbers"),
        ([{"a": None}], "a=None: a sweep sets numbers"),
    ],
)
def test_runs_that_cannot_be_are_refused(sweep, named):
    with pytest.raises(InputError, match=named):
        sweeping.variants(sweep)
