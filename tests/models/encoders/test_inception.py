"""Inception-v3 of FID: golden values, the names of its weights, and the features of sFID."""

import functools
import json
from collections.abc import Callable

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import linen as nn
from tiny_networks import TinyInception

from dmf.checkpoints.convert.name_tables import ParamSlice, Table, to_params, to_tensors
from dmf.checkpoints.convert.tables.inception import NAMINGS
from dmf.errors import InputError
from dmf.evaluation import metrics
from dmf.evaluation.feature_extractors import extractor
from dmf.evaluation.statistics_collector import StatisticsCollector
from dmf.models.encoders.inception import Inception, InceptionFeatures
from dmf.runtime.sharding import make_mesh
from dmf.sampling.generator import GeneratedImages
from dmf.types import Params

(NAMING,) = NAMINGS
NETWORK = Inception()
SPATIAL = "Mixed_6d/branch1x1"


@functools.cache
def table() -> Table:
    return NAMING.table(NETWORK)


@functools.cache
def abstract() -> Params:
    return jax.eval_shape(NETWORK.init, jax.random.key(0))


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    """Published names and shapes, without the counters of training steps."""
    names = json.loads((gv.FOLDER / "inception_fid_names.json").read_text())
    return {name: tuple(s) for name, s in names.items() if not name.endswith("tracked")}


@functools.cache
def params() -> Params:
    return to_params(table(), gv.inception_tensors(), abstract())


def bilinear(side: int) -> np.ndarray:
    """[299, side] weights of plain bilinear sampling: centres at halves, no antialiasing."""
    centres = ((np.arange(299) + 0.5) * side / 299 - 0.5).clip(0, side - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(side)))


def network_input() -> np.ndarray:
    with np.load(gv.FOLDER / "inception_fid.npz") as file:
        images = file["images"] / 255
    rows, columns = map(bilinear, images.shape[1:3])
    resized = np.einsum("ih,jw,bhwc->bijc", rows, columns, images, optimize=True)
    return (2 * resized - 1).astype("f")


@functools.cache
def run() -> Callable[..., tuple[InceptionFeatures, jax.Array]]:
    """(parameters, images) -> features, and the whole 1x1 branch of Mixed_6d; compiled once."""

    @jax.jit
    def run(params, images):
        branches = []

        def record(method, arguments, keywords, context):
            result = method(*arguments, **keywords)
            if "/".join(context.module.path) == SPATIAL:
                branches.append(result)
            return result

        with nn.intercept_methods(record):
            return NETWORK.apply(params, images), *branches

    return run


@functools.cache
def outputs() -> tuple[InceptionFeatures, jax.Array]:
    """The outputs for the golden images."""
    return jax.device_get(run()(params(), jnp.asarray(network_input())))


@pytest.mark.parametrize("field", ["pool3", "logits"])
def test_golden_values(field):
    with np.load(gv.FOLDER / "inception_fid.npz") as file:
        golden = file[field]
    gv.assert_each_near(getattr(outputs()[0], field), golden, 1e-5)


def test_spatial_features_are_a_slice_by_row_column_channel():
    """They are the first 7 of 192 channels of a 17 x 17 map, channels fastest."""
    features, branch = outputs()
    assert branch.shape == (3, 17, 17, 192)
    assert features.spatial.shape == (3, 2023)
    for row, column, channel in ((0, 0, 0), (0, 0, 6), (0, 16, 1), (5, 11, 3), (16, 16, 6)):
        np.testing.assert_array_equal(
            features.spatial[:, (row * 17 + column) * 7 + channel],
            branch[:, row, column, channel],
        )
    assert features.spatial.min() == 0 < features.spatial.max(), "taken before ReLU"


def test_logits_without_the_bias():
    features, _ = outputs()
    weights = gv.inception_tensors()["fc.weight"]
    gv.assert_near(features.unbiased_logits, features.pool3 @ weights.T, 1e-5)
    # Logits of 1e5 leave two digits of a bias of 0.1.
    difference = features.logits - features.unbiased_logits
    gv.assert_each_near(difference, [gv.inception_tensors()["fc.bias"]] * 3, 2e-2)


@pytest.mark.slow
def test_features_are_float32():
    images = jnp.zeros((1, 299, 299, 3))
    half = jax.eval_shape(Inception(dtype="bfloat16").apply, abstract(), images)
    assert {leaf.dtype for leaf in (*half, *outputs()[0])} == {jnp.dtype("float32")}


def test_published_names_and_shapes():
    ours = {name: e.shape for name, e in table().items() if isinstance(e, ParamSlice)}
    assert ours == shapes()
    assert NAMING.infer_network(shapes(), {}) == NETWORK
    assert set(NAMING.identifying_tensors) <= shapes().keys()


def test_round_trip():
    back = to_tensors(table(), params())
    assert back.keys() == gv.inception_tensors().keys()
    for name, tensor in gv.inception_tensors().items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_counters_are_dropped():
    counter = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    converted = to_params(table(), gv.inception_tensors() | counter, abstract())
    jax.tree.map(np.testing.assert_array_equal, converted, params())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("Mixed_7c.branch_pool.bn.running_var", None, "is missing"),
        ("AuxLogits.fc.weight", np.zeros((1000, 768), "f"), "is not a tensor of this network"),
        ("Mixed_6b.branch7x7_2.conv.weight", np.zeros((128, 128, 7, 1), "f"), "has shape .*7, 1"),
    ],
)
def test_unfit_tensor_is_named(name, tensor, message):
    changed = gv.inception_tensors() | {name: tensor}
    if tensor is None:
        del changed[name]
    with pytest.raises(InputError, match=f"^tensor '{name}' {message}"):
        to_params(table(), changed, abstract())


def test_another_inception_needs_num_outputs():
    other = shapes() | {"fc.weight": (1000, 2048)}
    with pytest.raises(InputError, match="has 1000 rows.* which has 1008.*num_outputs=1000$"):
        NAMING.infer_network(other, {})
    assert NAMING.infer_network(other, {"num_outputs": 1000}) == Inception(num_outputs=1000)
    with pytest.raises(InputError, match="^heads: "):
        NAMING.infer_network(shapes(), {"heads": 2})


@pytest.mark.parametrize("shape", [(1, 256, 256, 3), (1, 299, 299, 1)])
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(InputError, match=r"images have shape .*: Inception takes \[b, 299"):
        NETWORK.apply(abstract(), jnp.zeros(shape))


@pytest.mark.parametrize(("field", "value"), [("num_outputs", 0), ("dtype", "float16")])
def test_bad_fields_are_named(field, value):
    with pytest.raises(InputError, match=f"^{field}={value}: "):
        Inception(**{field: value})


@pytest.mark.parametrize("network", [
    TinyInception(), pytest.param(NETWORK, marks=pytest.mark.slow)
], ids=["tiny", "whole"])
def test_the_distance_of_a_small_set_is_that_of_a_plain_computation(network, tmp_path):
    """From 8-bit images through the whole of `dmf evaluate`, against numpy alone."""
    weights = params() if network == NETWORK else {
        "weights": np.random.default_rng(1).normal(size=(27, 7)).astype("f")
    }
    sets = np.random.default_rng(0).integers(0, 256, (2, 3, 40, 40, 3)).astype(np.uint8)
    sets[1] //= 2
    collector = StatisticsCollector(
        extractor=extractor(("pool3",), inception=(network, weights)),
        mesh=make_mesh(devices=jax.devices()[:1]), chunk_size=2, part_size=2,
    )  # fmt: skip
    statistics = [
        collector.collect(
            lambda i, images=images: GeneratedImages(images[i % 3], np.ones(len(i), bool)), 3,
            epath.Path(tmp_path / str(number)), feature_strides={}, name="set",
        ).moments["pool3"]
        for number, images in enumerate(sets)
    ]  # fmt: skip
    # Image by image; output pixel i of the published rule lies at source pixel i * 40 / 299.
    positions = np.arange(299) * 40 / 299
    low = np.floor(positions).astype(int)
    share, high = positions - low, np.minimum(low + 1, 39)
    features = []
    for images in sets.astype(float):
        rows = images[:, low] * (1 - share)[:, None, None] + images[:, high] * share[:, None, None]
        both = rows[:, :, low] * (1 - share)[:, None] + rows[:, :, high] * share[:, None]
        inputs = ((both - 128) / 128).astype("f")
        features.append(np.asarray(jax.jit(network.apply)(weights, inputs).pool3, float))
    a, b = (x - x.mean(0) for x in features)
    # The root of the product has the singular values of a b^T, which are three.
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    gap = ((features[0].mean(0) - features[1].mean(0)) ** 2).sum()
    expected = gap + ((a**2).sum() + (b**2).sum() - 2 * root) / 2
    assert metrics.frechet_distance(*statistics) == pytest.approx(expected, rel=1e-3)
