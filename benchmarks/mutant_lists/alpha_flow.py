"""The mutants of alpha-Flow: its target, its weight, its schedule, and the derivative at 0."""

from benchmarks.mutant_lists.mutant import Mutant

_TESTS = ("tests/objectives/test_alpha_flow.py",)

MUTANTS = (
    Mutant(
        "alpha_flow_weight", "the error of alpha-Flow is not divided by alpha",
        "dmf/objectives/alpha_flow.py",
        "return u - (u - target) / per_sample(alpha, u)",
        "return target",
        _TESTS,
    ),
    Mutant(
        "alpha_flow_equal_times", "alpha-Flow has the step's alpha where r = t",
        "dmf/objectives/alpha_flow.py",
        "ours = jnp.where(r < t, alpha, 1.0)",
        "ours = alpha",
        _TESTS,
    ),
    Mutant(
        "alpha_flow_next_point", "the next point of alpha-Flow keeps the time t",
        "dmf/objectives/alpha_flow.py",
        "per_sample(span, v) * v, t - span, r, y)",
        "per_sample(span, v) * v, t, r, y)",
        _TESTS,
    ),
    Mutant(
        "alpha_flow_branch", "alpha-Flow takes the derivative where alpha is not 0",
        "dmf/objectives/alpha_flow.py",
        "(largest > 0).astype(int) + (largest == 1)",
        "(largest == 0).astype(int) + (largest == 1)",
        _TESTS,
    ),
    Mutant(
        "alpha_flow_middle", "the schedule of alpha-Flow has its middle at half of its length",
        "dmf/objectives/alpha_flow.py",
        "(self.first_step + self.last_step) / 2",
        "(self.last_step - self.first_step) / 2",
        _TESTS,
    ),
    Mutant(
        "alpha_flow_clip", "alpha-Flow clips the velocity where r = t",
        "dmf/objectives/alpha_flow.py",
        "target = jnp.where(per_sample(r < t, u), bounded, target)",
        "target = bounded",
        _TESTS,
    ),
)  # fmt: skip
