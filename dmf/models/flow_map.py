"""The flow map of a network with its parameters, as users call it from Python."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import InputError
from dmf.types import ClassLabels, Condition, GuidedCondition


class NetworkFlowMap(flax.struct.PyTreeNode):
    """The flow map u(x_t, t, r, y) of a network with its parameters.

    It is a pytree, to be passed as an argument to jitted functions: a function that closes over it
    would have the parameters compiled in.

    >>> import types
    >>> network = types.SimpleNamespace(
    ...     num_classes=10, condition=lambda y: ClassLabels(y, 10),
    ...     apply=lambda params, x_t, t, r, y: params * x_t * (t - r)[:, None, None, None])
    >>> flow_map = NetworkFlowMap(params=2.0, network=network)
    >>> flow_map(jnp.ones((2, 1, 1, 1)), 1.0, 0.5, [3, 7]).ravel().tolist()
    [1.0, 1.0]
    >>> flow_map(jnp.ones((1, 1, 1, 1)), 1.0, 0.5, [37])
    Traceback (most recent call last):
    dmf.errors.InputError: y=37: the 10 classes have the labels 0 to 9, and 10 is the null label

    Attributes:
      params: the parameters of the network.
      network: the network, see `dmf.types.Network`.
    """

    # JAX rebuilds pytrees with leaves that are no arrays, so that the types are `Any`.
    params: Any
    network: Any = flax.struct.field(pytree_node=False)

    def __call__(self, x_t: jax.Array, t: Any, r: Any, y: Any) -> jax.Array:
        """The average velocity from t to r, so that x_r = x_t + (r - t) u.

        Args:
          x_t: [b, h, w, c] samples at time t: pixels in about [-1, 1] or scaled latents at t = 0,
            standard normal noise at t = 1.
          t: times in [0, 1]: a number, or [b].
          r: target times, 0 <= r <= t: a number, or [b].
          y: class labels, b whole numbers in [0, num_classes], where num_classes is the null label;
            or a `dmf.Condition`.

        Returns:
          [b, h, w, c] in the dtype of x_t.

        Raises:
          InputError: x_t, t, r or y has another shape, or there is no such label. Labels are not
            looked at inside `jax.jit`, which knows no values.
        """
        t, r = _times("t", t, x_t), _times("r", r, x_t)
        y = jnp.asarray(y) if isinstance(y, int | list | range) else y
        if getattr(y, "shape", None) == ():
            raise InputError("y", y, "give one label for each sample, as [3, 7]")
        y = self.network.condition(y)
        _check_condition(y, x_t.shape[0])
        return self.network.apply(self.params, x_t, t, r, y)


def _times(name: str, times: Any, x_t: jax.Array) -> jax.Array:
    """Times [b] of a number or of [b] numbers."""
    times = jnp.asarray(times, jnp.result_type(float))
    if times.shape not in ((), x_t.shape[:1]):
        raise InputError(name, remedy=f"it has shape {times.shape}, and x_t {x_t.shape}; give a "
                         f"number, or one time for each sample [{x_t.shape[0]}]")
    return jnp.broadcast_to(times, x_t.shape[:1])


def _check_condition(y: Condition, count: Any) -> None:
    """Raises InputError where a condition is not of so many samples, or a label of no class."""
    inner = y.condition if isinstance(y, GuidedCondition) else y
    if isinstance(inner, ClassLabels):
        _check_labels(inner)
    if y.count != count:
        raise InputError("y", remedy=f"it has {y.count} conditions, and x_t has {count} samples; "
                         "give one for each")


def _check_labels(y: ClassLabels) -> None:
    """Raises InputError for a label of no class, and for labels that are no [b] whole numbers."""
    if y.labels.ndim != 1 or not jnp.issubdtype(y.labels.dtype, jnp.integer):
        raise InputError("y", remedy=f"it has shape {y.labels.shape} and dtype {y.labels.dtype}; "
                         "labels are whole numbers, one for each sample")
    try:
        labels = np.asarray(y.labels)
    except (jax.errors.TracerArrayConversionError, RuntimeError):
        return  # They are traced, or other processes hold some of them.
    for label in labels[(labels < 0) | (labels > y.num_classes)][:1]:
        raise InputError("y", label, f"the {y.num_classes} classes have the labels 0 to "
                         f"{y.num_classes - 1}, and {y.num_classes} is the null label")
