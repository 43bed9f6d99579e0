"""The in-context transformer against the published improved and pixel MeanFlow."""

import golden_in_context as gi
import golden_values as gv
import jax
import jax.numpy as jnp
import pytest


@pytest.mark.parametrize("name", gi.NAMES)
def test_both_heads_and_the_tangent(name):
    model, golden = gi.network(name), gv.load(name)
    x_t, t, r, y = gi.inputs(name)

    def heads(params, x_t, t, dx):
        along = (dx, jnp.ones_like(t))
        return jax.jvp(lambda x_t, t: model.apply_heads(params, x_t, t, r, y), (x_t, t), along)

    (u, v), (du_dt, _) = gv.jit(heads)(gi.params(name), x_t, t, jnp.asarray(golden["dx"]))
    gv.assert_near(u, golden["u"], 1e-5)
    gv.assert_near(v, golden["v"], 1e-5)
    gv.assert_near(du_dt, golden["du_dt"], 1e-5)
