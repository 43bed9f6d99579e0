"""The examples in docstrings (`>>>`) give what they show."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

PACKAGE = tiny.ROOT / "dmf"
MODULES = sorted(
    ".".join(path.relative_to(tiny.ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name):
    """`jax`, `jnp` and `np` are at hand, and all names of the module."""
    module = importlib.import_module(name)
    names = {"jax": jax, "jnp": jnp, "np": np} | vars(module)
    results = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0, "examples stand in docstrings that doctest does not find"
    assert results.failed == 0, "see the output"


def test_examples_are_found():
    assert "dmf.sampling.samplers" in MODULES
