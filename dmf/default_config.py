"""Every field of a config with its default: the fields of `Config`, and of the parts it names.

`dmf config --config=FILE` prints a config with the meaning of every field, `dmf components` lists
the components that a field may name.
"""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from dmf import registry
from dmf.data.build import Data
from dmf.evaluation.build import Evaluation
from dmf.models.build import Latents
from dmf.models.dit import DiT
from dmf.objectives.flow_matching import FlowMatching
from dmf.objectives.objective import Objective
from dmf.registry import component_field
from dmf.sampling.build import Sampling
from dmf.training.ema import ConstantEma, Ema
from dmf.training.optimizer import AdamW, Optimizer
from dmf.training.settings import Alignment, InitialCheckpoint, MeshShape, Run, TeacherCheckpoint
from dmf.types import Network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run. The defaults train a small flow model of the digits.

    Attributes:
      seed: random seed of the initial parameters, the draws of training and the shuffle.
      model: the network.
      init: the checkpoint that training starts from.
      teacher: the checkpoint of the teacher.
      alignment: what the objective aligns with.
      data: the dataset and its batches.
      latents: the latent space between samples and images.
      objective: what training minimises.
      freeze: parameters that are not trained: regular expressions for whole paths, the number of a
        block second, for example "blocks/(0|1)/mlp/.*"; "encoder" for all that does not depend on
        r.
      optimizer: the update of the parameters.
      gradient_accumulation: number of microbatches that a batch is cut into, to save memory.
      sum_gradients: when gradients are summed over the mesh axes slices and data: "per_term" (after
        each term of the loss in each microbatch, for the least memory) or "once" (after the last
        one, for the least communication).
      emas: exponential moving averages of the parameters, by a name of your choice.
      mesh: devices along each axis.
      run: length and cadence.
      profile_steps: training steps to trace for a profiler, as FIRST:LAST; empty for none.
      sampling: how images are sampled.
      evaluation: how images are measured.
    """

    seed: int = 0
    model: Network = component_field("model", DiT(
        input_size=8, channels=1, depth=6, width=64, heads=4, num_classes=10
    ))
    init: InitialCheckpoint = InitialCheckpoint()
    teacher: TeacherCheckpoint = TeacherCheckpoint()
    alignment: Alignment = Alignment()
    data: Data = Data()
    latents: Latents = Latents()
    objective: Objective = component_field("objective", FlowMatching())
    freeze: tuple[str, ...] = ()
    optimizer: Optimizer = component_field("optimizer", AdamW())
    gradient_accumulation: int = 1
    sum_gradients: str = "per_term"
    emas: Mapping[str, Ema] = component_field("ema", {"main": ConstantEma()}, by_name=True)
    mesh: MeshShape = MeshShape()
    run: Run = Run()
    profile_steps: str = ""
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()


def get_config() -> ConfigDict:
    """The defaults as a config.

    >>> get_config().model.depth
    6
    """
    return ConfigDict(registry.to_config(Config()))


def component(built: object) -> ConfigDict:
    """A component as a part of a config.

    >>> component(ConstantEma(decay=0.99)).name
    'constant'
    """
    return ConfigDict(registry.to_config(built))
