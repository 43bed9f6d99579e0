"""The ways to compute one training step that benchmarks compare, and their configs."""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet

OBJECTIVES = ("decoupled_mean_flow", "mean_flow", "flow_matching")


class Variant(NamedTuple):
    """One way to compute the same step.

    Attributes:
      batch: samples a step.
      scan: whether the blocks are scanned, or unrolled.
      remat: what the backward pass recomputes.
      attention: which implementation.
      work: "plain" or "shared", with a number for null_parts; "-" where there is no choice.
    """

    batch: int
    scan: bool
    remat: str
    attention: str
    work: str

    @property
    def plain(self) -> "Variant":
        """What it is compared with."""
        return self._replace(work="plain")

    @property
    def cells(self) -> str:
        """As the first cells of a table's row."""
        blocks = "scanned" if self.scan else "unrolled"
        return f"| {self.batch} | {blocks} | {self.remat} | {self.attention} | {self.work} |"


HEAD = "| batch | blocks | remat | attention | work |"


def config_of(
    variant: Variant, *, size: str, objective: str, dtype: str, split: int = 0
) -> ConfigDict:
    """The recipe of the published models at a size, latents of 32 x 32 x 4, computed in one way.

    Args:
      variant: the way.
      size: of the transformer, with patches of 2.
      objective: one of `OBJECTIVES`; Decoupled MeanFlow with model guidance of 0.6.
      dtype: of the computation.
      split: blocks that see t where decoupled; 0 is two thirds of them.
    """
    config = imagenet(size)
    model = config.model
    if objective == "decoupled_mean_flow":
        guidance = default.self_guidance(1.0, 0.6, (0.0, 0.7))
        config.objective = default.decoupled_mean_flow(guidance)
        split = split or round(model.depth * 2 / 3)
        model.update(conditioning="decoupled", split_depth=split, learned_variance=True)
    elif objective == "mean_flow":
        config.objective = default.mean_flow(default.self_guidance(0.2, 0.92))
        model.conditioning = "meanflow"
    else:
        config.objective = default.flow_matching()
    model.update(dtype=dtype, scan=variant.scan, remat=variant.remat,
                 attention=variant.attention)
    if "work" in config.objective:
        shared = variant.work.startswith("shared")
        parts = variant.work.removeprefix("shared" if shared else "plain") or "0"
        config.objective.work.update(shared=shared, null_parts=int(parts))
    config.data.batch_size = variant.batch
    return config
