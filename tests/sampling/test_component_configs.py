"""Objectives and samplers with fields other than the defaults become config, and are rebuilt."""

import dataclasses

import pytest

from dmf import registry
from dmf.objectives import (
    AdaptiveWeighting,
    AlphaFlow,
    Consistency,
    DecoupledMeanFlow,
    DrawnGuidance,
    FlowMatching,
    GapPair,
    ImprovedMeanFlow,
    LogitNormal,
    MeanFlow,
    NormalizedWeighting,
    OrderedPair,
    SelfGuidance,
    Shortcut,
    SoFlow,
    Tangent,
    TerminalVelocityMatching,
    ToData,
    UniformTime,
)
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.objectives.interpolants import COSINE, LINEAR
from dmf.sampling import (
    AdamsBashforth,
    ConsistencyTrajectory,
    EulerMaruyama,
    Restart,
    Sampler,
)

# Components whose fields all differ from their defaults.
CHANGED = {
    "flow_matching": FlowMatching(
        interpolant=COSINE, time_sampler=UniformTime(), label_dropout=0.2,
        alignment_coefficient=0.5, weighting=AdaptiveWeighting(power=0.5, offset=0.1), time_bins=3,
    ),
    "mean_flow": MeanFlow(
        interpolant=COSINE,
        time_pair=OrderedPair(first=UniformTime(), second=LogitNormal(mean=2.0, std=0.5),
                              equal_probability=0.25),
        guidance=DrawnGuidance(kappa=0.5, max_scale=4.0, power=2.0, start_range=(0.1, 0.2),
                               end_range=(0.7, 0.9)),
        tangent=Tangent(velocity="predicted", max_rms=3.0, warmup_steps=7),
        label_dropout=0.2, weighting=AdaptiveWeighting(power=0.5), time_bins=3,
        compute_sharing=ComputeSharing(enabled=False, unconditional_microbatches=2),
    ),
    "improved_mean_flow": ImprovedMeanFlow(
        guidance=DrawnGuidance(kappa=0.5, max_scale=4.0), label_dropout=0.2,
        tangent=Tangent(velocity="predicted", max_rms=3.0), time_bins=3,
        compute_sharing=ComputeSharing(enabled=False, unconditional_microbatches=2),
    ),
    "decoupled_mean_flow": DecoupledMeanFlow(time_sampler=LogitNormal(mean=0.3)),
    "alpha_flow": AlphaFlow(
        interpolant=COSINE, time_pair=OrderedPair(first=UniformTime(), second=UniformTime()),
        first_step=3, last_step=7, clip=4.0, guidance=SelfGuidance(omega=2.0),
        tangent=Tangent(max_rms=3.0), label_dropout=0.2,
        weighting=AdaptiveWeighting(power=0.5), time_bins=3,
        compute_sharing=ComputeSharing(enabled=False),
    ),
    "soflow": SoFlow(
        interpolant=COSINE, time_sampler=UniformTime(),
        time_pair=OrderedPair(first=UniformTime(), second=LogitNormal(mean=2.0)),
        consistency_share=0.5, first_ratio=0.2, last_ratio=0.01, last_step=7,
        guidance=SelfGuidance(omega=2.0, kappa=0.5, interval=(0.1, 0.9), decay_start=0.7),
        label_dropout=0.2, weighting=AdaptiveWeighting(power=0.5), time_bins=3,
        compute_sharing=ComputeSharing(enabled=False, unconditional_microbatches=2),
    ),
    "shortcut": Shortcut(target_ema="main", shortest_steps=32, self_consistency_share=0.5),
    "consistency": Consistency(
        time_pair=ToData(times=UniformTime(), equal_probability=0.25),
        weighting=NormalizedWeighting(offset=0.2), guidance=SelfGuidance(omega=2.0),
    ),
    "terminal_velocity_matching": TerminalVelocityMatching(
        time_pair=GapPair(gap_mean=-0.5, gap_std=1.2, mean=0.1, std=0.9),
        differentiate_tangent=False,
    ),
    "ctm": ConsistencyTrajectory(gamma=0.25),
    "sde": EulerMaruyama(last_time=1e-3),
    "adams_bashforth": AdamsBashforth(),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_fields_other_than_the_defaults_survive_the_round_trip(name):
    kind = "sampler" if isinstance(CHANGED[name], Sampler) else "objective"
    config = registry.to_config(CHANGED[name])
    assert config["name"] == name
    assert registry.build(kind, config) == CHANGED[name]
    assert registry.complete(kind, config) == config


def test_every_field_of_an_objective_differs_from_its_default_above():
    """So that a field that is lost on the way would be noticed."""
    for name in ("flow_matching", "mean_flow", "soflow"):
        changed = CHANGED[name]
        for field in registry.config_fields(type(changed)):
            assert getattr(changed, field) != getattr(type(changed)(), field), field


def test_fields_that_the_program_fills_in_are_in_no_config():
    assert registry.to_config(Restart(interpolant=COSINE)) == {"name": "restart"}
    objective = dataclasses.replace(DecoupledMeanFlow(), teacher=None)
    assert "teacher" not in registry.to_config(objective)


def test_an_object_is_registered_under_its_name_alone():
    assert registry.to_config(LINEAR, "interpolant") == "linear"
    assert registry.build("interpolant", "cosine") is COSINE
