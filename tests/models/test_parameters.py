"""Parameters of modules, whose shapes are compared without tracing what made them."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from dmf.models import dit, in_context_dit
from dmf.models.parameters import parameter, stacked_parameters

CALLS = []


def counted(key, shape=(2, 3)):
    CALLS.append(shape)
    return jnp.ones(shape)


class Scale(nn.Module):
    """x times a vector, plus the first of a stack of vectors."""

    width: int = 3
    depth: int = 2

    @nn.compact
    def __call__(self, x):
        stack = stacked_parameters(self, "stack", counted, self.depth)
        return x * parameter(self, "scale", counted, (self.width,)) + stack[0]


def test_an_initialiser_is_called_only_where_there_is_no_parameter():
    CALLS.clear()
    variables = Scale().init(jax.random.key(0), jnp.ones(3))
    assert CALLS == [(2, 3), (3,)]
    assert Scale().apply(variables, jnp.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert len(CALLS) == 2


@pytest.mark.parametrize(("other", "text"), [
    (Scale(width=4), r'"scale".*\(4,\).*\(3,\)'), (Scale(depth=5), r'"stack".*\(5, 3\).*\(2, 3\)')
])  # fmt: skip
def test_a_parameter_of_another_shape_is_refused(other, text):
    variables = Scale().init(jax.random.key(0), jnp.ones(3))
    with pytest.raises(ScopeParamShapeError, match=text):
        other.apply(variables, jnp.ones(other.width))


def test_a_missing_parameter_is_named():
    with pytest.raises(ScopeParamNotFoundError, match='"scale"'):
        Scale().apply({"params": {"stack": jnp.ones((2, 3))}}, jnp.ones(3))


@pytest.mark.parametrize(("network", "fields"), [
    (dit.DiT(input_size=4, channels=1, depth=1, width=8, heads=1, num_classes=2), ("blocks",)),
    (in_context_dit.InContextDiT(input_size=4, channels=1, depth=2, head_depth=1, width=8, heads=1,
                                 num_classes=2), ("u_head", "blocks")),
])  # fmt: skip
def test_a_network_applies_no_parameters_of_another(network, fields):
    """Of another depth, or of another width of one layer."""
    params = jax.eval_shape(network.init, jax.random.key(0))
    x, t, y = jnp.zeros((1, 4, 4, 1)), jnp.ones(1), jnp.zeros(1, jnp.int32)

    def apply(change):
        def changed(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return change(leaf) if name.startswith("/".join(fields)) else leaf

        other = jax.tree_util.tree_map_with_path(changed, params)
        jax.eval_shape(network.apply, other, x, t, t, y)

    def lengthened(axis):
        def change(leaf):
            shape = list(leaf.shape)
            shape[axis] += 1
            return jax.ShapeDtypeStruct(shape, leaf.dtype)

        return change

    apply(lambda leaf: leaf)
    for axis in (0, -1):
        with pytest.raises(ScopeParamShapeError):
            apply(lengthened(axis))
