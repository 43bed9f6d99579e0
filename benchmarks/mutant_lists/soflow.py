"""The mutants of SoFlow: its target, its schedule, its guidance, and the parts of a batch."""

from benchmarks.mutant_lists.mutant import Mutant

_TESTS = ("tests/objectives/test_soflow.py",)

MUTANTS = (
    Mutant(
        "soflow_target", "SoFlow divides the difference of two velocities by rho alone",
        "dmf/objectives/soflow.py",
        "per_sample(1 / ratio - 1, u)",
        "per_sample(1 / ratio, u)",
        _TESTS,
    ),
    Mutant(
        "soflow_next_point", "the next point of SoFlow keeps the time t",
        "dmf/objectives/soflow.py",
        "u_l = network.apply(fixed, x_l, t - span, r, sample.y)",
        "u_l = network.apply(fixed, x_l, t, r, sample.y)",
        _TESTS,
    ),
    Mutant(
        "soflow_schedule", "rho of SoFlow falls linearly in the training step",
        "dmf/objectives/soflow.py",
        "return self.first_ratio * jnp.exp(done * math.log(self.last_ratio / self.first_ratio))",
        "return self.first_ratio + done * math.fsum((self.last_ratio, -self.first_ratio))",
        _TESTS,
    ),
    Mutant(
        "soflow_run_length", "a run takes a given end of the schedule of SoFlow for its own",
        "dmf/objectives/soflow.py",
        "last_step=self.last_step or steps",
        "last_step=steps",
        _TESTS,
    ),
    Mutant(
        "guidance_decay", "guidance that decays ends without the network's own velocity",
        "dmf/objectives/guidance.py",
        "unguided = 1 - self.kappa",
        "unguided = 1.0",
        _TESTS,
    ),
)  # fmt: skip
