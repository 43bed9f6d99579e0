"""Flash attention differentiated: forwards, backwards, and both in one training step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.kernels import libraries
from dmf.kernels.flash import with_heads_first
from dmf.kernels.modes import differentiable
from dmf.kernels.tangent import attention_with_tangent, heads_first
from dmf.models.attention import attention as formula
from dmf.models.dit import REMAT_POLICIES

KERNEL = functools.partial(attention_with_tangent, platform="tpu", interpret=True)
SPLASH = functools.partial(libraries.on_tpu, interpret=True)
FLASH = {
    "stand-in": differentiable(libraries.on_cpu, KERNEL),
    "splash": with_heads_first(
        differentiable(SPLASH, functools.partial(heads_first, interpret=True))
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
    """The loss of MeanFlow as it is written, and its gradient: `jax.jvp` within `jax.grad`."""

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


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


FORMS = (meanflow, one_linearisation)


@functools.cache
def expected(form):
    return jax.jit(form(functools.partial(network, formula, "none")))(*arrays())


# The library's forward pass cannot be differentiated, where that of the stand-in can.
@pytest.mark.parametrize(
    ("flash", "form", "remat"),
    [
        *itertools.product(["stand-in"], FORMS, REMAT_POLICIES),
        ("splash", meanflow, "none"),
        ("splash", one_linearisation, "dots"),
        *(pytest.param("splash", form, remat, marks=pytest.mark.slow)
          for form, remat in itertools.product(FORMS, REMAT_POLICIES)),
    ],
)  # fmt: skip
def test_training_equals_the_formula(flash, form, remat):
    found = jax.jit(form(functools.partial(network, FLASH[flash], remat)))(*arrays())
    assert_close(found, expected(form))


@pytest.mark.parametrize("form", [forwards, linearised, meanflow, one_linearisation])
def test_without_jit_and_unrolled(form):
    def unrolled(weights, x):
        for w in weights:
            x = block(FLASH["stand-in"], w, x)
        return x

    assert_close(form(unrolled)(*arrays()), expected(form))


@pytest.mark.parametrize(
    "length", [100, *(pytest.param(n, marks=pytest.mark.slow) for n in (256, 640))]
)
def test_the_library_on_tpu_equals_the_formula(length):
    """With places filled in; without; and with the two gradients apart, beyond one block."""
    q, k, v, ct = np.random.default_rng(0).normal(size=(4, 2, length, 2, 24)).astype("f")
    found, expected = (
        jax.jit(lambda *x: (lambda o, pull: (o, pull(ct)))(*jax.vjp(attend, *x)))(q, k, v)
        for attend in (with_heads_first(SPLASH), formula)
    )
    assert_close(found, expected)


def heads(count):
    """So many of [b, l, n, d]."""
    drawn = np.random.default_rng(0).normal(size=(count, 1, 16, 1, 8))
    return list(jnp.asarray(drawn, jnp.float32))


def test_the_kernel_runs_where_a_tangent_is_asked_for_and_nowhere_else():
    q, k, v = heads(3)
    flash = FLASH["stand-in"]

    def calls(function):
        return str(jax.make_jaxpr(function)(q, k, v)).count("name=attention_with_tangent")

    assert calls(flash) == 0
    assert calls(lambda *x: jax.jvp(flash, x, x)) == 1
    assert calls(lambda *x: jax.vjp(flash, *x)[1](x[0])) == 0


def test_only_the_target_uses_the_tangent_so_its_derivative_is_zero():
    q, k, v = heads(3)

    def tangent(q):
        return jnp.sum(jax.jvp(FLASH["stand-in"], (q, k, v), (q, k, v))[1])

    np.testing.assert_array_equal(jax.grad(tangent)(q), np.zeros_like(q))


@pytest.mark.parametrize("flash", FLASH)
def test_nothing_is_kept_twice(flash):
    """For the backward pass and the tangent together: q, k, v, the output, a number a query."""
    shape = jax.ShapeDtypeStruct((2, 128, 3, 8), jnp.float32)
    _, pull = jax.eval_shape(lambda *x: jax.vjp(FLASH[flash], *x), shape, shape, shape)
    kept = [leaf.size for leaf in jax.tree.leaves(pull)]
    assert sum(kept) <= 4 * np.prod(shape.shape) + 2 * 3 * 128 + 16


@pytest.mark.parametrize("which", [(0,), (1,), (0, 2), (1, 2)])
def test_some_arguments_may_be_constant(which):
    x, ct = heads(3), heads(4)[3]

    def both(attend):
        def some(*moving):
            return attend(*(moving[which.index(i)] if i in which else x[i] for i in range(3)))

        moving = [x[i] for i in which]
        o, pull = jax.vjp(some, *moving)
        return pull(ct), jax.jvp(some, moving, moving), jax.linear_transpose(pull, o)(
            tuple(moving))  # fmt: skip

    assert_close(jax.jit(lambda: both(FLASH["stand-in"]))(), jax.jit(lambda: both(formula))())


def test_forward_mode_nests():
    """A third derivative, too, meets a rule and not the library's forward pass."""
    q, k, v = heads(3)

    def once(q):
        return jax.jvp(lambda q: FLASH["splash"](q, k, v), (q,), (q,))[0]

    def twice(q):
        return jnp.sum(jax.jvp(once, (q,), (q,))[0])

    assert jax.eval_shape(jax.grad(twice), q).shape == q.shape


def test_the_library_is_read_in_reverse_mode():
    """Gradients are the library's own, to the last bit, and not a transpose of our kernel."""
    q, k, v, ct = heads(4)
    for a, b in zip(*(jax.vjp(f, q, k, v)[1](ct) for f in (FLASH["stand-in"], libraries.on_cpu)),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)
