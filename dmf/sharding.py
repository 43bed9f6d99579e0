"""Where arrays live: a mesh of devices, and rules by path and shape. Models know none of it.

The mesh has four axes. A batch is split over "slices", "data" and "fsdp"; parameters over "fsdp",
and over "tensor" where a rule names the dimension; optimizer state and averages over "data" too, so
that what is only touched once a step is not replicated. "slices" is a second data axis, across
groups of devices that a slower network joins (slices of TPUs, nodes of GPUs): over it nothing goes
but the sum of gradients.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dmf.typing import InputError

BATCH_AXES = ("slices", "data", "fsdp")
STATE_AXES = ("fsdp", "data")

# Which dimension of a leaf "tensor" splits: attention by heads, the MLP by its hidden width. The
# first product of each pair is split by columns, the second by rows, so one sum follows both.
# The modulation, a third of a block's parameters, is split by rows: by columns XLA (JAX 0.10, on
# CPUs) gives wrong numbers for unrolled blocks on a mesh of 2 x 2 x 2.
TENSOR_RULES = (
    (r"blocks/attention/qkv/kernel$", -2),
    (r"blocks/attention/qkv/bias$", -2),
    (r"blocks/attention/out/kernel$", -3),
    (r"blocks/mlp/in/kernel$", -1),
    (r"blocks/mlp/in/bias$", -1),
    (r"blocks/mlp/out/kernel$", -2),
    (r"blocks/modulation/linear/kernel$", -3),
)
# Leaves stacked by depth: their first axis is scanned over, and never split.
STACKED = re.compile(r"(^|/)blocks/")
# Splitting a smaller leaf costs more in messages than it saves in memory.
SMALLEST_SPLIT = 4096


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    slices: int = 0,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with axes slices, data, fsdp and tensor over all devices.

    Args:
      data, fsdp, tensor: sizes; one of them may be -1 and takes what the others leave.
      slices: groups of devices that a slower network joins; 0 for as many as the devices say.
      devices: those to use; all by default.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    found = count_slices(devices)
    if slices < 0 or (slices and (slices % found or len(devices) % slices)):
        raise InputError(f"mesh.slices={slices}: the {len(devices)} devices lie in {found}; give 0 "
                         "for that, or a multiple of it that divides them")
    slices = slices or found
    sizes, within = {"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices) // slices
    shown = "x".join(map(str, sizes.values()))
    if list(sizes.values()).count(-1) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
        raise InputError(f"mesh={shown} (data x fsdp x tensor): each axis is at least 1, and at "
                         "most one may be -1, for what the others leave")
    given = math.prod(n for n in sizes.values() if n != -1)
    sizes = {name: within // given if n == -1 else n for name, n in sizes.items()}
    if math.prod(sizes.values()) != within:
        each = f" of each of {slices} slices" if slices > 1 else ""
        raise InputError(f"mesh={shown} (data x fsdp x tensor): it must hold all "
                         f"{within} devices{each}, one axis may be -1")
    ordered = sorted(devices, key=lambda d: (_slice_of(d), d.process_index, d.id))
    groups = [
        mesh_utils.create_device_mesh(
            tuple(sizes.values()),
            ordered[start : start + within],
            allow_split_physical_axes=True,
        )
        for start in range(0, len(ordered), within)
    ]
    return Mesh(np.stack(groups), ("slices", *sizes), axis_types=(AxisType.Auto,) * 4)


def count_slices(devices: Sequence[jax.Device]) -> int:
    """In how many slices of TPUs, or nodes of GPUs, devices lie, whatever a mesh says."""
    return len(set(map(_slice_of, devices)))


def _slice_of(device: jax.Device) -> int:
    """Which slice of TPUs, or node of GPUs, a device is on; 0 where the platform does not say."""
    return getattr(device, "slice_index", None) or 0


def local_mesh(most: int | None = None) -> Mesh:
    """The devices of this process along "data", at most so many."""
    return make_mesh(devices=jax.local_devices()[:most])


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over slices, data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_divisor(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrained(x: jax.Array, axis: int = 0) -> jax.Array:
    """x with an axis split as a batch is, under a mesh in context that has the axes for it."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names) or x.shape[axis] % batch_divisor(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(None,) * axis, BATCH_AXES))


def by_device(function: Callable[..., Any], on: Mesh) -> Callable[..., Any]:
    """The function (whole, *parts) -> parts over a mesh, compiled.

    Each device runs one and the same program on an equal share of the leading axis of the parts,
    with `whole` replicated. Other than where the compiler splits one large program, the bits of a
    result depend on the size of the share, and not on the number of devices.
    """
    split = PartitionSpec(on.axis_names)
    mapped = jax.shard_map(
        lambda whole, parts: function(whole, *parts),
        mesh=on,
        in_specs=(PartitionSpec(), split),
        out_specs=split,
        check_vma=False,
    )
    return jax.jit(lambda whole, *parts: mapped(whole, parts))


def on_this_host(tree: Any, on: Mesh) -> Any:
    """A tree of arrays, whole on every device of a mesh of this process, wherever they lie now.

    All processes that hold a part of it must call this.
    """
    spread = [leaf for leaf in jax.tree.leaves(tree)
              if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable]
    if spread:
        everywhere = replicated(spread[0].sharding.mesh)
        tree = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
        tree = jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
    return jax.device_put(tree, replicated(on))


def parameter_shardings(mesh: Mesh, tree: Any) -> Any:
    """A sharding for each leaf of a tree of parameters (arrays or shapes)."""
    return _shardings(mesh, tree, ("fsdp",))


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """A sharding for each leaf of what has the shape of parameters: moments and averages."""
    return _shardings(mesh, tree, STATE_AXES)


def _shardings(mesh: Mesh, tree: Any, axes: tuple[str, ...]) -> Any:
    def choose(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition(name, leaf.shape, dict(mesh.shape), axes))

    return jax.tree_util.tree_map_with_path(choose, tree)


def partition(
    name: str, shape: tuple[int, ...], sizes: dict[str, int], axes: tuple[str, ...]
) -> PartitionSpec:
    """How one leaf is split.

    Args:
      name: its path, as "blocks/mlp/in/kernel".
      shape: its shape.
      sizes: the mesh's axes and their sizes.
      axes: the axes to spread it over besides "tensor", together on one dimension: the largest
        that they divide, or, if they divide none, that the first of them divides.
    """
    if np.prod(shape, dtype=int) < SMALLEST_SPLIT:
        return PartitionSpec()
    spec: list[Any] = [None] * len(shape)
    for pattern, dimension in TENSOR_RULES:
        if re.search(pattern, name) and shape[dimension] % sizes["tensor"] == 0:
            spec[dimension] = "tensor"
    first = 1 if STACKED.search(name) else 0
    free = [i for i in range(first, len(shape)) if spec[i] is None]
    for group in (axes, axes[:1]):
        parts = math.prod(sizes[axis] for axis in group)
        fitting = [i for i in free if shape[i] % parts == 0]
        if fitting and parts > 1:
            spec[max(fitting, key=lambda i: shape[i])] = group
            break
    return PartitionSpec(*spec)
