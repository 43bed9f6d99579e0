"""Adafactor: second moments of rows and columns in place of those of all values."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
import optax

from dmf.errors import check_between, check_valid
from dmf.runtime.sharding import STACKED
from dmf.training.muon import axes_of_matrix
from dmf.training.optimizer import Optimizer, check_decay_rates, check_weight_decay
from dmf.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor of Optax (arXiv:1804.04235), for each matrix of each block by itself.

    The second moments of a matrix are the means of its rows and of its columns, in memory of n + m
    in place of n m. The kernels of the blocks are divided into matrices as by Muon.

    Attributes:
      decay_rate: exponent c of the decay rate 1 - step^-c of the second moments, in (0, 1].
      min_dim_size_to_factor: least number of rows and of columns of a matrix whose second moments
        are factored, >= 2; those of others are stored for each value.
      clipping_threshold: largest root mean square of the update of a matrix, before the learning
        rate; positive.
      momentum: decay rate of a moving average of the updates, in [0, 1); 0 for none, and no memory.
      multiply_by_parameter_scale: whether the update of a matrix is multiplied by the root mean
        square of its parameters, at least 1e-3; the learning rate is then relative to it.
      eps: term added to squared gradients, from 1e-35 to 1; where gradients are 0 but for rounding,
        as of the bias of keys, a step has full size unless eps exceeds their square.
      weight_decay: decoupled weight decay, multiplied by the learning rate; 0 for none.
    """

    decay_rate: float = 0.8
    min_dim_size_to_factor: int = 128
    clipping_threshold: float = 1.0
    momentum: float = 0.0
    multiply_by_parameter_scale: bool = False
    eps: float = 1e-30
    weight_decay: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_valid(self, 0 < self.decay_rate <= 1, "decay_rate", "give an exponent in (0, 1]")
        check_between(self, 2, 2**24, "min_dim_size_to_factor")
        check_between(self, 1e-6, 1e6, "clipping_threshold")
        check_decay_rates(self, "momentum")
        check_between(self, 1e-35, 1.0, "eps")
        check_weight_decay(self)

    def update_rule(self) -> optax.GradientTransformation:
        of_matrix = [
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate, epsilon=self.eps,
                min_dim_size_to_factor=self.min_dim_size_to_factor,
            ),
            optax.clip_by_block_rms(self.clipping_threshold),
        ]
        if self.multiply_by_parameter_scale:
            of_matrix.append(optax.scale_by_param_block_rms())
        return optax.chain(
            by_matrix(optax.chain(*of_matrix)),
            optax.ema(self.momentum, debias=False) if self.momentum else optax.identity(),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(self.rate),
        )


def by_matrix(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation of arrays, applied to each matrix of a tree of parameters by itself.

    Args:
      transform: of one array; nothing in it may depend on other arrays.

    Returns:
      A transformation of trees. Its state is that of `transform` in place of each parameter, with a
      leading axis of the matrices in it.
    """

    def init(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.vmap(transform.init)(_as_matrices(path, leaf)[0]), params
        )

    def update(updates: Params, state: Params, params: Params) -> tuple[Params, Params]:
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        changed, states = [], []
        for (path, leaf), old, parameter in zip(
            leaves, tree.flatten_up_to(state), tree.flatten_up_to(params), strict=True
        ):
            matrices, back = _as_matrices(path, leaf)
            new, new_state = jax.vmap(transform.update)(
                matrices, old, _as_matrices(path, parameter)[0]
            )
            changed.append(back(new))
            states.append(new_state)
        return tree.unflatten(changed), tree.unflatten(states)

    return optax.GradientTransformation(init, update)


def _as_matrices(
    path: tuple[object, ...], leaf: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """A parameter as a stack of matrices [n, inputs, outputs], and the way back; as a stack of
    other arrays [n, ...], one of each block, if it is none."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes, shape = axes_of_matrix(name, "all"), leaf.shape
    if axes is None:
        return leaf if STACKED.search(name) else leaf[None], lambda stack: stack.reshape(shape)
    inputs, outputs = ([axis + leaf.ndim for axis in part] for part in axes)
    others = [axis for axis in range(leaf.ndim) if axis not in inputs + outputs]
    order = (*others, *inputs, *outputs)
    moved = leaf.transpose(order)
    sizes = [math.prod(shape[axis] for axis in part) for part in (inputs, outputs)]
    return moved.reshape(-1, *sizes), lambda stack: stack.reshape(moved.shape).transpose(
        np.argsort(order)
    )
