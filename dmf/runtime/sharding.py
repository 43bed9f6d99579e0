"""The mesh of devices, and the sharding of every array on it. Networks know nothing of it.

The mesh has four axes:
- "slices" joins groups of devices over a slower network (TPU slices, GPU nodes). It is a second
  data axis, over which only the sum of gradients is communicated.
- "data" splits the batch, and also the optimizer state and the EMA parameters, so that arrays that
  are used once per step are not replicated.
- "fsdp" splits the batch, parameters, optimizer state and EMA parameters.
- "tensor" splits the dimensions of parameters that `TENSOR_RULES` names.

An axis need not divide a dimension of the optimizer state or the EMA parameters into parts of at
least a tile: a divisor of the axis is then the number of parts, and the other devices of the axis
hold copies of them. The sharding of such an array is on a mesh of its own, with the same devices in
the same order, in which the axis is two: "data" and "data_copies". Parameters are split by whole
axes only; the compiler would gather activations to use copies of their parts.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dmf.errors import InputError

BATCH_AXES = ("slices", "data", "fsdp")
# Along these axes of a batch the parameters are not split.
REPLICA_AXES = ("slices", "data")
STATE_AXES = ("fsdp", "data")

# The dimension of a parameter that "tensor" splits: heads of the attention, features of the MLP.
# The first matmul of each pair is split by columns, the second by rows: one sum follows both.
# The modulation, a third of a block's parameters, is split by rows: by columns XLA (JAX 0.10, on
# CPUs) gives wrong numbers for unrolled blocks on a mesh of 2 x 2 x 2.
TENSOR_RULES = (
    (r"blocks/attention/qkv/kernel$", -2),
    (r"blocks/attention/qkv/bias$", -2),
    (r"blocks/attention/out/kernel$", -3),
    (r"blocks/mlp/in/kernel$", -1),
    (r"blocks/mlp/gate/kernel$", -1),
    (r"blocks/mlp/in/bias$", -1),
    (r"blocks/mlp/out/kernel$", -2),
    (r"blocks/modulation/linear/kernel$", -3),
)
# Parameters that are stacked by depth: their first axis is scanned over, and is never split.
STACKED = re.compile(r"(^|/)blocks/")
# Number of values from which an array is split; smaller ones cost more communication than memory.
SMALLEST_SPLIT = 4096
# TPUs store arrays in tiles of 8 x 128 values, and pad what is gathered from parts of other rows.
TILE_ROWS = 8


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    slices: int = 0,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh with the axes slices, data, fsdp and tensor.

    Args:
      data: size of the data axis; -1 for all remaining devices, which one axis may have.
      fsdp: size of the fsdp axis.
      tensor: size of the tensor axis.
      slices: size of the slices axis; 0 for as many slices as the devices report.
      devices: the devices; all by default.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    reported = count_slices(devices)
    if slices < 0 or (slices and (slices % reported or len(devices) % slices)):
        raise InputError(
            "mesh.slices", slices,
            f"the {len(devices)} devices are in {reported} slices; give 0 for that, or a multiple "
            "of it that divides the number of devices",
        )
    slices = slices or reported
    sizes = _axis_sizes({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices), slices)
    devices_per_slice = len(devices) // slices
    ordered = sorted(devices, key=lambda d: (_slice_of(d), d.process_index, d.id))
    meshes = [
        mesh_utils.create_device_mesh(
            tuple(sizes.values()), ordered[start : start + devices_per_slice],
            allow_split_physical_axes=True,
        )
        for start in range(0, len(ordered), devices_per_slice)
    ]
    return Mesh(np.stack(meshes), ("slices", *sizes), axis_types=(AxisType.Auto,) * 4)


def _axis_sizes(sizes: dict[str, int], devices: int, slices: int) -> dict[str, int]:
    """The sizes of the axes of each slice, with -1 replaced by the remaining devices."""
    name = f"{'x'.join(map(str, sizes.values()))} (data x fsdp x tensor)"
    if list(sizes.values()).count(-1) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
        raise InputError("mesh", name, "each axis is at least 1, and one may be -1, for all "
                         "remaining devices")
    devices_per_slice = devices // slices
    given = math.prod(n for n in sizes.values() if n != -1)
    sizes = {axis: devices_per_slice // given if n == -1 else n for axis, n in sizes.items()}
    if math.prod(sizes.values()) != devices_per_slice:
        each = f" of each of {slices} slices" if slices > 1 else ""
        raise InputError("mesh", name, f"it must hold all {devices_per_slice} devices{each}; one "
                         "axis may be -1")
    return sizes


def count_slices(devices: Sequence[jax.Device]) -> int:
    """The number of TPU slices, or GPU nodes, that the devices report."""
    return len(set(map(_slice_of, devices)))


def _slice_of(device: jax.Device) -> int:
    """The number of the TPU slice, or GPU node, of a device; 0 if its platform reports none.

    Attached GPUs report their node as their slice, but those of a topology do not: there each node
    has one process.
    """
    if device.platform == "gpu" and device.client.runtime_type == "compile_only_runtime":
        return device.process_index
    return getattr(device, "slice_index", None) or 0


def local_mesh(max_devices: int | None = None) -> Mesh:
    """A mesh of the devices of this process along "data", of at most `max_devices` devices."""
    return make_mesh(devices=jax.local_devices()[:max_devices])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis is split over slices, data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain_batch(x: jax.Array, axis: int = 0) -> jax.Array:
    """Constrains the sharding of one axis of an array to that of a batch, inside jit.

    Args:
      x: an array.
      axis: the axis of samples.

    Returns:
      The array; unchanged if no mesh with these axes is in context, or the axis cannot be split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names):
        return x
    # Within `jax.shard_map` the rows are split along its axes already.
    axes = tuple(name for name in BATCH_AXES if name not in mesh.manual_axes)
    if not axes or x.shape[axis] % math.prod(mesh.shape[name] for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(None,) * axis, axes))


def targets_one_cpu() -> bool:
    """Whether the program that is traced is for one CPU device, by the mesh in context; without a
    mesh, whether JAX's default device is a CPU."""
    mesh = jax.sharding.get_abstract_mesh()
    target = mesh.abstract_device
    platform = target.platform if target else jax.default_backend()
    return platform == "cpu" and (mesh.empty or mesh.size == 1)


def map_over_devices(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Compiles a function so that each device applies it to its shard of the rows.

    Unlike a program that the compiler splits, the bits of the result depend on the number of rows
    per device and not on the number of devices.

    Args:
      function: (params, *rows) -> rows, where rows are arrays with the same leading axis.
      mesh: the devices.

    Returns:
      The same function on whole arrays; `params` are replicated, and the leading axis of `rows` is
      split over all axes of the mesh, which must divide it.
    """
    split = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(
        lambda params, rows: function(params, *rows),
        mesh=mesh,
        in_specs=(PartitionSpec(), split),
        out_specs=split,
        check_vma=False,
    )
    return jax.jit(lambda params, *rows: mapped(params, rows))


def replicate_on_host(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree of arrays to every device of a mesh of this process.

    Args:
      tree: tree of arrays with any sharding. All processes that hold a shard must call this
        function.
      mesh: devices of this process.
    """
    global_leaves = [leaf for leaf in jax.tree.leaves(tree)
                     if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable]
    if global_leaves:
        everywhere = replicated(global_leaves[0].sharding.mesh)
        tree = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
        tree = jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
    return jax.device_put(tree, replicated(mesh))


def parameter_shardings(mesh: Mesh, params: Any) -> Any:
    """The sharding of each leaf of a tree of parameters, arrays or shapes."""
    return _shardings(mesh, params, ("fsdp",), copies=False)


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each leaf of the optimizer state or the EMA parameters, arrays or shapes."""
    return _shardings(mesh, tree, STATE_AXES, copies=True)


def _shardings(mesh: Mesh, tree: Any, axes: tuple[str, ...], copies: bool) -> Any:
    def leaf_sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec, parts = partition(name, leaf.shape, dict(mesh.shape), axes, copies)
        return NamedSharding(_mesh_of_parts(mesh, parts), spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def constrain_parts(name: str, x: jax.Array, *, of_blocks: bool) -> jax.Array:
    """Constrains the sharding of a stacked array, inside jit, to that of the train state.

    Args:
      name: path of the array.
      x: [depth, ...] of the shape of a parameter.
      of_blocks: whether the parts are some whole blocks, and not some rows of all blocks; the depth
        need not be a multiple of their number.

    Returns:
      The array; unchanged if no mesh with the four axes is in context.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(mesh.axis_names) != {*BATCH_AXES, "tensor"}:
        return x
    spec, parts = partition(name, x.shape, dict(mesh.shape), STATE_AXES, copies=True)
    if of_blocks:
        spec = PartitionSpec(tuple(jax.tree.leaves(tuple(spec))) or None)
    sharding = NamedSharding(_mesh_of_parts(mesh, parts), spec)
    return jax.lax.with_sharding_constraint(x, sharding)


def _mesh_of_parts(mesh: Mesh | AbstractMesh, parts: dict[str, int]) -> Mesh | AbstractMesh:
    """The mesh in which an axis of more devices than parts is two: the parts and their copies."""
    shape = {}
    for axis, size in mesh.shape.items():
        shape[axis] = parts.get(axis, size)
        if shape[axis] < size:
            shape[f"{axis}_copies"] = size // shape[axis]
    if len(shape) == len(mesh.shape):
        return mesh
    sizes, types = tuple(shape.values()), (AxisType.Auto,) * len(shape)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(sizes, tuple(shape), axis_types=types)
    return Mesh(mesh.devices.reshape(sizes), tuple(shape), axis_types=types)


def partition(
    name: str, shape: tuple[int, ...], sizes: dict[str, int], axes: tuple[str, ...], copies: bool
) -> tuple[PartitionSpec, dict[str, int]]:
    """The partition of one parameter.

    >>> sizes, name = {"data": 256, "fsdp": 4, "tensor": 2}, "blocks/mlp/in/kernel"
    >>> spec, parts = partition(name, (12, 384, 1536), sizes, ("fsdp", "data"), copies=True)
    >>> spec == PartitionSpec(None, ("fsdp", "data"), "tensor"), parts
    (True, {'fsdp': 4, 'data': 4})

    Args:
      name: path of the parameter.
      shape: shape of the parameter.
      sizes: sizes of the mesh axes by name.
      axes: mesh axes, each of which splits one dimension that "tensor" does not: the one that it
        can split into the most parts, or the largest of several.
      copies: whether an axis may split a dimension into fewer parts than it has devices.

    Returns:
      The partition; and for each of `axes` in it the number of parts, a divisor of its size.
    """
    spec: list[Any] = [None] * len(shape)
    parts: dict[str, int] = {}
    if math.prod(shape) < SMALLEST_SPLIT:
        return PartitionSpec(), parts
    for pattern, dimension in TENSOR_RULES:
        if re.search(pattern, name) and shape[dimension] % sizes["tensor"] == 0:
            spec[dimension] = "tensor"
    first = 1 if STACKED.search(name) else 0
    lengths = {i: shape[i] for i in range(first, len(shape)) if spec[i] is None}
    for axis in axes:
        counts = {i: _count_parts(length, sizes[axis], copies) for i, length in lengths.items()}
        split = max(counts, key=lambda i: (counts[i], shape[i]), default=None)
        if split is not None and counts[split] > 1 and (copies or counts[split] == sizes[axis]):
            spec[split] = (*(spec[split] or ()), axis)
            parts[axis] = counts[split]
            lengths[split] //= counts[split]
    return PartitionSpec(*spec), parts


def _count_parts(length: int, devices: int, copies: bool) -> int:
    """Into how many equal parts a mesh axis splits a dimension: as many as devices if they divide
    it, and, where devices may hold copies, leave each at least a tile; else their greatest divisor
    that leaves whole tiles, if the dimension consists of these."""
    if length % devices == 0 and (length // devices >= TILE_ROWS or not copies):
        return devices
    return math.gcd(devices, length if length % TILE_ROWS else length // TILE_ROWS)


def shardings_of(tree: Any) -> Any:
    """The shardings of a tree of arrays, or of shapes with shardings."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with shardings, to compile for or to restore a checkpoint into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
