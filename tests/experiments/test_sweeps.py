"""A sweep file becomes runs under names that are readable, safe, unique, and their own."""

import re

import numpy as np
import pytest

from dmf.errors import InputError
from dmf.experiments import sweeps


def names(*sweep):
    return [variant.name for variant in sweeps.variants(sweep)]


def written(tmp_path, text):
    path = tmp_path / "sweep.py"
    path.write_text(text)
    return str(path)


def test_a_run_is_called_after_its_overrides():
    assert names({"model.split_depth": 3, "seed": 0}) == ["model.split_depth=3,seed=0"]
    assert names({"objective.guidance.kappa": 0.6}) == ["objective.guidance.kappa=0.6"]
    assert names({}) == ["base"]
    assert names({"sampling.steps": (1, 2), "model.scan": True}) == [
        "model.scan=True,sampling.steps=1+2"
    ]
    assert names({"optimizer.learning_rate": 1e30}) == ["optimizer.learning_rate=1e+30"]


def test_a_name_depends_neither_on_the_order_nor_on_the_other_runs():
    runs = [
        {"model.split_depth": 3, "seed": 0}, {"seed": 0, "model.split_depth": 4},
        {"init.ema": "a"}, {"teacher.ema": "a"}, {"init.ema": "a", "teacher.ema": "b"},
        {"init.checkpoint": "runs/a b/c"}, {"seed": 1}, {"seed": "1"}, {},
        {"sampling.steps": (1,)}, {"sampling.steps": 1}, {"sampling.steps": "1"},
    ]  # fmt: skip
    alone = [names(run)[0] for run in runs]
    assert names(*runs) == alone and names(*reversed(runs)) == alone[::-1]
    assert len(set(alone)) == len(runs)
    assert names(dict(reversed(runs[0].items()))) == alone[:1]
    assert alone[2:5] == ["init.ema=a", "teacher.ema=a", "init.ema=a,teacher.ema=b"]


def test_a_name_is_safe_short_and_unique():
    awkward = ["/abs/x", "../x", "a b", "a\nb", "ä", "x" * 300, "x" * 301, "", "*", "?"]
    found = names(*({"init.checkpoint": text} for text in awkward))
    assert len(set(found)) == len(awkward)
    for name in found:
        assert len(name) <= sweeps.MAX_NAME_LENGTH
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789_=,.+-")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1+2", (1, 2)), ("1", 1), ("1.0", 1.0), ("True", True), ("1e+30", 1e30), ("nan", np.nan),
     ("a+b", ("a", "b"))],
)  # fmt: skip
def test_text_that_looks_like_another_value_is_told_by_a_digest(text, value):
    assert names({"a": value}) == [f"a={text}"]
    (name,) = names({"a": text})
    assert re.fullmatch(rf"a={re.escape(text)}-[0-9a-f]{{8}}", name)


def test_text_cannot_pass_for_another_field():
    (name,) = names({"a": "1,b=2"})
    assert re.fullmatch("a=1,b=2-[0-9a-f]{8}", name) and names({"a": 1, "b": 2}) == ["a=1,b=2"]


def test_numbers_of_numpy_are_numbers():
    (variant,) = sweeps.variants([{"a": np.float64(0.1), "b": tuple(np.linspace(0, 1, 3))}])
    assert variant.name == "a=0.1,b=0.0+0.5+1.0"
    assert variant.flags == ["--config.a=0.1", "--config.b=(0.0, 0.5, 1.0)"]


def test_overrides_are_flags_of_train():
    (variant,) = sweeps.variants([{"a.b": (1, 2), "c": 0.5, "d": False, "e": "x y"}])
    assert variant.flags == [
        "--config.a.b=(1, 2)", "--config.c=0.5", "--config.d=False", "--config.e=x y"
    ]


def test_a_grid_has_every_combination():
    found = list(sweeps.grid({"a": (1, 2), "seed": range(3)}))
    assert len(found) == 6
    assert found[:2] == [{"a": 1, "seed": 0}, {"a": 1, "seed": 1}]


@pytest.mark.parametrize("verb", ["return [{'b': [1], 'a': 2}]", "yield {'b': [1], 'a': 2}"])
def test_a_file_gives_its_runs(tmp_path, verb):
    found = sweeps.read_sweep(written(tmp_path, f"def get_sweep():\n    {verb}\n"))
    (variant,) = sweeps.variants(found)
    assert list(variant.overrides.items()) == [("a", 2), ("b", (1,))]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = 1", "KeyError: 'get_sweep'"),
        ("def get_sweep(): return 1 / 0", "ZeroDivisionError"),
        ("def get_sweep(:", "SyntaxError"),
        ("def get_sweep(): return [3]", "and not 3"),
        ("def get_sweep(): return []", "returns no run"),
    ],
)
def test_another_file_is_refused(tmp_path, text, named):
    with pytest.raises(InputError, match=named) as error:
        sweeps.read_sweep(written(tmp_path, text))
    assert "sweep.py: " in str(error.value)
    assert "\n" not in str(error.value) or named == "SyntaxError"
    with pytest.raises(InputError, match=r"--sweep=nowhere.py: no such file"):
        sweeps.read_sweep("nowhere.py")


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
        sweeps.variants(sweep)
