"""Parameter groups: factors of the learning rate and of the weight decay, chosen by path.

A group is (pattern, learning-rate factor, weight-decay factor); see `dmf.training.parameter_paths`
for patterns. Where several groups match a parameter their factors are multiplied, so that their
order does not matter.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from dmf.errors import InputError
from dmf.training.parameter_paths import matching_paths, paths_of_leaf
from dmf.types import Params

Group = tuple[str, float, float]
LARGEST_FACTOR = 1000.0


def check_groups(optimizer: Any) -> None:
    """Raises InputError where a group of an optimizer has factors that cannot be used, or that
    have no effect."""
    for group in optimizer.groups:
        _, rate, decay = group
        if not 0 < rate <= LARGEST_FACTOR:
            raise InputError("groups", group, "the factor of the learning rate is positive, and at "
                             f"most {LARGEST_FACTOR:g}; config.freeze keeps parameters as they are")
        if not 0 <= decay <= LARGEST_FACTOR:
            raise InputError("groups", group, "the factor of the weight decay lies from 0 to "
                             f"{LARGEST_FACTOR:g}")
        if rate == decay == 1:
            raise InputError("groups", group, "with both factors 1 it has no effect; leave it out")
        if decay != 1 and not getattr(optimizer, "weight_decay", 0.0):
            raise InputError("groups", group, "there is no weight decay that its last factor could "
                             "change; give 1 there, or set weight_decay")


def check_matches(groups: Sequence[Group], params: Params, frozen: Params) -> None:
    """Checks that each group changes the update of a parameter.

    Args:
      groups: the groups of an optimizer.
      params: the parameters of the network, arrays or shapes.
      frozen: `FreezeMask.mask`; {} if nothing is frozen.

    Raises:
      InputError: the pattern of a group is no regular expression, or matches no parameter that is
        trained.
    """
    masks, trained = flatten_dict(frozen, sep="/"), []
    for name, leaf in flatten_dict(params, sep="/").items():
        paths = paths_of_leaf(name, leaf.shape)
        trained += paths[~masks.get(name, np.zeros(paths.shape, bool))].tolist()
    for pattern, _, _ in groups:
        matching_paths("groups", pattern, trained)


def group_factors(groups: Sequence[Group], params: Params) -> Params:
    """The factors of each parameter.

    >>> groups = ((".*/bias", 1.0, 0.0), ("blocks/0/.*", 0.5, 1.0))
    >>> factors = group_factors(groups, {"blocks": {"bias": jnp.ones((2, 3))}})
    >>> factors["blocks"]["bias"][..., 0].tolist()
    [[0.5, 1.0], [0.0, 0.0]]

    Args:
      groups: the groups of an optimizer.
      params: a tree of parameters, or of their shapes.

    Returns:
      A tree like the parameters: of each leaf the factors of the learning rate and of the weight
      decay, float32 [2, depth, 1, ...] for leaves that are stacked by depth, and [2] for others.

    Raises:
      InputError: the pattern of a group is no regular expression, or matches nothing.
    """
    leaves = flatten_dict(params, sep="/")
    paths = {name: paths_of_leaf(name, leaf.shape) for name, leaf in leaves.items()}
    all_paths = [path for leaf_paths in paths.values() for path in leaf_paths.ravel().tolist()]
    factors = {name: np.ones((2, *leaf_paths.shape)) for name, leaf_paths in paths.items()}
    for pattern, *group in groups:
        matches = matching_paths("groups", pattern, all_paths)
        for name, leaf_paths in paths.items():
            chosen = np.isin(leaf_paths, matches)
            factors[name] *= np.stack([np.where(chosen, factor, 1.0) for factor in group])
    return unflatten_dict({
        name: np.float32(factor).reshape(factor.shape + (1,) * (leaves[name].ndim - 1)
                                         if factor.ndim > 1 else factor.shape)
        for name, factor in factors.items()
    }, sep="/")  # fmt: skip


def by_groups(optimizer: Any) -> optax.GradientTransformation:
    """From the updates of an optimizer without weight decay to those of its groups.

    Args:
      optimizer: a `dmf.training.optimizer.Optimizer`: its `groups`, its learning rate at a step
        `rate`, and its `weight_decay`.
    """
    weight_decay = getattr(optimizer, "weight_decay", 0.0)

    def init(params: Params) -> optax.ScaleByScheduleState:
        group_factors(optimizer.groups, params)
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Params, state: optax.ScaleByScheduleState, params: Params
    ) -> tuple[Params, optax.ScaleByScheduleState]:
        decay = weight_decay * optimizer.rate(state.count)
        factors = group_factors(optimizer.groups, params)
        changed = jax.tree.map(
            lambda u, p, factor: factor[0] * (u - decay * factor[1] * p), updates, params, factors
        )
        return changed, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
