"""The common part of recipes in the latents of other autoencoders than that of Stable Diffusion.

A recipe has three rows: a flow model, and Decoupled MeanFlow and MeanFlow that start from it. The
times of all three are shifted for the number of values of a sample (arXiv:2510.11690).
"""

import math

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import STEPS_PER_EPOCH, imagenet
from configs.rows import Row
from dmf.objectives import (
    DecoupledMeanFlow,
    FlowMatching,
    LogitNormal,
    MeanFlow,
    OrderedPair,
    SelfGuidance,
    UniformTime,
    dimension_shift,
)


def flow_model(side: int, channels: int, resolution: int) -> ConfigDict:
    """A flow model at XL with a token for each place of the latents, and uniform times before the
    shift.

    Args:
      side: height and width of the latents.
      channels: channels of the latents.
      resolution: height and width of the images.
    """
    config = imagenet("XL", patch_size=1, resolution=resolution)
    config.model.update(input_size=side, channels=channels)
    shift = dimension_shift(side * side * channels)
    config.objective = default.component(FlowMatching(time_sampler=UniformTime(shift=shift)))
    config.sampling.update(steps=(50,), shift=shift)
    return config


def flow_map_rows(
    start: str, values: int, *, dmf: SelfGuidance, meanflow: SelfGuidance
) -> dict[str, Row]:
    """The rows "dmf" and "meanflow", with the lengths and, before the shift, the times of their
    papers.

    Args:
      start: workdir of the flow model.
      values: number of values of a sample.
      dmf: guidance of Decoupled MeanFlow in training.
      meanflow: guidance of MeanFlow in training.
    """
    common = {"init.checkpoint": start, "data.batch_size": 256, "emas.main.decay": 0.9999,
              "optimizer": default.get_config().optimizer}  # fmt: skip

    def pair(first: float, second: float, equal: float = 0.0) -> OrderedPair:
        a, b = (shifted(values, mean) for mean in (first, second))
        return OrderedPair(first=a, second=b, equal_probability=equal)

    decoupled = DecoupledMeanFlow(
        time_sampler=shifted(values, 0.0), time_pair=pair(0.4, -1.2), guidance=dmf
    )
    return {
        "dmf": Row(changes=common | {
            "model.conditioning": "decoupled", "model.split_depth": 20,
            "model.learned_variance": True, "objective": default.component(decoupled),
            "run.steps": 400_000, "sampling.steps": (1, 2, 4),
        }),
        "meanflow": Row(changes=common | {
            "model.conditioning": "meanflow", "run.steps": 240 * STEPS_PER_EPOCH,
            "objective": default.component(
                MeanFlow(time_pair=pair(-0.4, -0.4, equal=0.75), guidance=meanflow)
            ),
            "sampling.steps": (1, 2),
        }),
    }  # fmt: skip


def shifted(values: int, mean: float) -> LogitNormal:
    """The logit-normal times of a mean, shifted for samples of a number of values."""
    return LogitNormal(mean=mean + math.log(dimension_shift(values)))
