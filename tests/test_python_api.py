"""The Python API: `dmf.NAME`, and that a call does what the command does."""

import ast
import json
import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network
import tiny

import dmf
from dmf.cli import config_flag
from dmf.models.flow_map import NetworkFlowMap
from dmf.runtime.checksums import fingerprint

pytestmark = pytest.mark.usefixtures("small_network_registered")

X = jnp.ones((2, 1, 1, 1))


class Shifts:
    """A network that adds the label, with the parts of `Network` that a flow map calls."""

    num_classes, sample_shape = 10, (1, 1, 1)

    def condition(self, y):
        return y if isinstance(y, dmf.Condition) else dmf.ClassLabels(y, 10)

    def apply(self, params, x_t, t, r, y):
        return params * x_t * (t - r).reshape(-1, 1, 1, 1) + y.labels.reshape(-1, 1, 1, 1)


FLOW_MAP = NetworkFlowMap(params=2.0, network=Shifts())


def test_the_names_for_type_checkers_are_those_of_the_package():
    tree = ast.parse(pathlib.Path(dmf.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == dmf._HOME
    assert sorted(dmf.__all__) == sorted(dmf._HOME)


def test_help_tells_how_to_use_the_package():
    assert all(f"dmf.{name}(" in dmf.__doc__ for name in ("train", "evaluate", "load", "sample"))
    functions = [getattr(dmf, name) for name in dmf.__all__ if name != "FlowMap"]
    assert all(function.__doc__ for function in functions)


def test_times_of_a_flow_map_are_numbers_or_vectors():
    of_numbers = FLOW_MAP(X, 1, 0.5, [3, 7])
    np.testing.assert_array_equal(of_numbers.ravel(), [4, 8])
    of_vectors = FLOW_MAP(X, jnp.ones(2), jnp.full(2, 0.5), jnp.array([3, 7]))
    np.testing.assert_array_equal(of_numbers, of_vectors)
    np.testing.assert_array_equal(jax.jit(FLOW_MAP)(X, 1.0, 0.5, jnp.array([3, 7])), of_numbers)


@pytest.mark.parametrize(
    ("t", "y", "words"),
    [
        (1.0, [3, 37], "y=37: the 10 classes have the labels 0 to 9, and 10 is the null label"),
        (1.0, [-1, 3], "y=-1: the 10 classes"),
        (1.0, dmf.ClassLabels(np.array([3, 11]), 10), "y=11: the 10 classes"),
        (1.0, [3], "y: it has 1 conditions, and x_t has 2 samples; give one for each"),
        (1.0, 3, "y=3: give one label for each sample, as [3, 7]"),
        (1.0, [0.5, 1.0], "y: it has shape (2,) and dtype float32; labels are whole numbers"),
        (jnp.ones(3), [3, 7], "t: it has shape (3,), and x_t (2, 1, 1, 1); give a number, or one "
         "time for each sample [2]"),
    ],
)  # fmt: skip
def test_what_a_flow_map_refuses(t, y, words):
    with pytest.raises(dmf.InputError) as error:
        FLOW_MAP(X, t, 0.0, y)
    assert str(error.value).startswith(words)


def test_labels_are_checked_in_sampling_and_the_null_label_is_one():
    with pytest.raises(dmf.InputError, match=r"^y=37: "):
        dmf.sample(FLOW_MAP, X, [3, 37])
    np.testing.assert_array_equal(dmf.sample(FLOW_MAP, X, [3, 10]).ravel(), [-4, -11])


def test_a_config_in_python_is_that_of_the_command_line():
    overrides = {"run.steps": 7, "sampling.steps": (1, 8), "sampling.sampler.name": "ctm",
                 "sampling.sampler.gamma": 0.25, "data.mirror": True}
    flags = ["--config.run.steps=7", "--config.sampling.steps=1,8", "--config.data.mirror",
             "--config.sampling.sampler.name=ctm", "--config.sampling.sampler.gamma=0.25"]
    file = tiny.ROOT / "configs" / "digits_sit.py"
    made = dmf.config(file, overrides)
    assert made == config_flag.resolved("dmf:digits_sit", flags)
    assert (made.run.steps, made.sampling.sampler.gamma) == (7, 0.25)
    assert dmf.config(made) == made
    with pytest.raises(dmf.InputError, match=r"^--config=dmf:nothing: the package has alpha"):
        dmf.config("dmf:nothing")
    with pytest.raises(dmf.InputError, match=r"^--config.run.step=7: no such field; did you mean"):
        dmf.config(file, {"run.step": 7})


def test_loading_warns_of_nothing_and_takes_overrides(caplog):
    with caplog.at_level(logging.WARNING):
        flow_map, config = dmf.load(small_network.run(), ema="")
    assert not caplog.records
    assert flow_map.network.hidden == config.model.hidden == 12
    with pytest.raises(dmf.InputError, match="it has another architecture"):
        dmf.load(small_network.run(), {"model.hidden": 5})


@pytest.mark.slow
def test_calls_do_what_the_commands_do(tmp_path):
    config = small_network.config()
    state = dmf.train(config, tmp_path / "called", {"run.steps": 4})
    arguments = [f"--config={small_network.CONFIG}", "--config.run.steps=4"]
    assert tiny.dmf("train", *arguments, f"--workdir={tmp_path}/commanded") == 0
    loaded = [dmf.load(tmp_path / name, ema="")[0].params for name in ("called", "commanded")]
    assert fingerprint(loaded[0]) == fingerprint(loaded[1]) == fingerprint(
        {name: state.params[name] for name in loaded[0]})
    result = dmf.evaluate(tmp_path / "called", steps=(1, 2), count=72, output=tmp_path / "a.json")
    assert tiny.dmf("evaluate", f"--checkpoint={tmp_path}/commanded", "--steps=1,2", "--count=72",
                    f"--output={tmp_path}/b.json") == 0
    commanded = json.loads((tmp_path / "b.json").read_text())
    assert result["results"] == commanded["results"]
    reference = tmp_path / "reference.npz"
    assert dmf.evaluate(tmp_path / "called", make_reference=reference) == {}
    assert reference.exists()
    with pytest.raises(dmf.InputError, match=r"^--guide-ema=main: it is of --guide=DIR"):
        dmf.evaluate(tmp_path / "called", guide_ema="main")


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (tiny.ROOT / "docs" / "python.md").read_text()
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    assert [row["steps"] for row in names["scores"]] == [1, 4]
    assert names["path"].shape == (5, 10, 8, 8, 1)
    assert names["images"].dtype == np.uint8
    # The conversion changes what the last blocks see, and no parameter.
    assert fingerprint(names["flow_map"].params) == fingerprint(names["flow_model"].params)
