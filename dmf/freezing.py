"""Which parameters are not trained, chosen by path, and how not a bit of them changes.

A path is that of a leaf, as "patch_embedding/kernel"; the leaves of the blocks, which are stacked
by depth, count once for each block, whose number comes second, as "blocks/17/mlp/in/kernel". A
pattern is a regular expression that the whole path must match. "encoder" stands for all that
`Network.encode` depends on: what is left is the decoder-only training of Decoupled MeanFlow,
arXiv:2510.24474.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dmf.typing import Condition, Images, InputError, Network, Params, Times

ENCODER = "encoder"
_EMBEDDINGS = r"(patch|time|label|guidance)_embedding/.*"
# Paths that a message shows.
_SHOWN = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """What is frozen of a network's parameters.

    Attributes:
      mask: for each leaf a bool, [] or, for those stacked by depth, [depth], true where it is
        frozen; empty if nothing is.
      encoder: whether all that the encoder depends on is, by that name.
      patterns: that choose it, for messages.
    """

    mask: Params = dataclasses.field(default_factory=dict)
    encoder: bool = False
    patterns: tuple[str, ...] = ()

    def kept(self, old: Params, new: Params) -> Params:
        """`new`, with the frozen numbers of `old`."""
        return jax.tree.map(_kept, self.mask, old, new) if self.mask else new

    def held(self, params: Params) -> Params:
        """The same numbers, of which the frozen ones pass no gradient."""
        return self.kept(jax.lax.stop_gradient(params), params)

    def seen(self, network: Network) -> Network:
        """The same network, without the backward pass of an encoder that is frozen."""
        return _HeldEncoder(network) if self.encoder else network

    def check_given(self, given: Params) -> None:
        """Raises InputError where something frozen would stay as it is drawn at random.

        Args:
          given: the parameters that training starts from, a tree of which leaves may be missing.
        """
        known = flatten_dict(given, sep="/")
        for name, mask in flatten_dict(self.mask, sep="/").items():
            if mask.any() and name not in known:
                path = _paths(name, mask.shape)[mask][0]
                raise InputError(f"freeze={self.patterns}: {path} is frozen, but init.checkpoint "
                                 "does not have it; give one that does, or freeze fewer")

    def trained(self, params: Params) -> int:
        """How many numbers are not frozen."""
        if not self.mask:
            return sum(leaf.size for leaf in jax.tree.leaves(params))
        shares = jax.tree.map(lambda mask, leaf: leaf.size * (1 - mask.mean()), self.mask, params)
        return round(sum(jax.tree.leaves(shares)))


def _kept(mask: np.ndarray, old: jax.Array, new: jax.Array) -> jax.Array:
    """A leaf; whole where it can be, so that the compiler leaves out what nobody takes."""
    if mask.all() or not mask.any():
        return old if mask.all() else new
    return jnp.where(mask.reshape(-1, *(1,) * (new.ndim - 1)), old, new)


@Network.register
@dataclasses.dataclass(frozen=True)
class _HeldEncoder:
    """A network whose encoder passes no gradient to its parameters.

    It is registered as a `Network`, as `isinstance` may not see what `__getattr__` gives.
    """

    network: Network

    def __getattr__(self, name: str) -> Any:
        """All else is as the network has it, also its features: the block that they leave after may
        come before the end of the encoder."""
        return getattr(object.__getattribute__(self, "network"), name)

    def encode(self, params: Params, x_t: Images, t: Times, y: Condition) -> Any:
        return self.network.encode(jax.lax.stop_gradient(params), x_t, t, y)

    def apply(self, params: Params, x_t: Images, t: Times, r: Times, y: Condition) -> Images:
        hidden = self.encode(params, x_t, t, y)
        return self.network.decode(params, hidden, r, y).astype(x_t.dtype)


def frozen(patterns: Sequence[Any], network: Network) -> Frozen:
    """What some patterns freeze.

    Args:
      patterns: regular expressions, matched with `re.fullmatch`, or "encoder".
      network: of the parameters.

    Raises:
      InputError: they are one text and no sequence; one is no regular expression, or matches
        nothing, or all together everything; or the network has no encoder.
    """
    if isinstance(patterns, str):
        raise InputError(f"freeze={patterns}: a tuple of patterns is wanted; give ('{patterns}',)")
    if not patterns:
        return Frozen()
    leaves = flatten_dict(jax.eval_shape(network.init, jax.random.key(0)), sep="/")
    paths = {name: _paths(name, leaf.shape) for name, leaf in leaves.items()}
    everything = np.concatenate([each.ravel() for each in paths.values()]).tolist()
    chosen = {path for pattern in patterns for path in _matching(pattern, everything, network)}
    if len(chosen) == len(everything):
        raise InputError(f"freeze={tuple(patterns)}: all of the parameters, so that none would be "
                         "trained; freeze fewer")
    mask = {name: np.isin(each, list(chosen)) for name, each in paths.items()}
    return Frozen(
        mask=unflatten_dict(mask, sep="/"), encoder=ENCODER in patterns, patterns=tuple(patterns)
    )


def _paths(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The path of a leaf []; of one that is stacked, those of its parts [depth]."""
    top, _, rest = name.partition("/")
    if top != "blocks":
        return np.array(name)
    return np.array([f"{top}/{i}/{rest}" for i in range(shape[0])])


def _matching(pattern: Any, paths: Sequence[str], network: Network) -> list[str]:
    """The paths that one pattern freezes."""
    expression = _encoder(network) if pattern == ENCODER else pattern
    try:
        found = [path for path in paths if re.fullmatch(expression, path)]
    except (re.error, TypeError) as error:
        raise InputError(f"freeze={pattern}: it is no regular expression ({error})") from None
    if not found:
        near = difflib.get_close_matches(str(pattern), paths, _SHOWN, cutoff=0)
        raise InputError(f"freeze={pattern}: it matches no whole path; there are {len(paths)}, as "
                         f"{', '.join(near)}")
    return found


def _encoder(network: Network) -> str:
    """A pattern of all that the encoder depends on."""
    if not network.encoder_depth:
        raise InputError(f"freeze={ENCODER}: every block of this network sees r, so that it has no "
                         "encoder; set model.conditioning=decoupled and model.split_depth")
    blocks = "|".join(map(str, range(network.encoder_depth)))
    return rf"{_EMBEDDINGS}|blocks/({blocks})/.*"
