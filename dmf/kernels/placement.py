"""For which devices a kernel is traced, and how it is split over them.

Both come from the mesh in context (`with jax.set_mesh(mesh):` around the call, or around `lower`),
which is part of what `jax.jit` tells one program from another by. So a program can be compiled on
a CPU for a TPU that is not there: its mesh, from `jax.experimental.topologies`, says what it is
for. Where no mesh is in context, it is the device that JAX computes on by default.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dmf.sharding import BATCH_AXES
from dmf.typing import InputError


def platform() -> str:
    """"cpu", "gpu" or "tpu": what is traced now is for."""
    target = jax.sharding.get_abstract_mesh().abstract_device
    return target.platform if target else _default_device().platform


def has_cudnn_attention() -> bool:
    """Whether that is a GPU of NVIDIA's; an older one than Ampere counts only if it is not here."""
    target = jax.sharding.get_abstract_mesh().abstract_device or _default_device()
    capability = getattr(_default_device(), "compute_capability", "8.0")
    return target.device_kind.startswith("NVIDIA") and float(capability) >= 8


def _default_device() -> jax.Device:
    chosen = jax.config.jax_default_device
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]


def known() -> bool:
    """Whether it can be told how a kernel is to be split: by a mesh in context, or because there is
    but one device."""
    return not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1


def head_divisor() -> int:
    """Into how many parts a kernel's heads are split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.manual_axes else mesh.shape.get("tensor", 1)


def by_device(
    function: Callable[..., Any], batch: int, heads: int, axis: int = 2
) -> Callable[..., Any]:
    """The function of arrays [b, ...], each device with its own samples, and heads on that axis.

    The compiler can split a large program over devices, but not a kernel in it. Samples are split
    over the mesh's "data" and "fsdp" where they divide them, and are whole on each device where
    they do not; heads are split over "tensor". Without a mesh in context, and within another
    `jax.shard_map`, it is the function itself.

    Raises:
      InputError: "tensor" does not divide the heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return function
    if heads % head_divisor():
        raise InputError(f"mesh.tensor={head_divisor()}: it must divide model.heads={heads}, or "
                         "choose model.attention=xla")
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    if batch % math.prod(mesh.shape[axis] for axis in axes):
        axes = ()
    by_heads = ("tensor",) if "tensor" in mesh.shape else ()
    split = PartitionSpec(axes or None, *[None] * (axis - 1), *by_heads)
    # Kernels say nothing of how their outputs vary over the mesh, which the check would ask.
    return jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
