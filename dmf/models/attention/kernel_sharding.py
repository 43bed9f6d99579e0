"""The device that a kernel is traced for, and its sharding over a mesh.

Both come from the mesh in context (`with jax.set_mesh(mesh):` around the call, or around `lower`),
which `jax.jit` uses to tell programs apart. So a program can be compiled on a CPU for a TPU that is
not there: its mesh, from `jax.experimental.topologies`, names the device. Without a mesh in context
the device is JAX's default device.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dmf.errors import InputError
from dmf.runtime.sharding import BATCH_AXES

# Compute capabilities of generations of NVIDIA GPUs.
AMPERE, HOPPER = 8.0, 9.0


def target_platform() -> str:
    """The platform that is being traced for: "cpu", "gpu" or "tpu"."""
    return _target().platform


def has_cudnn_attention() -> bool:
    """Whether the target is an NVIDIA GPU with cuDNN's flash attention (Ampere or newer)."""
    return _target().device_kind.startswith("NVIDIA") and compute_capability() >= AMPERE


def compute_capability() -> float:
    """The compute capability of the target if it is an NVIDIA GPU, for example 8.6; else Ampere's.

    A GPU of a topology that is not the local GPU is known by its name: one of the Hopper generation
    (H100, H200, GH200) has 9.0, and any other counts as Ampere, 8.0.
    """
    target, local = _target(), _default_device()
    if not target.device_kind.startswith("NVIDIA"):
        return AMPERE
    if target.device_kind == local.device_kind:
        return float(local.compute_capability)
    return HOPPER if re.search(r"\bG?H\d", target.device_kind) else AMPERE


def _target() -> Any:
    """The device that is being traced for: its `platform` and `device_kind`."""
    return jax.sharding.get_abstract_mesh().abstract_device or _default_device()


def _default_device() -> jax.Device:
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


def can_shard_kernels() -> bool:
    """Whether the sharding of a kernel is determined: by a mesh in context, or by there being one
    device."""
    return not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1


def head_shards() -> int:
    """Number of parts that the heads of a kernel are split into."""
    return _automatic_axes().get("tensor", 1)


def _automatic_axes() -> dict[str, int]:
    """The sizes of the axes of the mesh in context that no `jax.shard_map` around has split."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def shard_kernel(
    kernel: Callable[..., Any], batch: int, heads: int, head_axis: int = 2
) -> Callable[..., Any]:
    """A kernel over the mesh in context, each device with its own samples and heads.

    The compiler can partition a large program over devices, but not a kernel in it. Samples are
    sharded over the mesh axes "data" and "fsdp" if these divide the batch, and replicated if not;
    heads are sharded over "tensor". Axes of a `jax.shard_map` around are left out; where there is
    no other axis, and without a mesh in context, the kernel is returned as it is.

    Args:
      kernel: a function of arrays with the batch on axis 0.
      batch: number of samples of the arrays.
      heads: number of heads of the arrays.
      head_axis: the axis of the heads.

    Raises:
      InputError: the mesh axis "tensor" does not divide the heads.
    """
    axes = _automatic_axes()
    if not axes or jax.sharding.get_abstract_mesh().size == 1:
        return kernel
    if heads % head_shards():
        raise InputError(
            "mesh.tensor", head_shards(),
            f"it must divide model.heads={heads}, or choose model.attention=xla",
        )
    batch_axes = tuple(axis for axis in BATCH_AXES if axis in axes)
    if batch % math.prod(axes[axis] for axis in batch_axes):
        batch_axes = ()
    head_axes = ("tensor",) if "tensor" in axes else ()
    spec = PartitionSpec(batch_axes or None, *[None] * (head_axis - 1), *head_axes)
    # Kernels do not declare how their outputs vary over the mesh, which check_vma would require.
    return jax.shard_map(
        kernel, axis_names=set(axes), in_specs=spec, out_specs=spec, check_vma=False
    )
