"""Freezing: parameters of the trained network that do not change, chosen by their paths.

A pattern is a regular expression for whole paths, see `dmf.training.parameter_paths`.
The pattern "encoder" stands for all parameters that `Network.encode` depends on; freezing them is
the decoder-only training of Decoupled MeanFlow (arXiv:2510.24474).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.training.parameter_paths import matching_paths, paths_of_leaf
from dmf.types import Condition, Flops, Images, Network, Params, PerSample, PRNGKey, Times

ENCODER = "encoder"
# Of a network with in-context conditioning `encode` embeds the interval 0.
_EMBEDDINGS = (r"((patch|time|label|guidance|interval)_embedding|patch_reduction|prefix)/.*"
               "|position_embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeMask:
    """The mask of frozen parameters, and what training does with it.

    Attributes:
      mask: tree like the parameters, true where they are frozen: for each leaf a bool array [], or
        [depth] for leaves that are stacked by depth; {} if nothing is frozen. Patterns and network
        determine it, so that masks of one network are compared by their patterns.
      encoder: whether the whole encoder is frozen, by the pattern "encoder".
      patterns: the patterns of the config, for error messages.
    """

    mask: Params = dataclasses.field(default_factory=dict, compare=False)
    encoder: bool = False
    patterns: tuple[str, ...] = ()

    def select(self, frozen: Params, trained: Params) -> Params:
        """Takes frozen parameters from one tree and trained parameters from another.

        Args:
          frozen: tree that the frozen parameters are taken from, bit for bit.
          trained: tree that all other parameters are taken from.
        """
        return jax.tree.map(_select_leaf, self.mask, frozen, trained) if self.mask else trained

    def stop_gradient(self, params: Params) -> Params:
        """The same parameters, without a gradient with respect to the frozen ones."""
        return self.select(jax.lax.stop_gradient(params), params)

    def stop_encoder_gradient(self, network: Network) -> Network:
        """The same network, without the backward pass of its encoder if the encoder is frozen."""
        return FrozenEncoder(network) if self.encoder else network

    def check_pretrained(self, pretrained: Params) -> None:
        """Checks that every frozen parameter is pretrained.

        Args:
          pretrained: the parameters that training starts from; leaves may be missing.

        Raises:
          InputError: a frozen parameter is missing, and would stay at its random initial value.
        """
        names = flatten_dict(pretrained, sep="/")
        for name, mask in flatten_dict(self.mask, sep="/").items():
            if mask.any() and name not in names:
                path = paths_of_leaf(name, mask.shape)[mask][0]
                raise InputError("freeze", self.patterns, f"{path} is frozen, but init.checkpoint "
                                 "does not have it; give a checkpoint that has it, or freeze fewer "
                                 "parameters")

    def count_trained(self, params: Params) -> int:
        """The number of scalar parameters that are not frozen."""
        if not self.mask:
            return sum(leaf.size for leaf in jax.tree.leaves(params))
        counts = jax.tree.map(lambda mask, leaf: leaf.size * (1 - mask.mean()), self.mask, params)
        return round(sum(jax.tree.leaves(counts)))


def _select_leaf(mask: np.ndarray, frozen: jax.Array, trained: jax.Array) -> jax.Array:
    """A leaf of `FreezeMask.select`; it depends on one tree alone where the mask is constant, so
    that the compiler drops the computation of the other one."""
    if mask.all():
        return frozen
    if not mask.any():
        return trained
    return jnp.where(mask.reshape(-1, *(1,) * (trained.ndim - 1)), frozen, trained)


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """A network whose encoder is frozen: `encode` has no gradient with respect to its parameters.

    `FreezeMask.stop_gradient` alone would not remove the backward pass of the encoder, because its
    blocks are stacked in one array with those of the decoder. All other methods are those of the
    network. `apply_with_features` has its gradient: the features may leave the network before the
    encoder ends.

    Attributes:
      network: the network that is trained.
    """

    network: Network

    def encode(self, params: Params, x_t: Images, t: Times, y: Any) -> Any:
        return self.network.encode(jax.lax.stop_gradient(params), x_t, t, y)

    def apply(self, params: Params, x_t: Images, t: Times, r: Times, y: Any) -> Images:
        return self.decode(params, self.encode(params, x_t, t, y), r, y).astype(x_t.dtype)

    def decode(self, params: Params, hidden: Any, r: Times, y: Any) -> Images:
        return self.network.decode(params, hidden, r, y)

    def apply_heads(
        self, params: Params, x_t: Images, t: Times, r: Times, y: Any
    ) -> tuple[Images, Images]:
        u, v = self.decode_heads(params, self.encode(params, x_t, t, y), r, y)
        return u.astype(x_t.dtype), v.astype(x_t.dtype)

    def decode_heads(
        self, params: Params, hidden: Any, r: Times, y: Any
    ) -> tuple[Images, Images]:
        return self.network.decode_heads(params, hidden, r, y)

    def velocity(self, params: Params, x_t: Images, t: Times, y: Any) -> Images:
        if self.velocity_head:
            return self.apply_heads(params, x_t, t, t, y)[1]
        return self.apply(params, x_t, t, t, y)

    def apply_with_features(
        self, params: Params, x_t: Images, t: Times, r: Times, y: Any
    ) -> tuple[Images, Any]:
        return self.network.apply_with_features(params, x_t, t, r, y)

    def log_variance(self, params: Params, t: Times, r: Times) -> PerSample:
        return self.network.log_variance(params, t, r)

    def init(self, key: PRNGKey) -> Params:
        return self.network.init(key)

    def cast(self, params: Params) -> Params:
        return self.network.cast(params)

    def condition(self, y: Any) -> Condition:
        return self.network.condition(y)

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.network.sample_shape

    @property
    def guidance_input(self) -> bool:
        return self.network.guidance_input

    @property
    def velocity_head(self) -> bool:
        return self.network.velocity_head

    @property
    def prediction(self) -> str:
        return self.network.prediction

    @property
    def min_time(self) -> float:
        return self.network.min_time

    @property
    def encoder_depth(self) -> int:
        return self.network.encoder_depth

    @property
    def full_remat(self) -> bool:
        return self.network.full_remat

    @property
    def flops(self) -> Flops:
        return self.network.flops


def freeze_mask(patterns: Sequence[Any], network: Network) -> FreezeMask:
    """The mask of the parameters that match any of some patterns.

    Args:
      patterns: regular expressions, matched with `re.fullmatch`, or "encoder".
      network: the network that is trained.

    Raises:
      InputError: the patterns are one string instead of a sequence; a pattern is no regular
        expression, or matches nothing; all parameters match; or the network has no encoder.
    """
    if isinstance(patterns, str):
        raise InputError("freeze", patterns, f"give a tuple of patterns: ('{patterns}',)")
    if not patterns:
        return FreezeMask()
    leaves = flatten_dict(abstract_params(network), sep="/")
    paths = {name: paths_of_leaf(name, leaf.shape) for name, leaf in leaves.items()}
    all_paths = np.concatenate([leaf_paths.ravel() for leaf_paths in paths.values()]).tolist()
    expressions = [_encoder_pattern(network) if pattern == ENCODER else pattern
                   for pattern in patterns]
    frozen = {path for expression in expressions
              for path in matching_paths("freeze", expression, all_paths)}
    if len(frozen) == len(all_paths):
        raise InputError("freeze", tuple(patterns), "all parameters match, so that none would be "
                         "trained; freeze fewer")
    mask = {name: np.isin(leaf_paths, list(frozen)) for name, leaf_paths in paths.items()}
    return FreezeMask(
        mask=unflatten_dict(mask, sep="/"), encoder=ENCODER in patterns, patterns=tuple(patterns)
    )


def _encoder_pattern(network: Network) -> str:
    """The pattern that matches all parameters that `network.encode` depends on."""
    if not network.encoder_depth:
        raise InputError("freeze", ENCODER, "every block of this network depends on r, so that it "
                         "has no encoder; set model.conditioning=decoupled and model.split_depth")
    blocks = "|".join(map(str, range(network.encoder_depth)))
    return rf"{_EMBEDDINGS}|blocks/({blocks})/.*"
