"""The examples in docstrings (`>>>`) give what they show."""

import doctest
import importlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import dmf

PACKAGE = tiny.ROOT / "dmf"
MODULES = sorted(
    ".".join(path.relative_to(tiny.ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text()
)
# Their examples train, load or evaluate a run.
OF_RUNS = ("dmf.cli.convert", "dmf.cli.evaluate_call", "dmf.cli.load", "dmf.cli.train")


@pytest.fixture
def runs(request, tmp_path, monkeypatch):
    """The working directory holds a run of a narrow flow model, if the examples need it."""
    monkeypatch.chdir(tmp_path)
    if request.node.callspec.params["name"] in OF_RUNS:
        shutil.copytree(tiny.shared_run("examples", flow_model), tmp_path / "runs" / "digits_sit")


def flow_model() -> ConfigDict:
    fields = {"model.width": 16, "model.heads": 1, "model.scan": True, "run.steps": 2}
    return dmf.config("dmf:digits_sit", fields | {"run.sample_every": 0, "evaluation.every": 0})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in OF_RUNS)) for name in MODULES]
)
def test_examples_of_a_module(name, runs):
    """`dmf`, `jax`, `jnp` and `np` are at hand, and all names of the module."""
    module = importlib.import_module(name)
    names = {"dmf": dmf, "jax": jax, "jnp": jnp, "np": np} | vars(module)
    results = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0, "examples stand in docstrings that doctest does not find"
    assert results.failed == 0, "see the output"


def test_examples_are_found():
    assert "dmf.sampling.samplers" in MODULES
