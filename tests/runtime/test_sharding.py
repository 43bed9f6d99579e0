"""The sharding of arrays on eight devices: rules by path and shape, and the memory they save."""

import functools
import math

import golden_values as gv
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dmf.errors import InputError
from dmf.models.dit import DiT
from dmf.runtime import sharding
from dmf.runtime.sharding import (
    batch_sharding,
    batch_shards,
    make_mesh,
    parameter_shardings,
    partition,
    replicated,
    state_shardings,
)

MODEL = DiT(
    input_size=8,
    channels=4,
    depth=4,
    width=64,
    heads=4,
    num_classes=10,
    conditioning="decoupled",
    split_depth=2,
    learned_variance=True,
)
SHAPES = jax.eval_shape(MODEL.init, jax.random.key(0))


@functools.cache
def specs(data: int, fsdp: int, tensor: int, kind=parameter_shardings) -> dict:
    """The partition and shape of each parameter by path."""
    shardings = kind(make_mesh(data, fsdp, tensor), SHAPES)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (sharding.spec, leaf.shape)
        for (path, sharding), leaf in zip(
            jax.tree.leaves_with_path(shardings), jax.tree.leaves(SHAPES), strict=True
        )
    }


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("blocks/attention/qkv/kernel", (None, ("fsdp",), None, "tensor", None)),
        ("blocks/attention/out/kernel", (None, "tensor", None, ("fsdp",))),
        ("blocks/mlp/in/kernel", (None, ("fsdp",), "tensor")),
        ("blocks/mlp/out/kernel", (None, "tensor", ("fsdp",))),
        ("time_embedding/in/kernel", (("fsdp",), None)),
        ("patch_embedding/bias", ()),
        ("label_embedding/embedding", ()),
        ("log_variance/linear/kernel", ()),
    ],
)
def test_rules(path, expected):
    assert specs(2, 2, 2)[path][0] == PartitionSpec(*expected)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("blocks/mlp/in/kernel", (None, ("fsdp", "data"), "tensor")),
        ("time_embedding/in/kernel", (("fsdp", "data"), None)),
        ("patch_embedding/bias", ()),
    ],
)
def test_state_is_spread_over_data_too(path, expected):
    assert specs(2, 2, 2, state_shardings)[path][0] == PartitionSpec(*expected)


def partition_of(name: str, shape: tuple, axes: tuple[str, ...], **sizes: int) -> PartitionSpec:
    """The partition of a parameter of which each axis splits a dimension completely."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | sizes
    spec, parts = partition(name, shape, sizes, axes, copies=False)
    assert parts == {axis: sizes[axis] for axis in parts}
    return spec


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("blocks/mlp/gate/kernel", (4, 768, 2048), (None, "fsdp", "tensor")),
        ("v_head/blocks/mlp/gate/kernel", (8, 768, 2048), (None, "fsdp", "tensor")),
        ("u_head/blocks/mlp/out/kernel", (8, 2048, 768), (None, "tensor", "fsdp")),
        ("u_head/blocks/attention/qkv/kernel", (8, 768, 3, 12, 64),
         (None, "fsdp", None, "tensor", None)),
        ("v_head/blocks/attention_gate", (8, 768), (None, "fsdp")),
        ("v_head/linear/kernel", (768, 16), ("fsdp", None)),
        ("wide_head/blocks/modulation/linear/kernel", (2, 2048, 6, 2048),
         (None, "tensor", None, "fsdp")),
        ("wide_head/blocks/mlp/in/kernel", (2, 2048, 8192), (None, "fsdp", "tensor")),
        ("wide_head/condition/kernel", (1152, 2048), (None, "fsdp")),
        ("patch_reduction/kernel", (768, 128), ("fsdp", None)),
        ("prefix/label", (8, 768), (None, "fsdp")),
        ("position_embedding", (276, 768), (None, "fsdp")),
    ],
)  # fmt: skip
def test_rules_of_heads_and_of_an_in_context_network(path, shape, expected):
    assert partition_of(path, shape, ("fsdp",), fsdp=4, tensor=4) == PartitionSpec(*expected)


def test_tensor_splits_biases_of_the_split_products():
    split = functools.partial(partition_of, axes=("fsdp",), tensor=4)
    assert split("blocks/attention/qkv/bias", (12, 3, 8, 64)) == PartitionSpec(
        None, None, "tensor", None
    )
    assert split("blocks/mlp/in/bias", (12, 2048)) == PartitionSpec(None, "tensor")
    assert split("blocks/mlp/out/bias", (12, 512)) == PartitionSpec(None, None)


@pytest.mark.parametrize("kind", [parameter_shardings, state_shardings])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (2, 1, 4), (1, 4, 2)])
def test_depth_is_never_split_and_every_part_fits(kind, sizes):
    mesh = make_mesh(*sizes)
    for path, (spec, shape) in specs(*sizes, kind).items():
        if path.startswith("blocks/"):
            assert not spec or spec[0] is None, path
        for axes, length in zip(spec, shape, strict=False):
            named = axes if isinstance(axes, tuple) else (axes,) if axes else ()
            assert length % math.prod(mesh.shape[axis] for axis in named) == 0, path


def test_depth_is_not_split_even_where_it_is_the_largest():
    split = functools.partial(partition_of, shape=(64, 32, 16), axes=("fsdp",), data=2, fsdp=4)
    assert split("blocks/attention/norm") == PartitionSpec(None, "fsdp", None)
    assert split("final/linear/kernel") == PartitionSpec("fsdp", None, None)


def test_small_leaves_are_whole():
    for path, (spec, shape) in specs(1, 8, 1).items():
        assert (spec == PartitionSpec()) == (math.prod(shape) < 4096), path


def test_a_dimension_that_no_axis_divides_stays_whole():
    split = functools.partial(partition_of, axes=("fsdp",), data=2, fsdp=4, tensor=4)
    assert split("blocks/attention/qkv/kernel", (12, 384, 3, 6, 64)) == (
        PartitionSpec(None, "fsdp", None, None, None)
    )
    assert split("head/kernel", (4097, 3)) == PartitionSpec(None, None)


@pytest.mark.parametrize(
    ("shape", "sizes", "spec", "parts"),
    [
        ((64, 128), {"fsdp": 2, "data": 3}, (None, "fsdp"), {"fsdp": 2}),
        # The dimension that can be split most, the largest of several, and not the largest of all.
        ((1000, 128), {"data": 16}, (None, "data"), {"data": 16}),
        ((1000, 192), {"data": 24}, (None, "data"), {"data": 24}),
        ((1004, 42), {"data": 16}, ("data", None), {"data": 4}),
        # Parts that leave copies are whole tiles of eight rows, if the dimension has these.
        ((1152, 1152), {"data": 128}, ("data", None), {"data": 128}),
        ((1152, 1152), {"data": 256}, ("data", None), {"data": 16}),
        ((1152, 36), {"data": 5 * 256}, ("data", None), {"data": 16}),
        ((1152, 4608), {"data": 256}, (None, "data"), {"data": 256}),
        ((1152, 72), {"data": 12}, ("data", None), {"data": 12}),
        # An axis splits what the axis before it has left.
        ((1152, 32), {"fsdp": 64, "data": 4}, (("fsdp",), "data"), {"fsdp": 64, "data": 4}),
        ((1152, 1152), {"fsdp": 8, "data": 12}, (("fsdp", "data"), None), {"fsdp": 8, "data": 12}),
        ((1152, 5), {"fsdp": 8, "data": 64}, (("fsdp", "data"), None), {"fsdp": 8, "data": 2}),
        ((1152, 1152), {"fsdp": 5, "data": 7}, (None, None), {}),
    ],
)
def test_an_axis_splits_a_dimension_by_a_divisor(shape, sizes, spec, parts):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | sizes
    axes = ("fsdp", "data")
    assert partition("x", shape, sizes, axes, copies=True) == (PartitionSpec(*spec), parts)
    whole = {axis: count for axis, count in parts.items() if count == sizes[axis]}
    assert partition("x", shape, sizes, axes, copies=False)[1] == whole


def test_where_devices_may_hold_copies_no_part_is_smaller_than_a_tile():
    sizes = {"data": 256, "fsdp": 1, "tensor": 1}
    for copies, parts in ((True, 128), (False, 256)):
        assert partition("x", (1024, 16), sizes, ("data",), copies)[1] == {"data": parts}


# The parameters of XL/2 that hold more than 99 % of the values.
XL_KERNELS = {
    "blocks/attention/qkv/kernel": (28, 1152, 3, 16, 72),
    "blocks/attention/out/kernel": (28, 16, 72, 1152),
    "blocks/mlp/in/kernel": (28, 1152, 4608),
    "blocks/mlp/out/kernel": (28, 4608, 1152),
    "blocks/modulation/linear/kernel": (28, 1152, 6, 1152),
}


@pytest.mark.parametrize("axis", ["data", "fsdp"])
@pytest.mark.parametrize("name", XL_KERNELS)
def test_a_mesh_of_any_size_splits_the_state_of_xl(axis, name):
    """By all devices if they divide the width of 1,152 into parts of at least a tile, and else by a
    divisor of its 144 tiles."""
    for size in (*range(1, 33), 48, 56, 96, 100, 256, 384, 1000, 2048, 4096):
        sizes = {"data": 1, "fsdp": 1, "tensor": 1, axis: size}
        _, parts = partition(name, XL_KERNELS[name], sizes, ("fsdp", "data"), copies=True)
        whole = 1152 % size == 0 and 1152 // size >= 8
        assert parts.get(axis, 1) == (size if whole else math.gcd(size, 144)), size


@pytest.mark.parametrize(
    ("sizes", "part"),
    [((8, 1, 1), (9, 130)), ((1, 8, 1), (9, 130)), ((6, 1, 1), (6, 130)), ((5, 1, 1), (36, 26)),
     ((7, 1, 1), (36, 130)), ((3, 2, 1), (12, 65)), ((2, 1, 3), (36, 65))],
)  # fmt: skip
def test_a_program_takes_parts_and_their_copies_beside_a_batch(sizes, part):
    devices = jax.devices()[: math.prod(sizes)]
    mesh, x = make_mesh(*sizes, devices=devices), np.arange(36.0 * 130, dtype="f4").reshape(36, 130)
    split, rows = state_shardings(mesh, x), np.linspace(0, 1, 840 * 36, dtype="f4").reshape(840, 36)
    update = jax.jit(lambda x, rows: x - rows.T @ (rows @ x), out_shardings=split)
    updated = update(jax.device_put(x, split), jax.device_put(rows, batch_sharding(mesh)))
    assert {shard.data.shape for shard in updated.addressable_shards} == {part}
    assert list(updated.sharding.mesh.devices.flat) == list(mesh.devices.flat)
    np.testing.assert_allclose(updated, x - rows.T @ (rows @ x), rtol=1e-4)


def bytes_on_device(device: jax.Device, tree) -> int:
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize(
    ("kind", "sizes", "parts"),
    [
        pytest.param(parameter_shardings, (1, 8, 1), 8, marks=pytest.mark.slow),
        pytest.param(parameter_shardings, (2, 1, 4), 1.8, marks=pytest.mark.slow),
        (state_shardings, (4, 2, 1), 8),
    ],
)
def test_parameters_are_made_in_parts(kind, sizes, parts):
    mesh = make_mesh(*sizes)
    params = gv.jit(MODEL.init, out_shardings=kind(mesh, SHAPES))(jax.random.key(0))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    small = sum(
        math.prod(leaf.shape) * 4
        for leaf in jax.tree.leaves(SHAPES)
        if math.prod(leaf.shape) < 4096
    )
    assert small < 0.05 * whole
    for device in mesh.devices.flat:
        assert bytes_on_device(device, params) - small <= (whole - small) / parts


def test_initial_values_do_not_depend_on_the_mesh():
    whole = gv.jit(MODEL.init)(jax.random.key(0))
    shardings = parameter_shardings(make_mesh(1, 4, 2), SHAPES)
    split = gv.jit(MODEL.init, out_shardings=shardings)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, split, whole)


def test_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    x = jax.device_put(np.zeros((8, 3), "f"), batch_sharding(mesh))
    assert batch_shards(mesh) == 4
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
    assert jax.device_put(x, replicated(mesh)).is_fully_replicated


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, -1), (1, 2, 4)), ((2, 2, 2), (2, 2, 2))],
)
def test_one_axis_takes_all_remaining_devices(sizes, shape):
    assert tuple(make_mesh(*sizes).shape.values()) == (1, *shape)


def test_slices_are_the_outermost_axis_and_only_the_batch_is_split_over_them():
    mesh = make_mesh(-1, 2, 1, slices=2)
    assert dict(mesh.shape) == {"slices": 2, "data": 2, "fsdp": 2, "tensor": 1}
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert set(ids[0].flat) == {0, 1, 2, 3}
    assert batch_shards(mesh) == 8
    assert batch_sharding(mesh).spec == PartitionSpec(("slices", "data", "fsdp"))
    axes = {
        axis
        for sharding in jax.tree.leaves(state_shardings(mesh, SHAPES))
        for part in sharding.spec if part for axis in np.atleast_1d(part)
    }
    assert axes == {"data", "fsdp", "tensor"}


def test_slices_are_those_that_the_devices_report(monkeypatch):
    # In the order of a runtime that mixes them.
    monkeypatch.setattr(sharding, "_slice_of", lambda device: device.id % 2)
    assert sharding.count_slices(jax.devices()) == 2
    mesh = make_mesh(2, 1, -1)
    assert dict(mesh.shape) == {"slices": 2, "data": 2, "fsdp": 1, "tensor": 2}
    assert [{d.id % 2 for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    assert make_mesh(slices=4).shape["slices"] == 4
    for slices in (-1, 1, 3, 16):
        with pytest.raises(InputError, match=rf"mesh.slices={slices}: the 8 devices are in 2 "):
            make_mesh(slices=slices)
    with pytest.raises(InputError, match="it must hold all 4 devices of each of 2 slices"):
        make_mesh(8)


@pytest.mark.parametrize(
    "sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (1, -2, 1), (16, 1, 1), (2, 2, 1)]
)
def test_bad_meshes_are_named(sizes):
    with pytest.raises(InputError, match=r"^mesh={}x{}x{} \(data x fsdp".format(*sizes)) as error:
        make_mesh(*sizes)
    assert "\n" not in str(error.value)
