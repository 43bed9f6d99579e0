"""The objectives on one network at equal compute, with three seeds each.

    dmf sweep --config=configs/digits_meanflow.py --sweep=configs/sweeps/objectives.py \\
      --workdir=runs/objectives_sweep

For every config of MeanFlow on a DiT. Of your own, import it here in place of `digits_meanflow`:
its operations (`objective.flops(network)`) times its steps are what each run may spend. Each
objective has its default settings. Add `--config.init.checkpoint=DIR` for the fine-tuning of a flow
model, and leave out improved MeanFlow, whose velocity head a flow model lacks.
`python -m benchmarks.objectives` compares them on the digits (docs/objectives.md).
"""

from collections.abc import Iterator
from typing import Any

from configs import digits_meanflow
from dmf import registry
from dmf.experiments.sweeps import grid
from dmf.models.build import network
from dmf.objectives.build import objective

OBJECTIVES = (
    "mean_flow", "improved_mean_flow", "alpha_flow", "soflow", "shortcut", "consistency",
    "terminal_velocity_matching", "decoupled_mean_flow",
)  # fmt: skip
HEAD_DEPTH = 2  # blocks of the velocity head


def get_sweep() -> Iterator[dict[str, Any]]:
    """Every objective, with as many steps as the compute allows."""
    config = digits_meanflow.get_config()
    budget = config.run.steps * objective(config.objective).flops(network(config.model))
    for name in OBJECTIVES:
        config.objective = registry.default_config("objective", name)
        built = objective(config.objective)
        heads = {field: getattr(built, field)
                 for field in ("learned_variance", "guidance_input", "velocity_head")}
        config.model.update(heads)
        config.model.head_depth = HEAD_DEPTH if built.velocity_head else 8
        changed = {"objective.name": name, "run.steps":
                   round(budget / built.flops(network(config.model)))}
        changed |= {f"model.{field}": True for field, needed in heads.items() if needed}
        if built.velocity_head:
            changed["model.head_depth"] = HEAD_DEPTH
        if name == "consistency":
            changed |= {"objective.tangent.warmup_steps": changed["run.steps"] // 10,
                        "sampling.sampler.name": "restart"}
        if name == "terminal_velocity_matching":
            changed["model.attention"] = "xla"  # its gradient goes through a tangent
        for seeds in grid({"seed": range(3)}):
            yield changed | seeds
