"""From `config.evaluation` to a protocol."""

import dataclasses
from typing import Any

from dmf.errors import InputError, check_at_least, check_between
from dmf.evaluation.protocols import Protocol
from dmf.objectives.guidance import LARGEST_SCALE
from dmf.objectives.interpolants import check_interval
from dmf.registry import at, build, lookup
from dmf.sampling.build import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How images are evaluated, while training and by `dmf evaluate`. It may change on resume.

    Attributes:
      protocol: name of the protocol: pixels (no network needed), adm, edm2 or meanflow.
      reference: file of statistics (.npz or .pkl) or set of images that samples are compared with;
        empty for the dataset that the run trains on.
      inception: directory of an Inception (for FID and its relatives), an export of `dmf convert`;
        empty where no metric needs it.
      dinov2: directory of a DINOv2 (for FD-DINOv2), an export of `dmf convert`; empty where no
        metric needs it.
      metrics: names of the metrics, the first of which chooses the best checkpoint; empty for those
        of the protocol. `dmf components metric` lists them.
      label_sampling: how labels of samples are chosen, random (each by itself) or balanced (all
        classes in turn); empty for the protocol's way.
      rounding: how images become 8 bits, nearest, half_up or down; empty for the protocol's way.
      count: number of samples, >= 1.
      seed: random seed of the samples, from 0 to 2^31 - 1.
      chunk_size: images that a device processes at a time, >= 1; another size may round otherwise.
      part_size: images after which statistics are written to disk, so that an interrupted
        evaluation resumes from there; >= 1.
      every: training steps between two evaluations, >= 0; 0 for none.
      emas: names of the EMA parameters that are evaluated, '' for the raw parameters.
      steps: numbers of sampling steps that are evaluated; empty for those of `sampling.steps`.
      guidance_scales: guidance scales that are evaluated, each in every interval; empty for that of
        `sampling.guidance`.
      guidance_intervals: (start, end) of the closed intervals of guided times t that are evaluated,
        each with every scale; empty for that of `sampling.guidance`. The best checkpoint is kept
        by the first EMA, interval, scale and number of steps.
    """

    protocol: str = "pixels"
    reference: str = ""
    inception: str = ""
    dinov2: str = ""
    metrics: tuple[str, ...] = ()
    label_sampling: str = ""
    rounding: str = ""
    count: int = 5000
    seed: int = 0
    chunk_size: int = 64
    part_size: int = 5000
    every: int = 0
    emas: tuple[str, ...] = ("main",)
    steps: tuple[int, ...] = ()
    guidance_scales: tuple[float, ...] = ()
    guidance_intervals: tuple[tuple[float, float], ...] = ()

    @property
    def searches_guidance(self) -> bool:
        """Whether guidance scales or intervals are searched."""
        return bool(self.guidance_scales or self.guidance_intervals)

    def __post_init__(self):
        check_between(self, 1, 10**8, "count", "part_size")
        check_between(self, 1, 2**16, "chunk_size")
        check_at_least(self, 0, "every")
        for interval in self.guidance_intervals:
            check_interval("guidance_intervals", interval)
        if not all(0 <= scale <= LARGEST_SCALE for scale in self.guidance_scales):
            raise InputError("guidance_scales", self.guidance_scales, "give numbers from 0 to "
                             f"{LARGEST_SCALE}")
        if not 0 <= self.seed < 2**31:
            raise InputError("seed", self.seed, "give a whole number from 0 to 2^31 - 1")


def evaluation(section: Any) -> Evaluation:
    """The settings of `config.evaluation`.

    Raises:
      InputError: a field that cannot be used; the message names it.
    """
    with at("evaluation"):
        return build(Evaluation, section)


def evaluated_steps(settings: Evaluation, sampled: Sampling) -> tuple[int, ...]:
    """The numbers of sampling steps of `config.evaluation`, or else of `config.sampling`.

    Raises:
      InputError: one of them is too small for the sampler.
    """
    steps = settings.steps or sampled.steps
    sampled.check_steps("evaluation.steps" if settings.steps else "sampling.steps", steps)
    return steps


def protocol(settings: Evaluation, *, labelled: bool) -> Protocol:
    """The protocol of `config.evaluation`, with the fields that the config sets.

    Args:
      settings: of `config.evaluation`.
      labelled: whether images have labels; without them, the protocol's metrics that need labels
        are left out.

    Raises:
      InputError: no such protocol, metric, rounding or label sampling.
    """
    try:
        registered = lookup("protocol", settings.protocol)
    except InputError as error:
        raise InputError("evaluation.protocol", settings.protocol, error.remedy) from None
    changes = {field: getattr(settings, field) for field in ("rounding", "label_sampling")
               if getattr(settings, field)}
    need_labels = () if labelled else registered.metrics_that_need("labels")
    metrics = settings.metrics or tuple(
        name for name in registered.metrics if name not in need_labels
    )
    with at("evaluation"):
        return dataclasses.replace(registered, metrics=metrics, **changes)
