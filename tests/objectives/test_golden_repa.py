"""A flow model with representation alignment (SiT with REPA) equals the published one."""

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np

from dmf.checkpoints.convert.tables.dit import POSITIONS, to_pytorch
from dmf.objectives import FlowMatching
from dmf.objectives.path_sample import Draws
from dmf.types import Batch

NAME = "sit_repa_tiny"


@gv.over_executions
def test_losses_and_gradient(execution):
    scan, remat, mesh_sizes = gv.EXECUTIONS[execution]
    golden, model = gv.load(NAME), gv.aligned(NAME, scan, remat)
    objective = FlowMatching(alignment_coefficient=golden.config["proj_coeff"])

    def mean_loss(params, batch, draws):
        loss, metrics = objective.loss(model, params, batch, draws, {})
        return jnp.mean(loss), metrics

    t, dropped = golden.vector("t"), jnp.zeros(4, bool)
    features = jnp.asarray(golden["encoder_features"])
    inputs = (
        Batch(golden.images("data"), golden.labels("y"), features),
        Draws(golden.images("eps"), t, t, dropped),
    )
    params, inputs = gv.spread(mesh_sizes, gv.aligned_params(NAME), inputs)
    (loss, metrics), gradients = gv.jit(jax.value_and_grad(mean_loss, has_aux=True))(
        params, *inputs
    )
    np.testing.assert_allclose(loss, golden["loss"].mean(), 1e-5)
    np.testing.assert_allclose(8 * 8 * 4 * metrics["flow_matching_error"], golden["fm_loss"], 1e-5)
    np.testing.assert_allclose(metrics["alignment_distance"].mean(), golden["proj_loss"], 1e-5)
    tensors = to_pytorch(model, gradients)
    del tensors[POSITIONS]
    np.testing.assert_allclose(gv.norm(tensors), golden["grad_norm"], 1e-4)


@gv.over_executions
def test_velocity_and_features(execution):
    scan, remat, mesh_sizes = gv.EXECUTIONS[execution]
    golden, model = gv.load(NAME), gv.aligned(NAME, scan, remat)
    inputs = (golden.images("x"), golden.vector("t"), golden.vector("t"), golden.labels("y"))
    params, inputs = gv.spread(mesh_sizes, gv.aligned_params(NAME), inputs)
    v, features = gv.jit(model.apply_with_features)(params, *inputs)
    gv.assert_each_near(v, golden.images("v"), 1e-5)
    gv.assert_each_near(features, golden["features"], 1e-5)
