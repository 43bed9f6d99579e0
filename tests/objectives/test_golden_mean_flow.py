"""Network, losses and gradients of MeanFlow equal the published ones."""

import itertools

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.checkpoints.convert.tables.dit import to_jax
from dmf.objectives import AdaptiveWeighting, MeanFlow, SelfGuidance
from dmf.objectives.path_sample import Draws
from dmf.types import Batch

FILES = ("meanflow_tiny", "meanflow_tiny_kappa")
# The file with kappa holds all of the guidance, and runs sharded; the other one runs plainly.
PLAIN, SHARDED = list(gv.EXECUTIONS)[:2]
QUICK = {(FILES[0], PLAIN), (FILES[1], SHARDED)}
over_files_and_executions = pytest.mark.parametrize(("name", "execution"), [
    pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow)
    for pair in itertools.product(FILES, gv.EXECUTIONS)
])


def execution_of(name: str) -> tuple[bool, str, tuple[int, int, int] | None]:
    """An execution of `gv.EXECUTIONS`; its mesh is 2x1x4, as a batch of 6 does not divide over the
    4 shards of 2x2x2."""
    scan, remat, mesh_sizes = gv.EXECUTIONS[name]
    return scan, remat, mesh_sizes and (2, 1, 4)


def objective_of(name: str) -> MeanFlow:
    config = gv.load(name).config
    return MeanFlow(
        guidance=SelfGuidance(
            omega=config["omega"],
            kappa=config["kappa"],
            interval=(config["t_start"], config["t_end"]),
        ),
        weighting=AdaptiveWeighting(power=config["norm_p"], offset=config["norm_eps"]),
    )


@over_files_and_executions
def test_loss_and_gradients(name, execution):
    scan, remat, mesh_sizes = execution_of(execution)
    golden, model = gv.load(name), gv.meanflow(name, scan, remat)

    def mean_loss(params, batch, draws):
        loss, metrics = objective_of(name).loss(model, params, batch, draws, {})
        return jnp.mean(loss), metrics

    draws = Draws(
        jnp.asarray(golden["eps"]),
        golden.vector("t"),
        golden.vector("r"),
        jnp.asarray(golden["drop"]),
    )
    inputs = (Batch(jnp.asarray(golden["data"]), golden.labels("y")), draws)
    params, inputs = gv.spread(mesh_sizes, gv.meanflow_params(name), inputs)
    (loss, metrics), gradients = gv.jit(jax.value_and_grad(mean_loss, has_aux=True))(
        params, *inputs
    )
    np.testing.assert_allclose(loss, golden["loss"], 1e-5)
    np.testing.assert_allclose(8 * 8 * 4 * metrics["velocity_error"], golden["v_loss"], 1e-5)
    tensors = to_jax(model, gradients)
    np.testing.assert_allclose(gv.norm(tensors), golden["grad_norm"], 1e-4)
    for tensor, gradient in golden.below("grad").items():
        gv.assert_near(tensors[tensor], gradient, 1e-4)


@over_files_and_executions
def test_network(name, execution):
    scan, remat, mesh_sizes = execution_of(execution)
    golden, model = gv.load(name), gv.meanflow(name, scan, remat)
    inputs = (jnp.asarray(golden["data"]), golden.vector("t"), golden.vector("r"))
    params, inputs = gv.spread(
        mesh_sizes, gv.meanflow_params(name), (*inputs, golden.labels("y"))
    )
    gv.assert_each_near(gv.jit(model.apply)(params, *inputs), golden["u_at_data"], 1e-5)
