"""The in-context transformer against the published improved and pixel MeanFlow."""

import golden_in_context as gi
import golden_values as gv
import jax
import jax.numpy as jnp
import pytest

# The plain execution is quick; improved MeanFlow's is that of its objective's tests.
RUNS = [pytest.param(name, execution,
                     marks=[] if (name, execution) == ("pmf_tiny", "scan-none-1")
                     else pytest.mark.slow)
        for name in gi.NAMES for execution in gv.EXECUTIONS]  # fmt: skip
# The rows of a file that every mesh can split.
ROWS = slice(4)


@pytest.mark.parametrize(("name", "execution"), RUNS)
def test_both_heads_and_the_tangent(name, execution):
    scan, remat, mesh_sizes = gv.EXECUTIONS[execution]
    model, golden = gi.network(name, scan=scan, remat=remat), gv.load(name)

    def heads(params, x_t, t, r, y, dx):
        along = (dx, jnp.ones_like(t))
        return jax.jvp(lambda x_t, t: model.apply_heads(params, x_t, t, r, y), (x_t, t), along)

    rows = jax.tree.map(lambda leaf: leaf[ROWS], (*gi.inputs(name), jnp.asarray(golden["dx"])))
    params, rows = gv.spread(mesh_sizes, gi.params(name), rows)
    (u, v), (du_dt, _) = gv.jit(heads)(params, *rows)
    for ours, theirs in ((u, "u"), (v, "v"), (du_dt, "du_dt")):
        gv.assert_each_near(ours, golden[theirs][ROWS], 1e-5)
