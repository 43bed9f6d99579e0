"""The parameters of a network as shapes."""

from typing import Any

import jax

from dmf.runtime.memoize import memoized
from dmf.types import Params


def abstract_params(network: Any) -> Params:
    """The tree of a network's parameters as `jax.ShapeDtypeStruct`; nothing is computed.

    >>> from dmf.models import AutoencoderKL
    >>> abstract_params(AutoencoderKL())["encoder"]["moments"]["bias"].shape
    (8,)

    Args:
      network: has `init(key)`; equal networks are traced once.
    """
    return jax.tree.map(lambda leaf: leaf, _traced(network))


@memoized
def _traced(network: Any) -> Params:
    return jax.eval_shape(network.init, jax.random.key(0))
