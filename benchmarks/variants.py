"""Variants of one training step that benchmarks compare, and their configs."""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet
from dmf.objectives import DecoupledMeanFlow, FlowMatching, MeanFlow, SelfGuidance

OBJECTIVES = ("decoupled_mean_flow", "mean_flow", "flow_matching")


class Variant(NamedTuple):
    """One way to compute the same step.

    Attributes:
      batch: global batch size.
      scan: whether the blocks are scanned rather than unrolled.
      remat: `model.remat`, what the backward pass recomputes.
      attention: `model.attention`, the implementation of attention.
      sharing: "plain" or "shared" for `objective.compute_sharing`, followed by a number for
        `unconditional_microbatches` or by none for its default; "-" for an objective without it.
    """

    batch: int
    scan: bool
    remat: str
    attention: str
    sharing: str

    @property
    def plain(self) -> "Variant":
        """The variant without compute sharing, to which others are compared."""
        return self._replace(sharing="plain")

    @property
    def cells(self) -> str:
        """The first cells of its row in a table."""
        blocks = "scanned" if self.scan else "unrolled"
        return f"| {self.batch} | {blocks} | {self.remat} | {self.attention} | {self.sharing} |"


HEAD = "| batch | blocks | remat | attention | sharing |"


def config_of(
    variant: Variant, *, size: str, objective: str, dtype: str, split: int = 0
) -> ConfigDict:
    """The recipe of the published models with latents of 32 x 32 x 4, for one variant.

    Args:
      variant: how the step is computed.
      size: size of the transformer, which has patches of 2.
      objective: one of `OBJECTIVES`; Decoupled MeanFlow has model guidance of 0.6.
      dtype: dtype of the computation.
      split: split depth of a decoupled network; 0 for two thirds of the blocks.
    """
    config = imagenet(size)
    model = config.model
    if objective == "decoupled_mean_flow":
        guidance = default.component(SelfGuidance(omega=1.0, kappa=0.6, interval=(0.0, 0.7)))
        config.objective = default.component(DecoupledMeanFlow(guidance=guidance))
        split = split or round(model.depth * 2 / 3)
        model.update(conditioning="decoupled", split_depth=split, learned_variance=True)
    elif objective == "mean_flow":
        config.objective = default.component(MeanFlow(guidance=SelfGuidance(omega=0.2, kappa=0.92)))
        model.conditioning = "meanflow"
    else:
        config.objective = default.component(FlowMatching())
    model.update(dtype=dtype, scan=variant.scan, remat=variant.remat,
                 attention=variant.attention)
    if "compute_sharing" in config.objective:
        enabled = variant.sharing.startswith("shared")
        count = variant.sharing.removeprefix("shared" if enabled else "plain")
        config.objective.compute_sharing.update(
            enabled=enabled, unconditional_microbatches=int(count) if count else None
        )
    config.data.batch_size = variant.batch
    return config
