"""Operations of alpha-Flow, shortcut models, consistency and terminal velocity matching."""

import pytest
from test_compute_sharing import forward_passes

from dmf.models.dit import DiT
from dmf.objectives import (
    AlphaFlow,
    Consistency,
    SelfGuidance,
    Shortcut,
    TerminalVelocityMatching,
)
from dmf.objectives.compute_sharing import ComputeSharing

EACH_LOSS = ComputeSharing(unconditional_microbatches=0)
GUIDED = {"guidance": SelfGuidance(omega=2.0), "compute_sharing": EACH_LOSS}
GUIDED_BY_EMA = {"guidance": SelfGuidance(kappa=0.5), "compute_sharing": EACH_LOSS,
                 "target_ema": "main"}


def model_of(conditioning: str) -> DiT:
    """Split at two thirds where it is decoupled, as the published networks; shallow and narrow."""
    split = {"split_depth": 2} if conditioning == "decoupled" else {}
    return DiT(input_size=32, channels=4, num_classes=10, depth=3, width=256, heads=4,
               conditioning=conditioning, **split)


@pytest.mark.parametrize(("objective", "conditioning", "passes"), [
    (Shortcut(), "meanflow", 3.5), (Shortcut(), "decoupled", 3.33),
    (Shortcut(**GUIDED), "meanflow", 4.25), (Consistency(), "meanflow", 4.0),
    (TerminalVelocityMatching(), "meanflow", 10.0), (TerminalVelocityMatching(), "decoupled", 8.0),
    (TerminalVelocityMatching(**GUIDED), "meanflow", 11.0),
    (TerminalVelocityMatching(guidance=SelfGuidance(kappa=0.5)), "meanflow", 11.0),
    (TerminalVelocityMatching(**GUIDED_BY_EMA), "meanflow", 12.0),
    (TerminalVelocityMatching(differentiate_tangent=False), "meanflow", 8.0),
    (AlphaFlow(last_step=9), "meanflow", 4.0), (AlphaFlow(constant_alpha=0.5), "decoupled", 4.0),
    (AlphaFlow(constant_alpha=1.0), "meanflow", 3.0), (AlphaFlow(**GUIDED), "meanflow", 5.0),
    (AlphaFlow(guidance=SelfGuidance(kappa=0.5)), "decoupled", 5.33),
])  # fmt: skip
def test_flops_are_counted_in_forward_passes(objective, conditioning, passes):
    model = model_of(conditioning)
    assert objective.flops(model) / model.flops.forward == pytest.approx(passes, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["meanflow", "decoupled"])
@pytest.mark.parametrize("objective", [
    Shortcut(compute_sharing=EACH_LOSS), Shortcut(**GUIDED), Consistency(),
    TerminalVelocityMatching(**GUIDED), TerminalVelocityMatching(differentiate_tangent=False),
    AlphaFlow(**GUIDED), AlphaFlow(constant_alpha=0.5), AlphaFlow(constant_alpha=1.0),
], ids=["shortcut", "guided", "consistency", "terminal_velocity", "detached", "alpha_flow",
        "alpha_half", "alpha_one"])
def test_flops_are_those_of_xla(objective, conditioning):
    """XLA also counts elementwise operations, and of the attention's tangent one matmul more."""
    model = model_of(conditioning)
    ours = objective.flops(model) / model.flops.forward
    assert 0.98 < forward_passes(objective, model) / ours < 1.08
