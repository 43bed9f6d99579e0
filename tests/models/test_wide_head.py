"""The wide head of a DiT, against a computation in NumPy of the whole network."""

import dataclasses
import functools

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import numpy_dit
import pytest
from test_dit import count, random_params

from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.dit import SIZES, DiT
from dmf.models.linear import scale_tokens
from dmf.models.wide_head import WideHead

MODEL = DiT(input_size=3, channels=6, patch_size=1, depth=1, width=16, heads=2, num_classes=5,
            conditioning="decoupled", split_depth=1, scan=False,
            wide_head=WideHead(depth=2, width=24, heads=3))
XL = DiT(input_size=16, channels=768, patch_size=1, num_classes=1000, **SIZES["XL"],
         wide_head=WideHead(depth=2))  # fmt: skip


@functools.cache
def inputs():
    draw = np.random.default_rng(1).standard_normal
    x_t, v = (jnp.asarray(draw((2, *MODEL.sample_shape)), "f") for _ in range(2))
    t, r = jnp.asarray([0.9, 0.6]), jnp.asarray([0.2, 0.1])
    return random_params(MODEL), x_t, v, t, r, jnp.asarray([0, 5])


def test_the_network_and_its_derivative_are_those_of_the_formulas():
    """u and du/dt; where the times are equal, the flow map is the flow model."""
    params, x_t, v, t, r, y = inputs()

    @gv.jit
    def ours(r):
        def u(x_t, t):
            return MODEL.decode(params, MODEL.encode(params, x_t, t, y), r, y)

        return jax.jvp(u, (x_t, t), (v, jnp.ones_like(t)))

    (u, du_dt), (at_equal_times, _) = ours(r), ours(t)
    x_t, v, t, r = (np.float64(array) for array in (x_t, v, t, r))
    expected = functools.partial(numpy_dit.velocity, MODEL, params)
    np.testing.assert_allclose(u, expected(x_t, t, r, y), rtol=1e-4, atol=1e-4)
    ahead, behind = (expected(x_t + h * v, t + h, r, y) for h in (1e-5, -1e-5))
    np.testing.assert_allclose(du_dt, (ahead - behind) / 2e-5, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(at_equal_times, expected(x_t, t, t, y), rtol=1e-4, atol=1e-4)
    assert np.abs(u - at_equal_times).max() > 0.1


@pytest.mark.slow
def test_a_flow_map_starts_as_the_flow_model():
    params, x_t, _, t, r, y = inputs()
    flow = dataclasses.replace(MODEL, conditioning="flow", split_depth=None)
    velocity = gv.jit(flow.apply)(params, x_t, t, r, y)
    started = gv.jit(MODEL.apply)(params, x_t, t, t, y)
    np.testing.assert_allclose(started, velocity, rtol=1e-5, atol=1e-5)


def test_the_network_of_the_paper_has_its_number_of_parameters():
    """DiT^DH-XL for 768 channels has 839 million, of which norms and positions are none here."""
    assert count(XL) == pytest.approx(839, rel=0.002)
    shapes = abstract_params(XL)["wide_head"]
    assert shapes["blocks"]["modulation"]["linear"]["kernel"].shape == (2, 2048, 6, 2048)
    assert shapes["condition"]["kernel"].shape == (1152, 2048)


def test_gradients_of_the_head_have_the_dtype_of_those_of_the_trunk():
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    cast = jax.eval_shape(model.cast, abstract_params(model))
    assert cast["wide_head"]["blocks"]["mlp"]["in"]["kernel"].dtype == jnp.bfloat16
    assert cast["wide_head"]["condition"]["kernel"].dtype == jnp.float32


def test_a_vector_of_each_token_scales_it():
    """The product, and its derivatives in both directions."""
    draw, float32 = np.random.default_rng(0).standard_normal, jnp.dtype("float32")
    x, factor, dx, dfactor = (jnp.asarray(draw((2, 3, 4)), "f") for _ in range(4))

    @gv.jit
    def ours(x, factor, dx, dfactor):
        scale = functools.partial(scale_tokens, dtype=float32)
        return jax.jvp(scale, (x, factor), (dx, dfactor)), jax.vjp(scale, x, factor)[1](dx)

    (scaled, tangent), (by_x, by_factor) = ours(x, factor, dx, dfactor)
    for found, expected in ((scaled, x * factor), (tangent, dx * factor + x * dfactor),
                            (by_x, dx * factor), (by_factor, dx * x)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "tolerance"), [
    ({"scan": True}, 1e-5), ({"remat": "dots"}, 1e-5), ({"remat": "full"}, 1e-5),
    ({"scan": True, "remat": "dots"}, 1e-5), ({"dtype": "bfloat16"}, 0.05),
    ({"dtype": "bfloat16", "gradient_dtype": "float32"}, 0.05),
    ({"dtype": "bfloat16", "float32_parts": ("modulation", "residual", "final_layer")}, 0.05),
])  # fmt: skip
def test_execution_changes_no_gradient(fields, tolerance):
    params, x_t, v, t, r, y = inputs()

    def gradient(model):
        def loss(params):
            return jnp.mean((model.apply(model.cast(params), x_t, t, r, y) - v) ** 2)

        return gv.jit(jax.grad(loss))(params)

    ours, expected = gradient(dataclasses.replace(MODEL, **fields)), gradient(MODEL)
    assert np.any(ours["wide_head"]["blocks"]["modulation"]["linear"]["kernel"])
    ours, expected = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
                      for tree in (ours, expected))
    gv.assert_near(ours, expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["decoupled", "flow"])
def test_forward_flops_equal_those_of_xla(objective):
    split = {"split_depth": 3} if objective == "decoupled" else {}
    model = DiT(input_size=16, channels=64, patch_size=1, num_classes=10, depth=4, width=128,
                heads=4, scan=False, conditioning=objective, **split,
                wide_head=WideHead(depth=2, width=256, heads=4))  # fmt: skip
    x_t, t, y = jnp.zeros((2, *model.sample_shape)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    lowered = jax.jit(model.apply).lower(abstract_params(model), x_t, t, t, y)
    assert 1 < lowered.cost_analysis()["flops"] / 2 / model.flops.forward < 1.06
    bare = dataclasses.replace(model, wide_head=WideHead())
    assert model.flops.encode == bare.flops.encode


@pytest.mark.parametrize(("make", "message"), [
    (lambda: WideHead(depth=-1), "^depth=-1: "),
    (lambda: WideHead(depth=2, heads=7), "^heads=7: it must divide width=2048"),
    (lambda: WideHead(depth=2, width=30, heads=2), "^width=30: .* multiple of 4"),
    (lambda: WideHead(width=1024), "^width=1024: there is no wide head .* leave this at 2048"),
    (lambda: WideHead(heads=8), "^heads=8: there is no wide head .* leave this at 16"),
    (lambda: dataclasses.replace(XL, conditioning="meanflow", velocity_head=True),
     r"^velocity_head=True: .* set model\.wide_head\.depth=0"),
])  # fmt: skip
def test_a_head_that_cannot_be_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
