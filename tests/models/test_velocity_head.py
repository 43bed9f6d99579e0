"""The velocity head of a DiT with MeanFlow conditioning."""

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dit import TINY, inputs, output, randomised

from dmf.errors import InputError
from dmf.models.dit import DiT


def test_the_velocity_head_takes_the_place_of_the_last_blocks():
    """v is the u of a network with the blocks and the final layer of the head."""
    model, params = randomised(conditioning="meanflow", velocity_head=True, head_depth=1)
    arguments, head = inputs(model), params["v_head"]
    of_head = jax.tree.map(lambda ours, last: ours.at[-1:].set(last), params["blocks"],
                           head["blocks"])  # fmt: skip
    apply_heads = gv.jit(model.apply_heads)
    u, v = apply_heads(params, *arguments)
    expected, _ = apply_heads(params | {"blocks": of_head, "final": head["final"]}, *arguments)
    np.testing.assert_allclose(v, expected, rtol=1e-4, atol=1e-5)
    assert jnp.abs(u - v).max() > 0.1
    cast = jax.eval_shape(DiT(**TINY, conditioning="meanflow", velocity_head=True, head_depth=1,
                              dtype="bfloat16").cast, params)["v_head"]  # fmt: skip
    assert cast["blocks"]["mlp"]["in"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_a_velocity_head_leaves_u_as_it_is():
    model, params = randomised(conditioning="meanflow", velocity_head=True, head_depth=2)
    u, v = gv.jit(model.apply_heads)(params, *inputs(model))
    np.testing.assert_allclose(u, output(model, params, inputs(model)), rtol=1e-4, atol=1e-5)
    x_t, t, _, y = inputs(model)
    velocity = gv.jit(model.velocity)(params, x_t, t, y)
    assert jnp.abs(velocity - v).max() > 1e-3
    _, at_equal_times = gv.jit(model.apply_heads)(params, x_t, t, t, y)
    np.testing.assert_allclose(velocity, at_equal_times, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("velocity_head", True, {}),
        ("velocity_head", True, {"conditioning": "decoupled", "split_depth": 2}),
        ("head_depth", 2, {"conditioning": "meanflow"}),
        ("head_depth", 0, {"conditioning": "meanflow", "velocity_head": True}),
        ("head_depth", 4, {"conditioning": "meanflow", "velocity_head": True}),
    ],
)
def test_a_head_that_cannot_be_is_named(field, value, others):
    with pytest.raises(InputError, match=f"^{field}="):
        DiT(**TINY | others | {field: value})
