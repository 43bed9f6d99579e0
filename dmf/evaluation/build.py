"""From `config.evaluation` to a protocol."""

import dataclasses
from typing import Any

from dmf.errors import InputError, check_at_least, check_between
from dmf.evaluation.protocols import Protocol
from dmf.registry import at, build, lookup


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
      emas: names of the EMA parameters that are evaluated while training, '' for the raw
        parameters; the best checkpoint by the first of them is kept.
      steps: numbers of sampling steps that are evaluated while training; empty for those of
        `sampling.steps`.
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

    def __post_init__(self):
        check_between(self, 1, 10**8, "count", "part_size")
        check_between(self, 1, 2**16, "chunk_size")
        check_at_least(self, 0, "every")
        if not 0 <= self.seed < 2**31:
            raise InputError("seed", self.seed, "give a whole number from 0 to 2^31 - 1")


def evaluation(section: Any) -> Evaluation:
    """The settings of `config.evaluation`.

    Raises:
      InputError: a field that cannot be used; the message names it.
    """
    with at("evaluation"):
        return build(Evaluation, section)


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
