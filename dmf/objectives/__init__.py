"""The mathematics of training: objectives, and the components that they are made of.

Every objective has a file, which reads like the algorithm of its paper. An objective draws times,
noise and dropped labels, and computes one loss a sample from them. For researchers who change the
method. It imports `dmf.runtime`, `dmf.registry`, `dmf.errors` and `dmf.types`; it sees networks
through the `Network` protocol alone.
"""

from dmf.objectives.alpha_flow import AlphaFlow
from dmf.objectives.consistency import Consistency
from dmf.objectives.decoupled_mean_flow import DecoupledMeanFlow
from dmf.objectives.flow_matching import FlowMatching
from dmf.objectives.guidance import (
    DrawnGuidance,
    Guidance,
    NoGuidance,
    SelfGuidance,
    TeacherGuidance,
)
from dmf.objectives.improved_mean_flow import ImprovedMeanFlow
from dmf.objectives.interpolants import COSINE, LINEAR, ScaledLinear
from dmf.objectives.loss_weighting import (
    AdaptiveWeighting,
    CauchyWeighting,
    NormalizedWeighting,
    PublishedCauchyWeighting,
    UniformWeighting,
)
from dmf.objectives.mean_flow import MeanFlow
from dmf.objectives.objective import Objective
from dmf.objectives.shortcut import Shortcut
from dmf.objectives.soflow import SoFlow
from dmf.objectives.tangent import Tangent
from dmf.objectives.terminal_velocity_matching import TerminalVelocityMatching
from dmf.objectives.time_samplers import (
    GapPair,
    LogitNormal,
    MixedPair,
    OrderedPair,
    ToData,
    UniformTime,
    dimension_shift,
)
from dmf.registry import define_kind

__all__ = [
    "AdaptiveWeighting",
    "AlphaFlow",
    "CauchyWeighting",
    "Consistency",
    "DecoupledMeanFlow",
    "DrawnGuidance",
    "FlowMatching",
    "GapPair",
    "Guidance",
    "ImprovedMeanFlow",
    "LogitNormal",
    "MeanFlow",
    "MixedPair",
    "NoGuidance",
    "NormalizedWeighting",
    "Objective",
    "OrderedPair",
    "PublishedCauchyWeighting",
    "ScaledLinear",
    "SelfGuidance",
    "Shortcut",
    "SoFlow",
    "Tangent",
    "TeacherGuidance",
    "TerminalVelocityMatching",
    "ToData",
    "UniformTime",
    "UniformWeighting",
    "dimension_shift",
]

define_kind(
    "objective", "What training minimises.", Objective,
    flow_matching=FlowMatching, mean_flow=MeanFlow, improved_mean_flow=ImprovedMeanFlow,
    decoupled_mean_flow=DecoupledMeanFlow, alpha_flow=AlphaFlow, soflow=SoFlow,
    shortcut=Shortcut, consistency=Consistency, terminal_velocity_matching=TerminalVelocityMatching,
)
define_kind(
    "interpolant", "The path between data and noise.",
    linear=LINEAR, cosine=COSINE, scaled_linear=ScaledLinear,
)
define_kind(
    "time_sampler", "The distribution of the time t.", logit_normal=LogitNormal, uniform=UniformTime
)
define_kind(
    "time_pair", "The distribution of the times (t, r).",
    ordered_pair=OrderedPair, mixed_pair=MixedPair, to_data=ToData, gap_pair=GapPair,
)
define_kind(
    "guidance", "The guidance of the velocity that training regresses on.", Guidance,
    none=NoGuidance, self=SelfGuidance, teacher=TeacherGuidance, drawn=DrawnGuidance,
)
define_kind(
    "weighting", "From the squared error of a sample to its loss.",
    uniform=UniformWeighting, adaptive=AdaptiveWeighting, cauchy=CauchyWeighting,
    published_cauchy=PublishedCauchyWeighting, normalized=NormalizedWeighting,
)
