"""The class labels that images are generated for. A label depends on seed and index alone."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

LABEL_SAMPLING = ("random", "balanced")

# Folded into the key of a sample for its label; its noise is drawn from the same seed and index.
_LABEL_KEY = 2**31 - 2


def class_labels(
    indices: Int[np.ndarray, "n"], num_classes: int, label_sampling: str = "balanced", seed: int = 0
) -> Int[np.ndarray, "n"]:
    """The class labels of some samples.

    >>> class_labels(np.arange(7), num_classes=3).tolist()
    [0, 1, 2, 0, 1, 2, 0]

    Args:
      indices: [n] indices of the samples.
      num_classes: number of classes; 0 for a network without labels, whose only label is 0.
      label_sampling: "balanced" takes the classes in turn, "random" draws each label uniformly.
      seed: random seed of drawn labels.

    Returns:
      [n] int32 labels in [0, num_classes).
    """
    if not num_classes or label_sampling == "balanced":
        return (indices % max(num_classes, 1)).astype(np.int32)
    return np.asarray(_draw(jnp.int32(seed), jnp.asarray(indices, jnp.int32), num_classes))


def label_captions(
    labels: Int[np.ndarray, "n"], num_classes: int, names: Sequence[str] = ()
) -> list[str]:
    """How a grid of images calls their class labels; empty strings for a network without labels.

    >>> label_captions(np.array([0, 2, 3]), num_classes=3)
    ['0', '2', 'null']
    >>> label_captions(np.array([0, 2, 3]), num_classes=3, names=("cat", "cow", "dog"))
    ['cat', 'dog', 'null']

    Args:
      labels: [n] labels in [0, num_classes], the last of which is the null label.
      num_classes: number of classes; 0 for a network without labels.
      names: name of each class; empty to call them by their numbers.
    """
    def caption(label: int) -> str:
        if not num_classes:
            return ""
        if label == num_classes:
            return "null"
        return names[label] if names else str(label)

    return [caption(label) for label in labels.tolist()]


@jax.jit(static_argnums=2)
def _draw(seed: jax.Array, indices: jax.Array, num_classes: int) -> jax.Array:
    """[n] int32 labels, each drawn uniformly from a key of its own."""

    def draw(index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), _LABEL_KEY)
        return jax.random.randint(key, (), 0, num_classes, jnp.int32)

    return jax.vmap(draw)(indices)
