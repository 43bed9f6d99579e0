"""Parameters of Flax modules, whose shapes are compared with those that are known.

`Module.param` traces the initialiser whenever a network is applied, only to learn the shape that an
existing parameter must have. In a training step, which applies the network several times, that
takes a large part of the time to trace it.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import errors
from flax import linen as nn

from dmf.types import Params, PRNGKey, Size


def parameter(
    module: nn.Module,
    name: str,
    init: Callable[[PRNGKey, tuple[Size, ...]], jax.Array],
    shape: tuple[Size, ...],
) -> jax.Array:
    """The parameter of a bound module, which `init(key, shape)` makes where there is none.

    Raises:
      flax.errors.ScopeParamShapeError: the existing parameter has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value = module.get_variable("params", name)
    if value.shape != tuple(shape):
        raise errors.ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    return value


def stacked_parameters(
    module: nn.Module, name: str, init: Callable[[PRNGKey], Params], depth: int
) -> Any:
    """The tree of parameters of a bound module with a leading axis of `depth` in each leaf, which
    `init(key)` makes where there is none. The modules that the layers of the stack belong to
    compare the other axes.

    Raises:
      flax.errors.ScopeParamShapeError: an existing leaf has another leading axis.
    """
    if not module.has_variable("params", name):
        return module.param(name, init)
    tree = module.get_variable("params", name)
    for leaf in jax.tree.leaves(tree):
        if leaf.shape[:1] != (depth,):
            expected = (depth, *leaf.shape[1:])
            raise errors.ScopeParamShapeError(name, "/".join(module.path), leaf.shape, expected)
    return tree
