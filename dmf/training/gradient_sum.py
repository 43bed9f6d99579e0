"""The sum of gradients over devices: once a step, after the last term of the last microbatch.

Along the mesh axes "slices" and "data" the parameters are not split. So each shard of a batch along
these axes collects a gradient of its own, and nothing is sent along them until the gradients of all
shards are summed. Along "fsdp" and "tensor" the compiler decides what is sent, and when.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmf.runtime.sharding import REPLICA_AXES, state_shardings
from dmf.types import Metrics, Params


class Parts(NamedTuple):
    """The parts of a leaf that the devices of some mesh axes receive of its sum.

    Attributes:
      dimension: the dimension that is divided, first in outer parts by other axes, then by `axes`.
      outer: number of outer parts.
      axes: the axes that divide each of them; () where every device receives the whole leaf.
      others: the partition over other axes, of the leaf with its outer parts as a dimension.
    """

    dimension: int
    outer: int
    axes: tuple[str, ...]
    others: PartitionSpec

    @property
    def spec(self) -> PartitionSpec:
        """The partition of the sum over `axes`."""
        return PartitionSpec(*[None] * (self.dimension + 1), self.axes) if self.axes else (
            PartitionSpec()
        )

    def sum(self, leaf: jax.Array, axes: tuple[str, ...], others: set[str]) -> jax.Array:
        """This device's part of the sum of a leaf over `axes`, inside `jax.shard_map` over them."""
        if self.axes:
            before, after = leaf.shape[: self.dimension], leaf.shape[self.dimension + 1 :]
            leaf = leaf.reshape(*before, self.outer, -1, *after)

        def local(leaf: jax.Array) -> jax.Array:
            if self.axes:
                leaf = jax.lax.psum_scatter(
                    leaf, self.axes, scatter_dimension=self.dimension + 1, tiled=True
                )
            rest = tuple(axis for axis in axes if axis not in self.axes)
            return jax.lax.psum(leaf, rest) if rest else leaf

        # The compiler would gather the leaf along the other axes before it sums along these.
        return jax.shard_map(local, axis_names=others, in_specs=self.others, out_specs=self.others,
                             check_vma=False)(leaf)  # fmt: skip


def mean_over_shards(
    mesh: Mesh,
    gradient_of: Callable[..., tuple[Params, Metrics]],
    params: Params,
    rows: tuple[Any, ...],
    frozen_params: Any,
) -> tuple[Params, Metrics]:
    """The mean gradient and the mean metrics of a batch, inside jit.

    Args:
      mesh: the devices; its abstract mesh is in context.
      gradient_of: (params, *rows, frozen_params) -> the mean gradient of some rows and their mean
        metrics. The gradients are summed in the dtypes that it returns.
      params: parameters to differentiate by.
      rows: pytrees of arrays [b, ...], whose rows do not depend on each other.
      frozen_params: other parameters that `gradient_of` needs.

    Returns:
      The gradient, in the dtypes of the parameters; the metrics. Along slices and data a leaf is
      split as the optimizer state, or whole where that has fewer parts than devices.
    """
    axes = tuple(axis for axis in REPLICA_AXES if mesh.shape[axis] > 1)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    gradient, metrics = (
        _sum_over_shards(mesh, axes, gradient_of, params, rows, frozen_params) if axes
        else gradient_of(params, *rows, frozen_params)
    )  # fmt: skip
    return jax.tree.map(
        lambda leaf, param: leaf.reshape(param.shape).astype(param.dtype) / shards, gradient, params
    ), metrics


def _sum_over_shards(
    mesh: Mesh,
    axes: tuple[str, ...],
    gradient_of: Callable[..., tuple[Params, Metrics]],
    params: Params,
    rows: tuple[Any, ...],
    frozen_params: Any,
) -> tuple[Params, Metrics]:
    """The sum of the shards' gradients, each leaf in its `Parts`, and the mean metrics."""
    others = set(mesh.axis_names) - set(axes)
    shardings, tree = jax.tree.flatten(state_shardings(mesh, params))
    parts = [_parts(mesh, sharding, axes) for sharding in shardings]

    def shard(params: Params, rows: Any, frozen_params: Any) -> tuple[list[jax.Array], Metrics]:
        gradient, metrics = gradient_of(params, *rows, frozen_params)
        pairs = zip(parts, jax.tree.leaves(gradient), strict=True)
        return [part.sum(leaf, axes, others) for part, leaf in pairs], jax.lax.pmean(metrics, axes)

    whole, split = PartitionSpec(), PartitionSpec(axes)
    sums, metrics = jax.shard_map(
        shard, axis_names=set(axes), in_specs=(whole, split, whole),
        out_specs=([part.spec for part in parts], whole), check_vma=False,
    )(params, rows, frozen_params)  # fmt: skip
    return jax.tree.unflatten(tree, sums), metrics


def _parts(mesh: Mesh, sharding: NamedSharding, axes: tuple[str, ...]) -> Parts:
    """The parts that a sharding gives to the devices of some axes; where several of them hold
    copies of a part, the whole."""
    if sharding.mesh.shape != mesh.shape:
        return Parts(0, 1, (), PartitionSpec())
    named = [(names,) if isinstance(names, str) else names or () for names in sharding.spec]
    others = [tuple(name for name in names if name not in axes) or None for names in named]
    for dimension, names in enumerate(named):
        inner = tuple(name for name in names if name in axes)
        if inner:
            outer = math.prod(mesh.shape[name] for name in others[dimension] or ())
            others.insert(dimension + 1, None)
            return Parts(dimension, outer, inner, PartitionSpec(*others))
    return Parts(0, 1, (), PartitionSpec(*others))
