"""Sums over samples and tokens: in float32 in the gradients of a bfloat16 network, and in norms."""

import functools
from collections.abc import Iterator
from typing import Any

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.models import layers
from dmf.models.abstract_params import abstract_params
from dmf.models.activations import layer_norm
from dmf.models.dit import DiT
from dmf.models.encoders import autoencoder_kl, dinov2
from dmf.models.linear import Linear, scale_tokens, spread
from dmf.objectives import DecoupledMeanFlow, FlowMatching, MeanFlow
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.objectives.objective import terms_of
from dmf.training.train_step import mean_gradient
from dmf.types import Batch

BFLOAT16 = jnp.dtype("bfloat16")
# By conditioning: its objective, and fields that reach every kind of parameter.
OBJECTIVES = {
    "flow": (functools.partial(FlowMatching, alignment_coefficient=0.5),
             {"qk_norm": True, "alignment_depth": 1, "alignment_width": 12}),
    "meanflow": (MeanFlow, {"guidance_input": True}),
    "decoupled": (DecoupledMeanFlow,
                  {"block_times": "both", "split_depth": 1, "learned_variance": True}),
}  # fmt: skip
CASES = [("flow", False), *((name, shared) for name in ("meanflow", "decoupled")
                            for shared in (False, True))]


def gradient_of(conditioning: str, shared: bool, *, side: int, count: int, **fields: Any):
    """The gradient of an objective as a function of the parameters, and parameters."""
    objective, more = OBJECTIVES[conditioning]
    model = DiT(**{"input_size": 2 * side, "channels": 4, "depth": 2, "width": 64, "heads": 2,
                   "num_classes": 10, "conditioning": conditioning} | more | fields)
    sharing = {} if conditioning == "flow" else {"compute_sharing": ComputeSharing(enabled=shared)}
    method, draw = objective(**sharing), np.random.default_rng(0).standard_normal
    shapes = abstract_params(model)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.05 * draw(leaf.shape), "f"), shapes)
    # As large as it is initialised: the tokens would be small beside the rounding of positions.
    params["patch_embedding"]["kernel"] *= 3
    features = jnp.asarray(draw((count, side**2, 12)), "f") if model.alignment_depth else None
    samples = jnp.asarray(draw((count, *model.sample_shape)), "f")
    batch = Batch(samples, jnp.arange(count) % 10, features)
    draws = method.draw(jax.random.key(0), batch, jnp.asarray(0))

    def gradient(params):
        return mean_gradient(terms_of(method, model, params, batch, draws, {}), params)[0]

    return gradient, params


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those of loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def coarse_sums(function: Any, *arguments: Any) -> list[str]:
    """The sums of several numbers in bfloat16, those of scatters included."""
    names = ("reduce_sum", "cumsum", "scatter-add", "reduce_window_sum")
    return [
        str(equation) for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        if equation.primitive.name in names and equation.outvars[0].aval.dtype == BFLOAT16
        and (equation.primitive.name != "reduce_sum"
             or equation.invars[0].aval.size > equation.outvars[0].aval.size)
    ]  # fmt: skip


def test_sums_in_bfloat16_are_found():
    def gradient(bias):
        return jax.grad(lambda bias: jnp.square(jnp.ones((4, 3), BFLOAT16) + bias).sum())(bias)

    (found,) = coarse_sums(jax.jit(gradient), jnp.ones((1, 3), BFLOAT16))
    assert "reduce_sum" in found


@pytest.mark.slow
@pytest.mark.parametrize(("conditioning", "shared"), CASES)
def test_no_gradient_is_summed_in_bfloat16(conditioning, shared):
    """Neither over tokens nor over samples, in scanned blocks with what is recomputed."""
    gradient, params = gradient_of(conditioning, shared, side=2, count=3, width=8,
                                   dtype="bfloat16", remat="dots")
    assert coarse_sums(gradient, params) == []


@pytest.mark.slow
@pytest.mark.parametrize(("conditioning", "shared"), CASES)
def test_the_gradient_of_4096_tokens_in_bfloat16_is_that_of_float32(conditioning, shared):
    fields = {"side": 16, "count": 16, "guidance_input": False}
    expected, ours = (
        jax.tree_util.tree_leaves_with_path(gv.jit(gradient)(params))
        for gradient, params in (
            gradient_of(conditioning, shared, dtype=dtype, **fields)
            for dtype in ("float32", "bfloat16")
        )
    )
    errors = {jax.tree_util.keystr(path): relative(leaf, right)
              for (path, right), (_, leaf) in zip(expected, ours, strict=True)}
    # The cosine of nearly orthogonal features magnifies the rounding inside the projector.
    bars = {name: 3e-2 if "projector" in name else 2e-2 for name in errors}
    assert all(errors[name] < bars[name] for name in errors), errors
    whole = [np.concatenate([np.ravel(leaf) for _, leaf in tree]) for tree in (ours, expected)]
    assert 1e-4 < relative(*whole) < 1e-2


def relative(ours: jax.Array, expected: jax.Array) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def test_the_gradient_of_a_bias_is_the_sum_over_4096_tokens():
    """A sum in bfloat16 would stop growing on its way to 2,048."""
    linear = Linear((3,), layers.xavier, BFLOAT16)
    weights = jax.random.uniform(jax.random.key(1), (16, 256, 3)).astype(BFLOAT16)
    x = jnp.ones((16, 256, 4), BFLOAT16)
    params = linear.init(jax.random.key(0), x)

    def loss(params, weights):
        return (linear.apply(params, x) * weights).astype("f").sum()

    gradient = jax.jit(jax.grad(loss))(params, weights)["params"]["bias"]
    assert relative(gradient, np.asarray(weights, np.float64).sum((0, 1))) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_kernel_has_its_dtype(dtype):
    """In float32 it is the sum over 1,024 tokens, without a rounding of the sum."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, weights = (jax.random.normal(key, (4, 256, 5)).astype(BFLOAT16) for key in keys)
    linear = Linear((5,), layers.xavier, BFLOAT16, gradient_dtype=jnp.dtype(dtype))
    params = linear.init(jax.random.key(2), x)

    def loss(params):
        return (linear.apply(params, x) * weights).astype("f").sum()

    expected = np.einsum("bli,blo->io", *(np.asarray(leaf, np.float64) for leaf in (x, weights)))
    error = relative(jax.jit(jax.grad(loss))(params)["params"]["kernel"], expected)
    assert error < 1e-5 if dtype == "float32" else 1e-4 < error < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("gradient_dtype", ["float32", "bfloat16"])
def test_the_gradients_of_blocks_are_collected_in_their_dtype(gradient_dtype):
    gradient, params = gradient_of("flow", False, side=2, count=3, width=8, dtype="bfloat16",
                                   gradient_dtype=gradient_dtype)
    kernel = gv.jit(gradient)(params)["blocks"]["mlp"]["in"]["kernel"]
    rounded = bool((kernel == kernel.astype(BFLOAT16)).all())
    assert rounded == (gradient_dtype == "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaled_tokens_have_the_derivatives_of_a_product(dtype):
    """Along a direction, and of each factor over 1,024 tokens."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, x_tangent = (jax.random.normal(key, (2, 1024, 3)).astype(dtype) for key in keys[:2])
    factor, factor_tangent = (jax.random.normal(key, (2, 3)) for key in keys[2:])
    at, along = (x, factor), (x_tangent, factor_tangent)
    scaled = functools.partial(scale_tokens, dtype=jnp.dtype(dtype))
    value, tangent = jax.jvp(scaled, at, along)
    wide = [np.asarray(leaf, np.float64) for leaf in (*at, *along)]
    rows = [wide[1][:, None], wide[3][:, None]]
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    assert value.dtype == dtype
    assert relative(np.asarray(value, "f"), wide[0] * rows[0]) < tolerance
    expected = wide[2] * rows[0] + wide[0] * rows[1]
    assert relative(np.asarray(tangent, "f"), expected) < tolerance
    by_factor = jax.jit(jax.grad(lambda f: jnp.square(scaled(x, f).astype("f")).sum()))(factor)
    assert relative(by_factor, 2 * (wide[0] ** 2).sum(1) * wide[1]) < tolerance


def test_what_is_spread_over_tokens_has_the_values_of_a_cast():
    x = jax.random.normal(jax.random.key(0), (2, 1, 3))
    np.testing.assert_array_equal(
        spread(x, (2, 5, 3), BFLOAT16), np.broadcast_to(x.astype(BFLOAT16), (2, 5, 3))
    )


@pytest.mark.parametrize(
    "norm",
    [lambda x: layer_norm(x, jnp.dtype("float32")),
     lambda x: applied(dinov2._norm(jnp.dtype("float32"), "norm"), x),
     lambda x: applied(autoencoder_kl.GroupNorm(num_groups=1), x)],
    ids=["transformer", "dinov2", "autoencoder"],
)  # fmt: skip
def test_a_norm_keeps_values_that_lie_close_together(norm):
    """A mean of 1,000 standard deviations, where E[x^2] - E[x]^2 in float32 is 2 % off."""
    x = jnp.float32(1000 + np.random.default_rng(0).standard_normal((4, 512)))
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    assert relative(norm(x), expected) < 1e-4


def applied(module, x):
    return module.init_with_output(jax.random.key(0), x)[0]
