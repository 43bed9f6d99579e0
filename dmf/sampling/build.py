"""From `config.sampling` to a sampler and a guided flow map."""

import dataclasses
from typing import Any

from dmf.errors import InputError, check_between, check_choice
from dmf.models.encoders.tiled_decoding import check_tiles
from dmf.objectives.interpolants import Interpolant
from dmf.registry import at, build, component_field
from dmf.sampling.guidance import (
    SamplingGuidance,
    autoguidance,
    classifier_free,
    guidance_as_input,
)
from dmf.sampling.samplers import Euler, Sampler
from dmf.types import COMPUTE_DTYPES, FlowMap, GuidanceInput, Network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled, while training and from the result.

    Attributes:
      sampler: takes the steps.
      steps: numbers of sampling steps that are shown and measured.
      shift: time shift s > 0 of the schedule, t <- s t / (1 + (s - 1) t); 1 for none.
      guidance: guidance at sampling.
      decode_batch: number of latents that are decoded at once.
      decode_dtype: dtype of decoding, float32 or bfloat16 (its error: see `LatentSpace`).
      decode_tiles: side and overlap of the tiles in which latents are decoded, both in latents, for
        example (64, 16): memory is that of a tile, and images may differ slightly, which a log line
        says; () to decode images whole.
      ema: name of the EMA parameters that are sampled from; empty for the raw parameters.
    """

    sampler: Sampler = component_field("sampler", Euler())
    steps: tuple[int, ...] = (1, 2, 4)
    shift: float = 1.0
    guidance: SamplingGuidance = SamplingGuidance()
    decode_batch: int = 8
    decode_dtype: str = "float32"
    decode_tiles: tuple[int, ...] = ()
    ema: str = "main"

    def __post_init__(self):
        check_between(self, 1, 2**16, "decode_batch")
        check_choice(self, "decode_dtype", COMPUTE_DTYPES)
        check_tiles(self)
        if not 1e-3 <= self.shift <= 1e3:
            raise InputError("shift", self.shift, "the time shift is positive, from 0.001 to 1000; "
                             "1 leaves the times equal")
        if not self.steps:
            raise InputError("steps", self.steps, "give one number of sampling steps, or several")

    def check_steps(self, field: str, steps: tuple[int, ...]) -> None:
        """Checks that the sampler can take these numbers of steps.

        Args:
          field: the field that gives them, for the error.
          steps: numbers of sampling steps.

        Raises:
          InputError: one of them is too small for the sampler.
        """
        for number in steps:
            try:
                self.sampler.schedule(number, self.shift)
            except InputError as error:
                raise InputError(field, steps, error.remedy) from None


def sampling(section: Any, path: Interpolant) -> Sampling:
    """The settings of `config.sampling`.

    Args:
      section: `config.sampling`.
      path: that the network was trained on.

    Raises:
      InputError: a field that cannot be used; the message names it.
    """
    with at("sampling"):
        chosen = build(Sampling, section)
    sampler = dataclasses.replace(chosen.sampler, interpolant=path)
    return dataclasses.replace(chosen, sampler=sampler)


def guided_flow_map(
    flow_map: FlowMap,
    settings: Sampling,
    network: Network,
    *,
    guide: FlowMap | None = None,
    values: GuidanceInput | None = None,
) -> FlowMap:
    """The flow map of a network under the guidance of `config.sampling.guidance`: autoguidance with
    a guide, guidance as an input where the network takes it, and classifier-free guidance else.

    Args:
      flow_map: of the network.
      settings: settings of `config.sampling`.
      network: the network.
      guide: the flow map of the guide of autoguidance; None for none.
      values: scalars to use in place of the scale and the interval, see `classifier_free`.

    Raises:
      InputError: a scale or a number of channels that the network cannot take, or a guide of a
        network that takes its guidance as an input.
    """
    guidance = settings.guidance
    with at("sampling.guidance"):
        guidance.check_channels(network.sample_shape[-1])
        if network.guidance_input and guide is not None:
            raise InputError("guide", remedy="the network takes its guidance as an input; leave "
                             "the guide out")
        if network.guidance_input:
            return guidance_as_input(flow_map, guidance, values)
        if guide is not None:
            return autoguidance(flow_map, guide, guidance, values)
        return classifier_free(flow_map, guidance, values)
