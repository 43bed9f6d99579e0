"""The autoencoder of Stable Diffusion: golden values, published names, and its errors."""

import dataclasses
import functools
import math
import re

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dmf.checkpoints.convert.name_tables import to_params, to_tensors
from dmf.checkpoints.convert.tables.autoencoder_kl import NAMINGS, infer_network
from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.encoders.autoencoder import Moments
from dmf.models.encoders.autoencoder_kl import AutoencoderKL, GroupNorm
from dmf.models.encoders.latent_scaling import LatentScaling

PUBLISHED = AutoencoderKL()
SMALL = AutoencoderKL(widths=(32, 32, 64), layers_per_block=1, groups=8)
TINY = AutoencoderKL(channels=2, latent_channels=3, widths=(4, 8), layers_per_block=1, groups=2,
                     default_scaling=LatentScaling())
DIFFUSERS, OLD = NAMINGS
MODERN_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
over_namings = pytest.mark.parametrize("naming", NAMINGS, ids=lambda s: s.name)
over_networks = pytest.mark.parametrize("network", [PUBLISHED, SMALL, TINY], ids=str)


def abstract(network):
    return abstract_params(network)


def shapes(network, naming=DIFFUSERS):
    return {name: entry.shape for name, entry in naming.table(network).items()}


def abstract_zeros(network):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract(network))


def random_params(network):
    """Random parameters, biases too, so that every part has an effect."""
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
    table = DIFFUSERS.table(SMALL)
    return gv.on_device(to_params(table, gv.autoencoder_tensors(), abstract(SMALL)))


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
    assert jnp.abs(golden).max() > 2, "no value would be clipped"
    gv.assert_near(decoded(), golden, 1e-5)


@pytest.mark.slow
def test_bfloat16_is_close():
    rough = AutoencoderKL(**vars(SMALL) | {"dtype": "bfloat16"})
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
    rough = AutoencoderKL(**vars(TINY) | {"dtype": "bfloat16"})
    inputs = jnp.zeros((1, 4, 4, 2 if direction == "encode" else 3))
    program = str(jax.make_jaxpr(getattr(rough, direction))(abstract_zeros(rough), inputs))
    outputs = re.findall(r"(\w+)\[[\d,]*\] = (\w+)", program)
    for primitive in ("exp", "rsqrt", "reduce_sum", "reduce_max"):
        assert {dtype for dtype, name in outputs if name == primitive} == {"f32"}, primitive
    assert {dtype for dtype, name in outputs if name == "conv_general_dilated"} == {"bf16"}


@functools.cache
def constant() -> Moments:
    """The moments of a network with constant log-variances -100, 100, 3 and means 0.5."""
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
    """Values of variance 1e-6, the epsilon itself, are normalised to sqrt(1/2)."""
    signs = jnp.array([1.0, -1.0]).reshape(1, 2, 1, 1).repeat(4, axis=-1)
    np.testing.assert_allclose(normalised(1e-3 * signs), signs * math.sqrt(0.5), rtol=1e-5)


def test_group_norm_keeps_the_digits_of_a_large_mean():
    signs = jnp.array([1.0, -1.0]).reshape(1, 2, 1, 1).repeat(4, axis=-1)
    np.testing.assert_allclose(normalised(1e4 + signs), signs, rtol=1e-4)


def test_rows_and_columns_are_alike():
    """Transposing images and kernels transposes the latents, also of oblong images."""
    upright = random_params(TINY)
    transposed = jax.tree.map(lambda w: w.swapaxes(0, 1) if w.ndim == 4 else w, upright)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((1, 64, 48, 2)), jnp.float32)
    one = gv.jit(TINY.encode)(upright, images)
    other = gv.jit(TINY.encode)(transposed, images.swapaxes(1, 2))
    assert one.mean.shape == one.std.shape == (1, 32, 24, 3)
    for first, second in zip(one, other, strict=True):
        gv.assert_near(first, second.swapaxes(1, 2), 1e-5)


def test_the_published_network():
    params = abstract(AutoencoderKL(dtype="bfloat16"))
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
        ({"widths": ()}, r"widths=\(\): give a whole number >= 1 for each of at least one .*"),
        ({"widths": (32, 0)}, r"widths=\(32, 0\): give a whole number >= 1 for each of at .*"),
        ({"groups": 48}, r"groups=48: it must divide each of widths=\(128, .*"),
        ({"default_scaling": LatentScaling(mean=(0.0,) * 3, std=(1.0,) * 3)},
         r"default_scaling=.*: give a mean and a std for each of latent_channels=4"),
        ({"dtype": "float16"}, "dtype=float16: choose one of float32, bfloat16"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(InputError, match=rf"^{message}$"):
        AutoencoderKL(**fields)


def test_published_names_and_shapes():
    published = gv.load("vae_0").config["names"]
    assert shapes(SMALL) == {name: tuple(shape) for name, shape in published.items()}


@over_namings
def test_round_trip_of_tensors(naming):
    tensors = CHECKPOINTS[naming.name]()
    back = to_tensors(naming.table(SMALL), to_params(naming.table(SMALL), tensors, abstract(SMALL)))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@over_namings
def test_round_trip_of_parameters(naming):
    """Every parameter has a tensor, and the names identify the naming."""
    ours = random_params(TINY)
    tensors = to_tensors(naming.table(TINY), ours)
    back = to_params(naming.table(TINY), tensors, abstract(TINY))
    assert jax.tree.structure(back) == jax.tree.structure(ours)
    jax.tree.map(np.testing.assert_array_equal, back, ours)
    matches = [other for other in NAMINGS if tensors.keys() >= set(other.identifying_tensors)]
    assert matches == [naming]


def test_both_namings_are_the_same_parameters():
    old = to_params(OLD.table(SMALL), old_tensors(), abstract(SMALL))
    jax.tree.map(np.testing.assert_array_equal, old, params())


@over_namings
@over_networks
def test_the_network_is_inferred(network, naming):
    given = {} if network.groups == 32 else {"groups": network.groups}
    assert infer_network(shapes(network, naming), given) == network


@pytest.mark.parametrize(("quant", "post_quant"), [(False, True), (True, False), (False, False)])
def test_quant_convolutions_are_where_their_tensors_are(quant, post_quant):
    network = dataclasses.replace(TINY, quant_conv=quant, post_quant_conv=post_quant)
    names = shapes(network)
    assert infer_network(names, {"groups": 2}) == network
    paths = {entry.path for entry in DIFFUSERS.table(network).values()}
    assert paths == flatten_dict(abstract(network), sep="/").keys()
    heads = {name.partition(".")[0] for name in names} - {"encoder", "decoder"}
    assert heads == set(["quant_conv"] * quant + ["post_quant_conv"] * post_quant)


@pytest.mark.parametrize(("channels", "scale"), [(4, 0.18215), (16, 1.0)])
def test_the_scaling_where_none_is_stated(channels, scale):
    names = shapes(dataclasses.replace(TINY, latent_channels=channels))
    assert infer_network(names, {"groups": 2}).default_scaling == LatentScaling(scale=scale)
    given = LatentScaling(scale=0.5, shift=0.25)
    stated = infer_network(names, {"groups": 2, "default_scaling": given})
    assert stated.default_scaling == given


def test_given_fields_win_where_the_tensors_do_not_tell():
    given = {"dtype": "bfloat16"}
    expected = AutoencoderKL(**vars(SMALL) | {"groups": 32} | given)
    assert infer_network(shapes(SMALL), given) == expected
    layers = SMALL.layers_per_block
    with pytest.raises(InputError, match=f"layers_per_block=9: its tensors say {layers}"):
        infer_network(shapes(SMALL), {"layers_per_block": 9})
    with pytest.raises(InputError, match=r"^groups=32: it must divide .*=\(4, 8\)$"):
        infer_network(shapes(TINY), {})


@pytest.mark.parametrize(
    "name", ["encoder.conv_in.weight", "encoder.down_blocks.1.resnets.0.conv1.weight"]
)
def test_missing_or_odd_tensors_are_named(name):
    stored_shapes = shapes(PUBLISHED)
    with pytest.raises(InputError, match=f"^tensor '{name}' has shape .3,.: a convolution "):
        infer_network(stored_shapes | {name: (3,)}, {})
    del stored_shapes[name]
    with pytest.raises(InputError, match=f"^tensor '{name}' is missing from the checkpoint$"):
        infer_network(stored_shapes, {})


def assert_refused(naming, tensors, message):
    network = infer_network({name: tensor.shape for name, tensor in tensors.items()}, {"groups": 8})
    with pytest.raises(InputError, match=message) as error:
        to_params(naming.table(network), tensors, abstract(network))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["quant_conv.bias", "decoder.up_blocks.2.resnets.1.norm1.weight"])
def test_missing_tensor_is_named(name):
    tensors = dict(gv.autoencoder_tensors())
    del tensors[name]
    assert_refused(DIFFUSERS, tensors, rf"^tensor '{name}' is missing .* \(1 such\)$")


@pytest.mark.parametrize("name", ["loss.logvar", "decoder.up_blocks.0.resnets.2.norm1.weight"])
def test_unknown_tensor_is_named(name):
    tensors = gv.autoencoder_tensors() | {name: np.zeros(1, "f")}
    assert_refused(DIFFUSERS, tensors, rf"^tensor '{name}' is not .* \(1 such\)$")


@over_namings
def test_attention_is_linear(naming):
    """The 1 x 1 convolutions of the authors' own checkpoints are refused."""
    (name,) = naming.identifying_tensors
    tensors = CHECKPOINTS[naming.name]()
    tensors = tensors | {name: tensors[name][..., None, None]}
    expected = rf"^tensor '{name}' has shape \(64, 64, 1, 1\): this network has \(64, 64\)$"
    assert_refused(naming, tensors, expected)


def test_the_other_naming_is_refused():
    name = r"(encoder|decoder)\.mid_block\.attentions\.0\."
    message = rf"^tensor '{name}key.bias' is missing .* \(16 such\)$"
    assert_refused(OLD, gv.autoencoder_tensors(), message)
