"""The types of `dmf` are checked while the tests run."""

import pathlib

import beartype.roar
import jax.numpy as jnp
import jaxtyping
import pytest
import type_checks

import dmf
from dmf import registry
from dmf.objectives.tangent import root_mean_square


def test_every_module_is_checked():
    root = pathlib.Path(dmf.__file__).parent
    modules = {path.stem for path in root.iterdir() if path.suffix == ".py" or
               (path / "__init__.py").exists()}  # fmt: skip
    assert modules - {"__init__", "__main__"} == {*type_checks.SHAPED, *type_checks.TYPED}


def test_a_value_of_another_type_is_refused():
    with pytest.raises(beartype.roar.BeartypeCallHintParamViolation):
        registry.components(3)


def test_an_array_of_another_shape_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        root_mean_square(jnp.zeros((2, 3)))
