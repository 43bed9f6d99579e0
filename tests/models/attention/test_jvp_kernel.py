"""Attention and its tangent in one kernel, interpreted: equal to `jax.jvp` of plain operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.models.attention import jvp_kernel
from dmf.models.attention.jvp_kernel import attention_jvp, attention_jvp_reference

KERNEL = {
    platform: functools.partial(attention_jvp, platform=platform, interpret=True)
    for platform in ("tpu", "gpu")
}
CASES = (
    # length, keys, head width, dtype
    (64, 64, 64, "float32"),
    (64, 64, 32, "bfloat16"),
    (100, 100, 72, "float32"),
    (100, 100, 72, "bfloat16"),
    (256, 256, 72, "bfloat16"),
    (256, 256, 64, "float32"),
    (40, 300, 20, "float32"),
    pytest.param(276, 276, 64, "float32", marks=pytest.mark.slow),
    pytest.param(1024, 1024, 72, "bfloat16", marks=pytest.mark.slow),
    pytest.param(1024, 1024, 32, "float32", marks=pytest.mark.slow),
)


def draw(length, keys, width, dtype="float32", batch=3, heads=2):
    """q, k, v and three tangents; large logits, so that a softmax without its maximum overflows."""
    random = np.random.default_rng(length + width)
    lengths = (length, keys, keys) * 2
    x = [random.normal(size=(batch, n, heads, width)) for n in lengths]
    x[0] *= 6
    return [jnp.asarray(a, dtype) for a in x]


def distance(a, b) -> float:
    """The relative distance by norm, in float32."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("platform", KERNEL)
@pytest.mark.parametrize(("length", "keys", "width", "dtype"), CASES)
def test_equals_jvp_of_plain_operations(platform, length, keys, width, dtype):
    x = draw(length, keys, width, dtype)
    outputs, expected = jax.jit(KERNEL[platform])(*x), jax.jit(attention_jvp_reference)(*x)
    for a, b in zip(outputs, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert distance(a, b) < {"float32": 1e-5, "bfloat16": 1e-2}[dtype]


@pytest.mark.parametrize("width", [72, pytest.param(112, marks=pytest.mark.slow)])
def test_equals_it_with_the_blocks_of_a_hopper_gpu(monkeypatch, width):
    """Larger blocks of keys, some of them padding, and a width in parts, some of it padding."""
    monkeypatch.setattr(jvp_kernel, "compute_capability", lambda: jvp_kernel.HOPPER)
    x = draw(40, 70, width)
    outputs = jax.jit(lambda *x: KERNEL["gpu"](*x))(*x)
    for a, b in zip(outputs, attention_jvp_reference(*x), strict=True):
        assert distance(a, b) < 1e-5


def test_the_parts_of_a_width_have_powers_of_two_and_little_padding():
    for width in range(1, 257):
        parts = jvp_kernel.gpu_width_parts(width)
        sizes = [part.size for part in parts]
        assert all(size in (16, 32, 64) for size in sizes)
        assert [part.start for part in parts] == [sum(sizes[:i]) for i in range(len(sizes))]
        assert width <= sum(sizes) < width + 16
    assert [part.size for part in jvp_kernel.gpu_width_parts(72)] == [64, 16]


def test_wide_heads_have_smaller_blocks_of_keys(monkeypatch):
    """What `python -m benchmarks.gpu_kernels` found to spill nothing."""
    for capability, blocks in ((8.0, [32, 32, 32, 32, 16]), (9.0, [64, 64, 64, 32, 32])):
        monkeypatch.setattr(jvp_kernel, "compute_capability", lambda value=capability: value)
        assert [jvp_kernel.gpu_key_block(width) for width in (64, 72, 80, 96, 128)] == blocks


@pytest.mark.parametrize("platform", KERNEL)
def test_logits_beyond_the_range_of_exp(platform):
    x = draw(64, 200, 32)
    x[0] *= 100
    o, do = KERNEL[platform](*x)
    assert jnp.isfinite(o).all() and jnp.isfinite(do).all()
    assert distance(o, attention_jvp_reference(*x)[0]) < 1e-3


def test_the_tangent_is_linear():
    x = draw(48, 48, 16)
    others = draw(48, 48, 17)[3:]
    others = [a[..., :16] for a in others]
    kernel = KERNEL["tpu"]
    o, one = kernel(*x)
    _, two = kernel(*x[:3], *others)
    same, both = kernel(*x[:3], *(2 * a - 3 * b for a, b in zip(x[3:], others, strict=True)))
    np.testing.assert_array_equal(o, same)
    assert distance(both, 2 * one - 3 * two) < 1e-5


@pytest.mark.parametrize("which", range(3))
def test_the_tangent_is_a_difference_quotient(which):
    """Along q, k or v alone."""
    x = draw(48, 70, 16)
    x[0] /= 6
    tangents = [a if i == which else jnp.zeros_like(a) for i, a in enumerate(x[3:])]
    step = 1e-2
    ends = [
        KERNEL["gpu"](*(a + sign * step * d for a, d in zip(x[:3], tangents, strict=True)),
                      *tangents)[0]
        for sign in (1, -1)
    ]  # fmt: skip
    tangent = KERNEL["gpu"](*x[:3], *tangents)[1]
    assert distance(tangent, (ends[0] - ends[1]) / (2 * step)) < 2e-3


@pytest.mark.parametrize("platform", KERNEL)
def test_no_array_is_as_large_as_the_weights(platform):
    """No array of the kernel has a number for each pair of tokens."""
    x = [jax.ShapeDtypeStruct((1, 1024, 2, 32), jnp.bfloat16)] * 6
    assert "1024,1024]" in str(jax.make_jaxpr(attention_jvp_reference)(*x))
    assert "1024,1024]" not in str(jax.make_jaxpr(KERNEL[platform])(*x))
