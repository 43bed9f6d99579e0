"""Losses and gradients of improved MeanFlow and pixel MeanFlow equal the published ones."""

import dataclasses

import golden_in_context as gi
import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dmf.objectives import ImprovedMeanFlow
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.objectives.path_sample import Draws
from dmf.types import Batch, GuidanceInput

# The formula by hand in test_improved_mean_flow.py, and the golden values of the network in
# tests/models, find the same faults in a fraction of the time.
pytestmark = pytest.mark.slow
PLAIN = ComputeSharing(enabled=False, unconditional_microbatches=0)


@dataclasses.dataclass(frozen=True)
class SwitchedWeighting:
    """The adaptive weighting with power 1 or 0, chosen at run time, so that one compilation serves
    both."""

    weighted: jax.Array
    learned = False

    def __call__(self, error: jax.Array, size: int, phi: jax.Array | None) -> jax.Array:
        return jnp.where(self.weighted, error / jax.lax.stop_gradient(error + 0.01), error)


def inputs_of(name: str) -> tuple[Batch, Draws]:
    """The interval is as drawn: the loss sets it to (0, 1) where r = t."""
    golden = gv.load(name)
    guidance = GuidanceInput(*(golden.vector(part) for part in ("omega", "t_min", "t_max")))
    draws = Draws(jnp.asarray(golden["eps"]), golden.vector("loss_t"), golden.vector("loss_r"),
                  jnp.asarray(golden["drop"]), guidance)  # fmt: skip
    return Batch(jnp.asarray(golden["data"]), golden.labels("y")), draws


def tensors_of(gradient) -> dict[str, np.ndarray]:
    """The leaves by name; those of each block, and of queries, keys and values, by themselves."""
    tensors = {name: np.asarray(leaf) for name, leaf in flatten_dict(gradient, sep="/").items()}
    for name in [name for name in tensors if "blocks/" in name]:
        tensors |= {f"{name}/{block}": leaf for block, leaf in enumerate(tensors.pop(name))}
    for name in [name for name in tensors if "qkv" in name]:
        tensors |= {f"{name}/{part}": leaf
                    for part, leaf in zip("qkv", np.moveaxis(tensors.pop(name), 1, 0), strict=True)}
    return tensors


def assert_golden(name: str, execution: tuple, sharing: ComputeSharing) -> None:
    scan, remat, mesh_sizes = execution
    golden, model = gv.load(name), gi.network(name, scan=scan, remat=remat)

    def mean_loss(params, batch, draws, weighted):
        objective = ImprovedMeanFlow(weighting=SwitchedWeighting(weighted), compute_sharing=sharing)
        losses, metrics = objective.loss(model, params, batch, draws, {})
        return jnp.mean(losses), metrics

    # A batch of 6 does not divide over 4 shards.
    mesh_sizes = mesh_sizes and (2, 1, 4)
    params, inputs = gv.spread(mesh_sizes, gi.params(name), inputs_of(name))
    run = gv.jit(jax.value_and_grad(mean_loss, has_aux=True))
    (loss, metrics), gradient = run(params, *inputs, jnp.asarray(True))
    np.testing.assert_allclose(loss, golden["loss"], 1e-5)
    np.testing.assert_allclose(jnp.mean(metrics["mean_flow_error"]), golden["loss_u"], 1e-5)
    np.testing.assert_allclose(jnp.mean(metrics["velocity_head_error"]), golden["loss_v"], 1e-5)
    tensors = tensors_of(gradient)
    np.testing.assert_allclose(gv.norm(tensors), golden["grad_norm"], 1e-4)
    expected = tensors_of(gi.from_published(model, golden.below("grad/net")))
    assert expected.keys() == tensors.keys()
    for tensor, leaf in expected.items():
        gv.assert_near(tensors[tensor], leaf, 1e-4)
    (loss, _), gradient = run(params, *inputs, jnp.asarray(False))
    np.testing.assert_allclose(loss, golden["loss_p0"], 1e-5)
    np.testing.assert_allclose(gv.norm(tensors_of(gradient)), golden["grad_norm_p0"], 1e-4)


@pytest.mark.parametrize("execution", gv.EXECUTIONS)
@pytest.mark.parametrize("name", gi.NAMES)
def test_loss_and_gradients(name, execution):
    assert_golden(name, gv.EXECUTIONS[execution], ComputeSharing())


@pytest.mark.parametrize("name", gi.NAMES)
def test_loss_and_gradients_of_each_formula_as_it_stands(name):
    assert_golden(name, gv.PLAIN, PLAIN)
