"""Operations as counted by `DiT.flops`, by XLA and in the papers."""

import dataclasses

import golden_values as gv
import jax
import jax.numpy as jnp
import pytest

from dmf.models.abstract_params import abstract_params
from dmf.models.dit import SIZES, DiT
from dmf.models.in_context_dit import SIZES as IN_CONTEXT_SIZES
from dmf.models.in_context_dit import InContextDiT
from dmf.objectives import (
    DecoupledMeanFlow,
    FlowMatching,
    ImprovedMeanFlow,
    MeanFlow,
    NoGuidance,
    SelfGuidance,
    SoFlow,
    TeacherGuidance,
)
from dmf.runtime import device_specs

SPLIT = {"split_depth": 3}


def small(conditioning: str) -> DiT:
    split = SPLIT if conditioning == "decoupled" else {}
    return DiT(input_size=16, channels=4, num_classes=10, depth=4, width=128, heads=4, scan=False,
               conditioning=conditioning, **split)  # fmt: skip


@pytest.mark.parametrize("conditioning", [
    "decoupled", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flow", "meanflow"))
])
def test_forward_flops_equal_those_of_xla(conditioning):
    model, b = small(conditioning), 4
    params = abstract_params(model)
    x_t = jax.ShapeDtypeStruct((b, *model.sample_shape), jnp.float32)
    t, y = jax.ShapeDtypeStruct((b,), jnp.float32), jax.ShapeDtypeStruct((b,), jnp.int32)
    hidden = jax.eval_shape(model.encode, params, x_t, t, y)

    def counted(function, *inputs) -> float:
        return gv.jit(function).lower(*inputs).compile().cost_analysis()["flops"] / b

    # XLA also counts elementwise operations and norms, a large part of a lone final layer.
    assert 1 < counted(model.apply, params, x_t, t, t, y) / model.flops.forward < 1.06
    limit = 1.2 if conditioning == "flow" else 1.06
    assert 1 < counted(model.decode, params, hidden, t, y) / model.flops.decode < limit


@pytest.mark.slow
def test_the_flops_of_a_velocity_head_equal_those_of_xla():
    model = dataclasses.replace(small("meanflow"), velocity_head=True, head_depth=2)
    params, t = abstract_params(model), jnp.zeros(4)
    inputs = jnp.zeros((4, *model.sample_shape)), t, t, jnp.zeros(4, jnp.int32)
    one, both = (jax.jit(apply).lower(params, *inputs).cost_analysis()["flops"] / 4
                 for apply in (model.apply, model.apply_heads))
    assert 1 < (both - one) / model.flops.velocity_head < 1.1
    assert small("meanflow").flops.velocity_head == 0


@pytest.mark.parametrize(
    ("size", "side", "multiply_adds"),
    [("S", 32, 6.1e9), ("B", 32, 23.0e9), ("L", 32, 80.7e9), ("XL", 32, 118.6e9),
     ("XL", 64, 524.5e9)],
)  # fmt: skip
def test_published_sizes(size, side, multiply_adds):
    model = DiT(input_size=side, channels=4, num_classes=1000, **SIZES[size])
    assert model.flops.forward / 2 == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize(
    ("objective", "conditioning", "encodes", "decodes"),
    [
        (FlowMatching(), "flow", 3, 3),
        (MeanFlow(), "meanflow", 4, 4),
        (MeanFlow(guidance=SelfGuidance(omega=2.0)), "meanflow", 5, 5),
        (MeanFlow(guidance=SelfGuidance(kappa=0.5)), "meanflow", 5, 6),
        (SoFlow(), "meanflow", 3.25, 3.25),
        (SoFlow(guidance=SelfGuidance(omega=0.75, kappa=0.75)), "decoupled", 4.25, 4.5),
        (DecoupledMeanFlow(guidance=NoGuidance()), "decoupled", 7, 7),
        (DecoupledMeanFlow(guidance=SelfGuidance(kappa=0.5)), "decoupled", 9, 10),
        (DecoupledMeanFlow(guidance=TeacherGuidance(scale=2.0), teacher=small("flow")),
         "decoupled", 11, 11),
    ],
)  # fmt: skip
def test_objective_flops_count_passes(objective, conditioning, encodes, decodes):
    model = small(conditioning)
    expected = encodes * model.flops.encode + decodes * model.flops.decode
    assert objective.flops(model) == pytest.approx(expected, rel=0.02)


def test_objective_flops_of_two_heads():
    """A forward and a backward pass of both heads, the tangent, and both velocities of the guidance
    with one head each; the head of iMF-XL/2 is a sixth of its depth."""
    model = InContextDiT(input_size=32, channels=4, num_classes=1000, **IN_CONTEXT_SIZES["XL"])
    flops = ImprovedMeanFlow().flops(model)
    assert flops == 6 * model.flops.forward + 3 * model.flops.velocity_head
    assert flops / model.flops.forward == pytest.approx(6.5, abs=0.01)


def test_mfu():
    assert device_specs.mfu(0.5 * 4 * 197e12, "TPU v5 lite", 4) == pytest.approx(0.5)
    assert device_specs.mfu(1e12, "a toaster", 1) is None
