"""DINOv2: golden values, three namings of its names, and the resizing of positions and images."""

import dataclasses
import functools
import math

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.checkpoints.convert.name_tables import ParamSlice, to_params, to_tensors
from dmf.checkpoints.convert.tables.dinov2 import NAMINGS
from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.encoders.dinov2 import DINOV2_SIZES, DinoV2, resize_bicubic
from dmf.types import Params

NETWORK = DinoV2(width=48, depth=3, heads=4, table_side=4)
HUB, TRANSFORMERS, RELEASED = NAMINGS
# With the mask token, which this network does not have.
PUBLISHED_COUNTS = {"S": 22_056_576, "B": 86_580_480, "L": 304_368_640}
over_namings = pytest.mark.parametrize("naming", NAMINGS, ids=lambda s: s.name)


def abstract(network: DinoV2) -> Params:
    return abstract_params(network)


def shapes(naming, network: DinoV2) -> dict[str, tuple[int, ...]]:
    entries = naming.table(network).items()
    return {name: entry.shape for name, entry in entries if isinstance(entry, ParamSlice)}


@functools.cache
def params() -> Params:
    table = TRANSFORMERS.table(NETWORK)
    return gv.on_device(to_params(table, gv.dinov2_tensors(), abstract(NETWORK)))


def released() -> dict[str, np.ndarray]:
    """The same weights with the names of the files on the Hugging Face hub."""
    renamed = {}
    for name, tensor in gv.dinov2_tensors().items():
        for new, old in (("q_proj", "attention.query"), ("k_proj", "attention.key"),
                         ("v_proj", "attention.value"), ("o_proj", "output.dense")):
            name = name.replace(f"attention.{new}", f"attention.{old}")
        renamed[name] = tensor
    return renamed


def hub() -> dict[str, np.ndarray]:
    """The same weights with the names of the authors; query, key and value are fused by rows."""
    tensors = gv.dinov2_tensors()
    fused = {
        "cls_token": tensors["embeddings.cls_token"],
        "mask_token": tensors["embeddings.mask_token"],
        "pos_embed": tensors["embeddings.position_embeddings"],
    }
    for leaf in ("weight", "bias"):
        projection = tensors[f"embeddings.patch_embeddings.projection.{leaf}"]
        fused[f"patch_embed.proj.{leaf}"] = projection
        fused[f"norm.{leaf}"] = tensors[f"layernorm.{leaf}"]
    for i in range(NETWORK.depth):
        block = {name.removeprefix(f"encoder.layer.{i}."): tensor
                 for name, tensor in tensors.items() if name.startswith(f"encoder.layer.{i}.")}
        for k in (1, 2):
            fused[f"blocks.{i}.ls{k}.gamma"] = block[f"layer_scale{k}.lambda1"]
        for leaf in ("weight", "bias"):
            parts = [block[f"attention.{part}_proj.{leaf}"] for part in "qkv"]
            fused[f"blocks.{i}.attn.qkv.{leaf}"] = np.concatenate(parts)
            fused[f"blocks.{i}.attn.proj.{leaf}"] = block[f"attention.o_proj.{leaf}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                fused[f"blocks.{i}.{name}.{leaf}"] = block[f"{name}.{leaf}"]
    return fused


CHECKPOINTS = {HUB.name: hub, TRANSFORMERS.name: gv.dinov2_tensors, RELEASED.name: released}
apply = gv.jit(DinoV2.apply, static_argnums=0)


def test_golden_values():
    golden = gv.load("dinov2_0")
    tokens = apply(NETWORK, params(), golden.images("pixel_values"))
    gv.assert_each_near(tokens, golden["last_hidden_state"], 2e-6)


@pytest.mark.slow
def test_registers_as_in_transformers():
    """Tokens of images whose patches are fewer than the positions, and the names again."""
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
    theirs = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=14, image_size=56,
        num_register_tokens=2)).eval()  # fmt: skip
    tensors = {name: gv.drawn_weights(name, tuple(tensor.shape))
               for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict({name: torch.from_numpy(w) for name, w in tensors.items()}, strict=True)
    stored_shapes = {name: tensor.shape for name, tensor in tensors.items()}
    network = TRANSFORMERS.infer_network(stored_shapes, {"heads": 4})
    assert network == dataclasses.replace(NETWORK, registers=2)
    ours = to_params(TRANSFORMERS.table(network), tensors, abstract(network))
    images = np.random.default_rng(0).standard_normal((2, 3, 28, 42)).astype("f")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images)).last_hidden_state.numpy()
    tokens = apply(network, gv.on_device(ours), np.moveaxis(images, 1, -1))
    gv.assert_near(tokens, np.delete(expected, [1, 2], axis=1), 1e-5)
    back = to_tensors(TRANSFORMERS.table(network), ours)
    assert tensors.keys() - back.keys() == {"embeddings.mask_token"}


@over_namings
def test_every_naming_gives_the_same_parameters(naming):
    tensors = CHECKPOINTS[naming.name]()
    converted = to_params(naming.table(NETWORK), tensors, abstract(NETWORK))
    assert jax.tree.structure(converted) == jax.tree.structure(params())
    jax.tree.map(np.testing.assert_array_equal, converted, params())


@over_namings
def test_round_trip(naming):
    """All but the mask token."""
    tensors = CHECKPOINTS[naming.name]()
    back = to_tensors(naming.table(NETWORK), params())
    dropped = tensors.keys() - back.keys()
    assert [name.endswith("mask_token") for name in dropped] == [True]
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


@over_namings
def test_identifying_tensors_tell_the_namings_apart(naming):
    names = CHECKPOINTS[naming.name]().keys()
    assert [other for other in NAMINGS if set(other.identifying_tensors) <= names] == [naming]


@over_namings
@pytest.mark.parametrize("size", DINOV2_SIZES)
def test_published_sizes_are_read_from_shapes(naming, size):
    network = DinoV2(**DINOV2_SIZES[size])
    stored_shapes = shapes(naming, network)
    assert naming.infer_network(stored_shapes, {}) == network
    count = sum(map(math.prod, stored_shapes.values()))
    assert count + network.width == PUBLISHED_COUNTS[size]
    assert count == sum(leaf.size for leaf in jax.tree.leaves(abstract(network)))


@over_namings
def test_other_sizes_need_the_heads(naming):
    stored_shapes = {name: tensor.shape for name, tensor in CHECKPOINTS[naming.name]().items()}
    assert naming.infer_network(stored_shapes, {"heads": 4}) == NETWORK
    message = "^heads: no published DINOv2 has 3 blocks of width 48; give --num-heads$"
    with pytest.raises(InputError, match=message):
        naming.infer_network(stored_shapes, {})


def test_given_fields_win():
    stored_shapes = shapes(HUB, DinoV2(**DINOV2_SIZES["S"]))
    given = {"heads": 3, "dtype": "bfloat16"}
    assert HUB.infer_network(stored_shapes, given) == DinoV2(**DINOV2_SIZES["S"] | given)
    with pytest.raises(InputError, match="^channels: "):
        HUB.infer_network(stored_shapes, {"channels": 3})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("patch_embed.proj.weight", None, "is missing"),
        ("blocks.0.mlp.fc1.weight", (192,), "has shape .* 2 axes"),
        ("pos_embed", (1, 18, 48), "has 18 rows"),
    ],
)
def test_shapes_of_no_network_are_named(name, shape, message):
    stored_shapes = shapes(HUB, NETWORK) | {name: shape}
    if shape is None:
        del stored_shapes[name]
    with pytest.raises(InputError, match=f"^tensor '{name}' {message}"):
        HUB.infer_network(stored_shapes, {"heads": 4})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.2.attn.qkv.bias", None, "is missing"),
        ("blocks.3.norm1.bias", np.zeros(48, "f"), "is not a tensor of this network"),
        ("blocks.1.attn.qkv.weight", np.zeros((48, 144), "f"), "has shape .*48, 144"),
    ],
)
def test_unfit_tensor_is_named(name, tensor, message):
    changed = hub() | {name: tensor}
    if tensor is None:
        del changed[name]
    with pytest.raises(InputError, match=f"^tensor '{name}' {message}"):
        to_params(HUB.table(NETWORK), changed, abstract(NETWORK))


def normalised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("norm_name", ["norm_1", "norm_2", "norm"])
def test_epsilon_of_every_norm(norm_name):
    """Attention over equal tokens returns their value, and the rest has a closed form.

    The inputs of the tested norm are about 1e-3, so that their variance is about epsilon; the
    residuals that would hide it are scaled by zero.
    """
    network = DinoV2(width=8, depth=1, heads=2, patch_size=2, mlp_ratio=2.0, table_side=2)
    draw = np.random.default_rng(0)
    ours = jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape), abstract(network))
    block = jax.tree.map(lambda leaf: leaf[0], ours["blocks"])
    block["scale_1"] *= norm_name == "norm_1"
    block["scale_2"] *= norm_name == "norm_2"
    x = 1e-3 * draw.standard_normal(8)
    ours |= {
        "class_token": x[None],
        "patch_embedding": {"kernel": np.zeros((2, 2, 3, 8)), "bias": x},
        "positions": np.zeros((5, 8)),
        "blocks": jax.tree.map(lambda leaf: leaf[None], block),
    }

    def linear(x, kernel, bias):
        return x @ kernel.reshape(len(x), -1) + bias.reshape(-1)

    def scaled(x, norm):
        return normalised(x) * norm["scale"] + norm["bias"]

    attention, mlp = block["attention"], block["mlp"]
    value = attention["qkv_kernel"][2], attention["qkv_bias"][2]
    attended = linear(linear(scaled(x, block["norm_1"]), *value), **attention["out"])
    x = x + block["scale_1"] * attended
    hidden = linear(scaled(x, block["norm_2"]), **mlp["in"])
    hidden *= [(1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden]
    x = x + block["scale_2"] * linear(hidden, **mlp["out"])
    expected = np.tile(scaled(x, ours["norm"]), (1, 5, 1))
    ours = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), ours)
    gv.assert_near(apply(network, ours, jnp.zeros((1, 4, 4, 3))), expected, 1e-5)


def cubic(distance: float, a: float) -> float:
    """Keys' kernel of cubic convolution."""
    d = abs(distance)
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def plain_bicubic(image: np.ndarray, size: int, a: float) -> np.ndarray:
    """Pixel by pixel from the 4 x 4 nearest, with repeated borders."""
    out = np.zeros((size, size))
    for i, j in np.ndindex(size, size):
        y, x = ((k + 0.5) * n / size - 0.5 for k, n in zip((i, j), image.shape, strict=True))
        for row in range(math.floor(y) - 1, math.floor(y) + 3):
            for column in range(math.floor(x) - 1, math.floor(x) + 3):
                pixel = image[np.clip(row, 0, image.shape[0] - 1),
                              np.clip(column, 0, image.shape[1] - 1)]
                out[i, j] += cubic(y - row, a) * cubic(x - column, a) * pixel
    return out


@pytest.mark.parametrize("size", [5, 7, 16])
@pytest.mark.parametrize("a", [-0.75, -0.5])
def test_bicubic_pixel_by_pixel(size, a):
    images = np.random.default_rng(0).standard_normal((2, 7, 9, 3)).astype("f")
    resized = resize_bicubic(jnp.asarray(images), size, a)
    assert resized.shape == (2, size, size, 3)
    gv.assert_near(resized[1, :, :, 2], plain_bicubic(images[1, :, :, 2], size, a), 1e-6)


def test_bicubic_is_that_of_pytorch_by_default():
    """A step at twice the size: a = -0.75 makes it overshoot by 27/256, -0.5 by less."""
    step = jnp.broadcast_to(jnp.repeat(jnp.arange(2.0), 4)[None, None, :, None], (1, 8, 8, 1))
    row = resize_bicubic(step, 16)[0, 5, :, 0]
    np.testing.assert_allclose(row[8:11], [198 / 256, 283 / 256, 265 / 256], atol=1e-6)


def antialiased(side: int, size: int) -> np.ndarray:
    """[size, side] weights of cubic convolution (a = -0.5), widened where it reduces the size."""
    scale = max(side / size, 1)
    weights = np.zeros((size, side))
    for i, j in np.ndindex(size, side):
        weights[i, j] = cubic(((i + 0.5) * side / size - 0.5 - j) / scale, -0.5)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(3, 2), (6, 4), (4, 4)])
def test_positions_follow_the_grid(rows, columns):
    """Where a patch is one pixel, the resized table can be added to the pixels instead."""
    network = DinoV2(width=3, depth=1, heads=1, patch_size=1, table_side=4)
    draw = np.random.default_rng(0)
    ours = jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape), abstract(network))
    ours["patch_embedding"]["kernel"] = np.eye(3)[None, None]
    table = ours["positions"][1:].reshape(4, 4, 3)
    resized = np.einsum("ih,jw,hwc->ijc", antialiased(4, rows), antialiased(4, columns), table)
    without = ours | {"positions": np.concatenate([ours["positions"][:1], np.zeros((16, 3))])}
    images = draw.standard_normal((2, rows, columns, 3))
    tokens, expected = (
        apply(network, *jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), arguments))
        for arguments in ((ours, images), (without, images + resized))
    )
    assert tokens.shape == (2, 1 + rows * columns, 3)
    gv.assert_near(tokens, expected, 1e-4)


def test_bfloat16_is_near_float32():
    images = gv.load("dinov2_0").images("pixel_values")
    half = dataclasses.replace(NETWORK, dtype="bfloat16")
    tokens = apply(half, params(), images)
    assert tokens.dtype == jnp.float32
    gv.assert_near(tokens, apply(NETWORK, params(), images), 3e-2)


@pytest.mark.parametrize("shape", [(1, 28, 30, 3), (1, 29, 28, 3), (1, 28, 28, 1)])
def test_images_that_cannot_be_cut_into_patches_are_refused(shape):
    with pytest.raises(InputError, match=r"^images have shape .* multiples of patch_size=14$"):
        NETWORK.apply(params(), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("field", "value"), [("heads", 5), ("depth", 0), ("table_side", 0), ("dtype", "float16")]
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(InputError, match=f"^{field}={value}: "):
        dataclasses.replace(NETWORK, **{field: value})
