"""Protocols of evaluation by name: what is measured of which images.

Published numbers of one model differ by how images are rounded to 8 bits, how labels are drawn and
which features are compared. The input of each network is the same in all of them:
`dmf.features` has it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dmf.images import ROUNDINGS
from dmf.typing import InputError

# Frechet distances, by the features they are between.
DISTANCES = {"fid": "pool3", "sfid": "spatial", "fd_dinov2": "dinov2", "fd_pixels": "pixels"}
# What else is measured, and of which features; some needs the features of every image.
SCORES = {
    "inception_score": "probabilities",
    "precision": "pool3",
    "recall": "pool3",
    "label_agreement": "pixels",
}
KEEPING = ("precision", "recall", "label_agreement")
HIGHER_IS_BETTER = tuple(SCORES)
METRICS = DISTANCES | SCORES
LABELS = ("random", "balanced")
# Apart from the noise of a sample, which is drawn from the same seed and index.
_LABEL = 2**31 - 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured.

    Attributes:
      metrics: names of `METRICS`, the most important first.
      rounding: how images become 8 bits, see `dmf.images.ROUNDINGS`.
      labels: of samples: "random", each drawn by itself, or "balanced", all classes in turn.
    """

    metrics: tuple[str, ...]
    rounding: str
    labels: str

    def __post_init__(self):
        for name in self.metrics:
            if name not in METRICS:
                raise InputError(f"evaluation.metrics={name}: choose of {', '.join(METRICS)}")
        for field, choices in (("rounding", ROUNDINGS), ("labels", LABELS)):
            if getattr(self, field) not in choices:
                raise InputError(f"evaluation.{field}={getattr(self, field)}: choose one of "
                                 f"{', '.join(choices)}")

    @property
    def features(self) -> tuple[str, ...]:
        """Kinds of features that the metrics are of."""
        return tuple(sorted({METRICS[name] for name in self.metrics}))

    @property
    def kept(self) -> tuple[str, ...]:
        """Those of them that must be kept for every image."""
        return tuple(sorted({METRICS[name] for name in self.metrics if name in KEEPING}))

    @property
    def kept_of_reference(self) -> tuple[str, ...]:
        """Those that a reference keeps: pixels too, which tell what chance amounts to."""
        return tuple(sorted({*self.kept, *({"pixels"} & {*self.features})}))


PROTOCOLS = {
    # The evaluator of guided diffusion (arXiv:2105.05233), as SiT and REPA use it.
    "adm": Protocol(
        metrics=("fid", "sfid", "inception_score", "precision", "recall"),
        rounding="down",
        labels="random",
    ),
    # EDM2 (arXiv:2312.02696); published numbers of Decoupled MeanFlow are of it.
    "edm2": Protocol(metrics=("fid", "fd_dinov2"), rounding="down", labels="random"),
    # MeanFlow (arXiv:2505.13447); the Inception score is improved MeanFlow's.
    "meanflow": Protocol(metrics=("fid", "inception_score"), rounding="half_up", labels="random"),
    # Small images as they are, with no network between.
    "pixels": Protocol(
        metrics=("fd_pixels", "label_agreement"), rounding="nearest", labels="balanced"
    ),
}


def labels_of(
    indices: Int[np.ndarray, "n"], num_classes: int, how: str = "balanced", seed: int = 0
) -> Int[np.ndarray, "n"]:
    """The labels of some samples, each a function of seed and index alone.

    Args:
      indices: of the samples.
      num_classes: labels are below it; all are 0 where it is 0.
      how: one of `LABELS`.
      seed: of random labels.
    """
    if not num_classes or how == "balanced":
        return (indices % max(num_classes, 1)).astype(np.int32)
    return np.asarray(_drawn(jnp.int32(seed), jnp.asarray(indices, jnp.int32), num_classes))


@jax.jit(static_argnums=2)
def _drawn(seed: jax.Array, indices: jax.Array, num_classes: int) -> jax.Array:
    def draw(index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), _LABEL)
        return jax.random.randint(key, (), 0, num_classes, jnp.int32)

    return jax.vmap(draw)(indices)
