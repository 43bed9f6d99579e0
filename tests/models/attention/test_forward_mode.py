"""Derivatives of flash attention: forward mode, reverse mode, and both in one training step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.models.attention import flash_backends
from dmf.models.attention.attention import from_heads_first
from dmf.models.attention.dot_product import dot_product_attention
from dmf.models.attention.forward_mode import with_forward_mode
from dmf.models.attention.jvp_kernel import attention_jvp, heads_first_attention_jvp
from dmf.models.block_stack import REMAT_POLICIES

KERNEL = functools.partial(attention_jvp, platform="tpu", interpret=True)
SPLASH = functools.partial(flash_backends.tpu_attention, interpret=True)
FLASH = {
    "stand-in": with_forward_mode(flash_backends.cpu_attention, KERNEL),
    "splash": from_heads_first(
        with_forward_mode(SPLASH, functools.partial(heads_first_attention_jvp, interpret=True))
    ),
}
LENGTH, WIDTH, HEADS, DEPTH = 20, 16, 2, 3


def block(attend, weights, x):
    q, k, v = jnp.moveaxis((x @ weights).reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
    return x + jnp.tanh(attend(q, k, v).reshape(x.shape))


def network(attend, remat, weights, x):
    """Blocks scanned as `dmf.models.dit` does."""

    def step(x, w):
        return block(attend, w, x), None

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, x, weights)[0]


def arrays(seed=0):
    random = np.random.default_rng(seed)
    weights = random.normal(0, 0.3, (DEPTH, WIDTH, 3 * WIDTH))
    x, dx = random.normal(size=(2, 3, LENGTH, WIDTH))
    return [jnp.asarray(a, jnp.float32) for a in (weights, x, dx)]


def meanflow(apply):
    """The MeanFlow loss as in the paper, and its gradient: `jax.jvp` within `jax.grad`."""

    def loss(weights, x, dx):
        u, du = jax.jvp(lambda x: apply(weights, x), (x,), (dx,))
        return jnp.sum((u - jax.lax.stop_gradient(dx - 0.5 * du)) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1))


def one_linearisation(apply):
    """Output, tangent and gradient from one `jax.vjp`, the tangent by transposing it."""

    def both(weights, x, dx):
        h, pull = jax.vjp(apply, weights, x)
        (dh,) = jax.linear_transpose(lambda c: pull(c)[1], h)(dx)
        return h, dh, pull(h - dh)

    return both


def forwards(apply):
    return lambda weights, x, dx: jax.jvp(lambda x: apply(weights, x), (x,), (dx,))


def linearised(apply):
    def both(weights, x, dx):
        h, push = jax.linearize(lambda x: apply(weights, x), x)
        return h, push(dx), push(2 * dx)

    return both


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


FORMS = (meanflow, one_linearisation)


@functools.cache
def expected(form):
    return jax.jit(form(functools.partial(network, dot_product_attention, "none")))(*arrays())


# The library's forward pass cannot be differentiated, where that of the stand-in can.
@pytest.mark.parametrize(
    ("flash", "form", "remat"),
    [
        ("splash", one_linearisation, "dots"),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in itertools.product(("stand-in", "splash"), FORMS, REMAT_POLICIES)),
    ],
)  # fmt: skip
def test_training_equals_plain_attention(flash, form, remat):
    outputs = jax.jit(form(functools.partial(network, FLASH[flash], remat)))(*arrays())
    assert_close(outputs, expected(form))


@pytest.mark.slow
@pytest.mark.parametrize("form", [one_linearisation, forwards, linearised, meanflow])
def test_without_jit_and_unrolled(form):
    def unrolled(weights, x):
        for w in weights:
            x = block(FLASH["stand-in"], w, x)
        return x

    assert_close(form(unrolled)(*arrays()), expected(form))


@pytest.mark.parametrize(
    "length", [100, *(pytest.param(n, marks=pytest.mark.slow) for n in (256, 276, 640))]
)
def test_the_library_on_tpu_equals_plain_attention(length):
    """With padding; without; padded to a block of 384; and beyond one block, where two kernels
    compute the gradients."""
    q, k, v, ct = np.random.default_rng(0).normal(size=(4, 2, length, 2, 24)).astype("f")
    outputs, expected = (
        jax.jit(lambda *x: (lambda o, pull: (o, pull(ct)))(*jax.vjp(attend, *x)))(q, k, v)
        for attend in (from_heads_first(SPLASH), dot_product_attention)
    )
    assert_close(outputs, expected)


def random_arrays(count):
    """`count` arrays [b, l, n, d]."""
    values = np.random.default_rng(0).normal(size=(count, 1, 16, 1, 8))
    return list(jnp.asarray(values, jnp.float32))


def test_the_jvp_kernel_runs_only_in_forward_mode():
    q, k, v = random_arrays(3)
    flash = FLASH["stand-in"]

    def calls(function):
        return str(jax.make_jaxpr(function)(q, k, v)).count("name=attention_jvp")

    assert calls(flash) == 0
    assert calls(lambda *x: jax.jvp(flash, x, x)) == 1
    assert calls(lambda *x: jax.vjp(flash, *x)[1](x[0])) == 0


def test_the_derivative_of_the_tangent_is_zero():
    q, k, v = random_arrays(3)

    def tangent(q):
        return jnp.sum(jax.jvp(FLASH["stand-in"], (q, k, v), (q, k, v))[1])

    np.testing.assert_array_equal(jax.grad(tangent)(q), np.zeros_like(q))


@pytest.mark.parametrize("flash", FLASH)
def test_no_residual_is_saved_twice(flash):
    """The backward pass and the tangent share q, k, v, o and one number per query."""
    shape = jax.ShapeDtypeStruct((2, 128, 3, 8), jnp.float32)
    _, pull = jax.eval_shape(lambda *x: jax.vjp(FLASH[flash], *x), shape, shape, shape)
    sizes = [leaf.size for leaf in jax.tree.leaves(pull)]
    assert sum(sizes) <= 4 * np.prod(shape.shape) + 2 * 3 * 128 + 16


@pytest.mark.parametrize("which", [(0,), (1,), (0, 2), (1, 2)])
def test_some_arguments_may_be_constant(which):
    x, ct = random_arrays(3), random_arrays(4)[3]

    def both(attend):
        def partly(*inputs):
            return attend(*(inputs[which.index(i)] if i in which else x[i] for i in range(3)))

        inputs = [x[i] for i in which]
        o, pull = jax.vjp(partly, *inputs)
        return pull(ct), jax.jvp(partly, inputs, inputs), jax.linear_transpose(pull, o)(
            tuple(inputs))  # fmt: skip

    flash, plain = (jax.jit(functools.partial(both, attend))()
                    for attend in (FLASH["stand-in"], dot_product_attention))
    assert_close(flash, plain)


def test_forward_mode_nests():
    """A third derivative meets our rule, too, and not the library's forward pass."""
    q, k, v = random_arrays(3)

    def once(q):
        return jax.jvp(lambda q: FLASH["splash"](q, k, v), (q,), (q,))[0]

    def twice(q):
        return jnp.sum(jax.jvp(once, (q,), (q,))[0])

    assert jax.eval_shape(jax.grad(twice), q).shape == q.shape


def test_reverse_mode_is_the_library_s():
    """Gradients equal the library's to the last bit; none comes from our kernel."""
    q, k, v, ct = random_arrays(4)
    ours, library = (jax.vjp(attend, q, k, v)[1](ct)
                     for attend in (FLASH["stand-in"], flash_backends.cpu_attention))
    jax.tree.map(np.testing.assert_array_equal, ours, library)
