"""The objectives on one network at equal compute, with three seeds each.

    dmf sweep --config=configs/digits_meanflow.py --sweep=configs/sweeps/objectives.py \\
      --workdir=runs/objectives_sweep

For every config of MeanFlow on a DiT. Of your own, import it here in place of `digits_meanflow`:
its operations (`objective.flops(network)`) times its steps are what each run may spend. Each
objective has its default settings. Add `--config.init.checkpoint=DIR` for the fine-tuning of a flow
model, and leave out improved MeanFlow, whose velocity head a flow model lacks.
`python -m benchmarks.objectives` compares them on the digits (docs/objectives.md).
"""

import copy
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


def model_fields(name: str, head_depth: int) -> dict[str, Any]:
    """The fields of a DiT that an objective with its default settings needs.

    Args:
      name: one of `OBJECTIVES`.
      head_depth: number of blocks of a velocity head, where the objective has one.
    """
    built = objective(registry.default_config("objective", name))
    fields = {field: True for field in ("learned_variance", "guidance_input", "velocity_head")
              if getattr(built, field)}
    if built.velocity_head:
        fields["head_depth"] = head_depth
    if name == "terminal_velocity_matching":
        fields["attention"] = "xla"  # its gradient goes through a tangent
    return fields


def get_sweep() -> Iterator[dict[str, Any]]:
    """Every objective, with as many steps as the compute allows."""
    config = digits_meanflow.get_config()
    budget = config.run.steps * objective(config.objective).flops(network(config.model))
    for name in OBJECTIVES:
        fields = model_fields(name, head_depth=2)
        model = copy.deepcopy(config.model)
        model.update(fields)
        cost = objective(registry.default_config("objective", name)).flops(network(model))
        changed = {"objective.name": name, "run.steps": round(budget / cost)}
        changed |= {f"model.{field}": value for field, value in fields.items()}
        if name == "consistency":
            changed |= {"objective.tangent.warmup_steps": changed["run.steps"] // 10,
                        "sampling.sampler.name": "restart"}
        for seeds in grid({"seed": range(3)}):
            yield changed | seeds
