"""The autoencoder of latents: golden values of the published one, its names, and its limits."""

import functools
import math
import re

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.convert.autoencoder import SPELLINGS, read
from dmf.convert.names import to_ours, to_theirs
from dmf.encoders.autoencoder import Autoencoder, GroupNorm, Moments
from dmf.typing import InputError

PUBLISHED = Autoencoder()
SMALL = Autoencoder(widths=(32, 32, 64), layers_per_block=1, groups=8)
TINY = Autoencoder(channels=2, latent_channels=3, widths=(4, 8), layers_per_block=1, groups=2)
DIFFUSERS, OLD = SPELLINGS
MODERN_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
over_spellings = pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
over_networks = pytest.mark.parametrize("network", [PUBLISHED, SMALL, TINY], ids=str)


def abstract(network):
    return jax.eval_shape(network.init, jax.random.key(0))


def shapes(network, spelling=DIFFUSERS):
    return {name: entry.shape for name, entry in spelling.table(network).items()}


def abstract_zeros(network):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract(network))


def drawn(network):
    """Parameters with which no part is without effect, as `init` leaves biases."""
    draw = np.random.default_rng(1).standard_normal
    return jax.tree.map(
        lambda leaf: draw(leaf.shape).astype("f") / math.sqrt(math.prod(leaf.shape[:-1])),
        abstract(network),
    )


def old_tensors() -> dict[str, np.ndarray]:
    names = "|".join(map(re.escape, MODERN_NAMES.values()))
    old = {modern: old for old, modern in MODERN_NAMES.items()}
    return {
        re.sub(rf"(attentions\.0)\.({names})\.", lambda m: f"{m[1]}.{old[m[2]]}.", name): tensor
        for name, tensor in gv.autoencoder_tensors().items()
    }


CHECKPOINTS = {DIFFUSERS.name: gv.autoencoder_tensors, OLD.name: old_tensors}


@functools.cache
def params():
    return gv.on_device(to_ours(DIFFUSERS.table(SMALL), gv.autoencoder_tensors(), abstract(SMALL)))


@functools.cache
def moments() -> Moments:
    return gv.jit(SMALL.encode)(params(), gv.load("vae_0").images("images_nchw"))


@functools.cache
def decoded() -> jax.Array:
    return gv.jit(SMALL.decode)(params(), gv.load("vae_0").images("z"))


def test_golden_moments():
    golden = gv.load("vae_0")
    mean, std = moments()
    gv.assert_near(mean, golden.images("mean"), 1e-5)
    gv.assert_near(std, golden.images("std"), 1e-5)
    gv.assert_near(2 * jnp.log(std), golden.images("logvar"), 1e-5)


def test_golden_images():
    golden = gv.load("vae_0").images("decoded")
    assert jnp.abs(golden).max() > 2, "nothing here would be clipped"
    gv.assert_near(decoded(), golden, 1e-5)


def test_bfloat16_is_close():
    rough = Autoencoder(**vars(SMALL) | {"dtype": "bfloat16"})
    golden = gv.load("vae_0")
    outputs = (
        *gv.jit(rough.encode)(params(), golden.images("images_nchw")),
        gv.jit(rough.decode)(params(), golden.images("z")),
    )
    for ours, exact in zip(outputs, (*moments(), decoded()), strict=True):
        assert ours.dtype == jnp.float32
        gv.assert_near(ours, exact, 5e-2)
        assert np.linalg.norm(ours - exact) > 1e-4 * np.linalg.norm(exact), "this was float32"


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_statistics_are_float32_in_bfloat16(direction):
    """Every sum, reciprocal root and exponential of GroupNorm and softmax."""
    rough = Autoencoder(**vars(TINY) | {"dtype": "bfloat16"})
    inputs = jnp.zeros((1, 4, 4, 2 if direction == "encode" else 3))
    program = str(jax.make_jaxpr(getattr(rough, direction))(abstract_zeros(rough), inputs))
    made = re.findall(r"(\w+)\[[\d,]*\] = (\w+)", program)
    for primitive in ("exp", "rsqrt", "reduce_sum", "reduce_max"):
        assert {dtype for dtype, name in made if name == primitive} == {"f32"}, primitive
    assert {dtype for dtype, name in made if name == "conv_general_dilated"} == {"bf16"}


@functools.cache
def constant() -> Moments:
    """Of a network that gives these log-variances, and half as means, for every image."""
    zeros = abstract_zeros(TINY)
    zeros["encoder"]["moments"]["bias"] = jnp.array([0.5, 0.5, 0.5, -100, 100, 3], jnp.float32)
    return gv.jit(TINY.encode)(zeros, jnp.ones((1, 2, 2, 2)))


@pytest.mark.parametrize(("channel", "clamped"), [(0, -30), (1, 20), (2, 3)])
def test_log_variance_is_clamped(channel, clamped):
    np.testing.assert_allclose(constant().std[..., channel], math.exp(clamped / 2), rtol=1e-5)
    np.testing.assert_array_equal(constant().mean, 0.5)


def normalised(x, dtype="float32"):
    variables = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    return GroupNorm(2, dtype=jnp.dtype(dtype)).apply(variables, x)


def test_epsilon_of_group_norm():
    """Of variance 1e-6, the epsilon itself, sqrt(1/2) is left."""
    signs = jnp.array([1.0, -1.0]).reshape(1, 2, 1, 1).repeat(4, axis=-1)
    np.testing.assert_allclose(normalised(1e-3 * signs), signs * math.sqrt(0.5), rtol=1e-5)


def test_group_norm_keeps_the_digits_of_a_large_mean():
    signs = jnp.array([1.0, -1.0]).reshape(1, 2, 1, 1).repeat(4, axis=-1)
    np.testing.assert_allclose(normalised(1e4 + signs), signs, rtol=1e-4)


def test_rows_and_columns_are_alike():
    """Turning images and kernels turns the latents, also of images that are not square."""
    upright = drawn(TINY)
    turned = jax.tree.map(lambda w: w.swapaxes(0, 1) if w.ndim == 4 else w, upright)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((1, 64, 48, 2)), jnp.float32)
    one = gv.jit(TINY.encode)(upright, images)
    other = gv.jit(TINY.encode)(turned, images.swapaxes(1, 2))
    assert one.mean.shape == one.std.shape == (1, 32, 24, 3)
    for ours, theirs in zip(one, other, strict=True):
        gv.assert_near(ours, theirs.swapaxes(1, 2), 1e-5)


def test_the_published_network():
    params = abstract(Autoencoder(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 83_653_863
    images = jax.ShapeDtypeStruct((1, 256, 192, 3), jnp.float32)
    mean, std = jax.eval_shape(PUBLISHED.encode, params, images)
    assert PUBLISHED.factor == 8
    assert mean.shape == std.shape == (1, 32, 24, 4)
    assert jax.eval_shape(PUBLISHED.decode, params, mean).shape == images.shape


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 32, 30, 3), r"images have shape \(1, 32, 30, 3\): .* multiples of 4$"),
        ("encode", (1, 30, 32, 3), r"images have shape \(1, 30, 32, 3\): .* multiples of 4$"),
        ("encode", (1, 32, 32, 4), r"images have shape .*: give \[b, h, w, 3\]"),
        ("decode", (1, 8, 8, 3), r"latents have shape \(1, 8, 8, 3\): give \[b, h, w, 4\]$"),
    ],
)
def test_inputs_of_other_shapes_are_refused(method, shape, message):
    with pytest.raises(InputError, match=f"^{message}") as error:
        getattr(SMALL, method)(params(), jnp.zeros(shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 0}, "channels=0: give a whole number >= 1"),
        ({"latent_channels": 0}, "latent_channels=0: give a whole number >= 1"),
        ({"layers_per_block": 0}, "layers_per_block=0: give a whole number >= 1"),
        ({"groups": 0}, "groups=0: give a whole number >= 1"),
        ({"widths": ()}, r"widths=\(\): give the channels of at least one level"),
        ({"widths": (32, 0)}, r"widths=\(32, 0\): give whole numbers >= 1"),
        ({"groups": 48}, r"groups=48: it must divide each of autoencoder.widths=\(128, .*"),
        ({"dtype": "float16"}, "dtype=float16: choose float32 or bfloat16"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(InputError, match=rf"^autoencoder\.{message}$"):
        Autoencoder(**fields)


def test_published_names_and_shapes():
    published = gv.load("vae_0").config["names"]
    assert shapes(SMALL) == {name: tuple(shape) for name, shape in published.items()}


@over_spellings
def test_there_and_back(spelling):
    theirs = CHECKPOINTS[spelling.name]()
    back = to_theirs(spelling.table(SMALL), to_ours(spelling.table(SMALL), theirs, abstract(SMALL)))
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@over_spellings
def test_back_and_there(spelling):
    """Also that a spelling is told from the other, and fills every parameter."""
    ours = drawn(TINY)
    theirs = to_theirs(spelling.table(TINY), ours)
    back = to_ours(spelling.table(TINY), theirs, abstract(TINY))
    assert jax.tree.structure(back) == jax.tree.structure(ours)
    jax.tree.map(np.testing.assert_array_equal, back, ours)
    assert [theirs.keys() >= set(s.marks) for s in SPELLINGS] == [s is spelling for s in SPELLINGS]


def test_both_spellings_are_the_same_parameters():
    old = to_ours(OLD.table(SMALL), old_tensors(), abstract(SMALL))
    jax.tree.map(np.testing.assert_array_equal, old, params())


@over_spellings
@over_networks
def test_read_finds_the_network(network, spelling):
    given = {} if network.groups == 32 else {"groups": network.groups}
    assert read(shapes(network, spelling), given) == network


def test_read_takes_what_is_given():
    given = {"layers_per_block": 2, "dtype": "bfloat16"}
    expected = Autoencoder(**vars(SMALL) | {"groups": 32} | given)
    assert read(shapes(SMALL), given) == expected
    with pytest.raises(InputError, match=r"^autoencoder\.groups=32: it must divide .*=\(4, 8\)$"):
        read(shapes(TINY), {})


@pytest.mark.parametrize(
    "name", ["encoder.conv_in.weight", "encoder.down_blocks.1.resnets.0.conv1.weight"]
)
def test_read_names_what_it_misses(name):
    found = shapes(PUBLISHED)
    with pytest.raises(InputError, match=f"^tensor '{name}' has shape .3,.: a convolution "):
        read(found | {name: (3,)}, {})
    del found[name]
    with pytest.raises(InputError, match=f"^tensor '{name}' is missing from the checkpoint$"):
        read(found, {})


def assert_refused(spelling, theirs, message):
    network = read({name: tensor.shape for name, tensor in theirs.items()}, {"groups": 8})
    with pytest.raises(InputError, match=message) as error:
        to_ours(spelling.table(network), theirs, abstract(network))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["quant_conv.bias", "decoder.up_blocks.2.resnets.1.norm1.weight"])
def test_missing_tensor_is_named(name):
    theirs = dict(gv.autoencoder_tensors())
    del theirs[name]
    assert_refused(DIFFUSERS, theirs, rf"^tensor '{name}' is missing .* \(1 such\)$")


@pytest.mark.parametrize("name", ["loss.logvar", "decoder.up_blocks.0.resnets.2.norm1.weight"])
def test_unknown_tensor_is_named(name):
    theirs = gv.autoencoder_tensors() | {name: np.zeros(1, "f")}
    assert_refused(DIFFUSERS, theirs, rf"^tensor '{name}' is not .* \(1 such\)$")


@over_spellings
def test_attention_is_linear(spelling):
    """One-by-one convolutions, as the authors of the network had, are another spelling."""
    (name,) = spelling.marks
    theirs = CHECKPOINTS[spelling.name]()
    theirs = theirs | {name: theirs[name][..., None, None]}
    expected = rf"^tensor '{name}' has shape \(64, 64, 1, 1\): this network has \(64, 64\)$"
    assert_refused(spelling, theirs, expected)


def test_the_other_spelling_is_refused():
    name = r"(encoder|decoder)\.mid_block\.attentions\.0\."
    message = rf"^tensor '{name}key.bias' is missing .* \(16 such\)$"
    assert_refused(OLD, gv.autoencoder_tensors(), message)
