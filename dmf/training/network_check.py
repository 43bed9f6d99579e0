"""Whether a network of a user's file keeps to the protocol of `dmf.types.Network`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.objectives.time_checks import is_of_package
from dmf.types import Batch


def check_network(network: Any, rows: Batch) -> None:
    """Checks the parameters of a network and its flow map, without computing anything.

    Networks of this package are not traced: their tests do that.

    Args:
      network: of `config.model`.
      rows: a batch as shapes; its y is what the dataset says of samples.

    Raises:
      InputError: the parameters are no nested dictionaries of float32 arrays, or the average
        velocity does not have the shape of x_t.
    """
    if is_of_package(network):
        return
    name, params = type(network).__name__, abstract_params(network)
    if not _is_of_dictionaries(params):
        raise InputError("model", name, "its init must return nested dictionaries of arrays, "
                         'such as {"in": {"kernel": kernel}}; no tuples, lists or other objects')
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            place = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError("model", name, f"its parameter {place} has dtype {leaf.dtype}; "
                             "parameters are float32, whatever the network computes in")
    x_t, t, y = _abstract_inputs(network, rows)
    u = jax.eval_shape(
        lambda *inputs: network.apply(*inputs[:4], network.condition(inputs[4])),
        params, x_t, t, t, y,
    )  # fmt: skip
    if getattr(u, "shape", None) != x_t.shape:
        what = f"of shape {u.shape}" if hasattr(u, "shape") else f"as a {type(u).__name__}"
        raise InputError("model", name, f"its apply returned u {what}; return the average "
                         f"velocity in the shape of x_t, {x_t.shape}")


def _abstract_inputs(network: Any, rows: Batch) -> tuple[Any, Any, Any]:
    """(x_t, t, y) of a batch as shapes, on no mesh."""
    y = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), rows.y)
    count = jax.tree.leaves(y)[0].shape[0]
    x_t = jax.ShapeDtypeStruct((count, *network.sample_shape), jnp.float32)
    return x_t, jax.ShapeDtypeStruct((count,), jnp.float32), y


def _is_of_dictionaries(params: Any) -> bool:
    """Whether a tree consists of nested dictionaries with arrays."""
    return isinstance(params, Mapping) and all(
        hasattr(part, "dtype") or _is_of_dictionaries(part) for part in params.values()
    )
