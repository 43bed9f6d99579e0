r"""Memory and operations of a training step of each objective, compiled for absent devices.

    python -m benchmarks.objective_memory --output=benchmarks/results/objective_memory.md

It compiles XL/2 at 256 in bfloat16 with MeanFlow conditioning, a batch of 256, and each objective
of configs/sweeps/objectives.py with its default settings, without guidance. Results are stored
beside the table, and the same command compiles the rest. TPUs need libtpu and GPUs the extra
`cuda`; neither need be attached.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from benchmarks.machine import machine, start
from configs.imagenet import imagenet
from configs.sweeps.objectives import OBJECTIVES, model_fields
from dmf import registry
from dmf.models.build import network
from dmf.runtime.device_specs import GIB
from dmf.training import compile

_TOPOLOGY = flags.DEFINE_list("topology", ["v5e:4x4", "h100:8"], "TPU slices and nodes of GPUs")
_OBJECTIVE = flags.DEFINE_multi_enum("objective", list(OBJECTIVES), OBJECTIVES,
                                     "objectives; once for each")  # fmt: skip
_REMAT = flags.DEFINE_enum("remat", "dots", ("none", "dots", "full"), "rematerialisation")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/objective_memory.md",
                              "a .md file for the table; results go into a .json file beside it")

_COLUMNS = ("topology", "objective", "remat", "passes a step", "TFLOP per chip", "temporaries GiB",
            "total GiB", "memory GiB", "fits", "sent GiB")  # fmt: skip


def config_of(objective: str, remat: str) -> ConfigDict:
    """The config of XL/2 at 256 with an objective of the family.

    Args:
      objective: one of `OBJECTIVES`.
      remat: `model.remat`.
    """
    config = imagenet("XL")
    config.model.update(conditioning="meanflow", remat=remat, **model_fields(objective, 8))
    config.objective = registry.default_config("objective", objective)
    return config


def compile_objective(topology: str, objective: str, remat: str) -> dict[str, Any]:
    """The compiled step of an objective in numbers, with the machine that compiled it."""
    config = config_of(objective, remat)
    step = compile.compile_step(config, compile.topology_devices(topology))
    forward = network(config.model).flops.forward * config.data.batch_size
    return step._asdict() | {
        "collectives": sum(each.sent for each in step.collectives),
        "passes": step.step_flops / forward,
        "machine": machine(),
    }


def row(key: str, step: dict[str, Any]) -> str:
    """A row of the table."""
    fits = step["total"] <= step["memory"]
    sent = f"{step['collectives'] / GIB:.2f}" if fits else "-"
    cells = [*json.loads(key), f"{step['passes']:.2f}",
             f"{step['step_flops'] / step['devices'] / 1e12:.1f}",
             *(f"{step[field] / GIB:.2f}" for field in ("temporaries", "total", "memory")),
             "yes" if fits else "no", sent]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(results: dict[str, dict[str, Any]]) -> str:
    """The table of all results."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    lines += [row(key, step) for key, step in results.items()]
    machines = "; ".join(dict.fromkeys(step["machine"] for step in results.values()))
    return "\n".join([*lines, "", f"XL/2 at 256, batch 256, bfloat16. Compiled on {machines}."])


def main(_: Sequence[str]) -> None:
    """Compiles the steps without a result, and writes the table after each."""
    page = Path(_OUTPUT.value)
    stored = page.with_suffix(".json")
    results = json.loads(stored.read_text()) if stored.exists() else {}
    for topology in _TOPOLOGY.value:
        for objective in _OBJECTIVE.value:
            key = json.dumps([topology, objective, _REMAT.value])
            if key not in results:
                print(f"compiling {objective} for {topology}", flush=True)
                results[key] = compile_objective(topology, objective, _REMAT.value)
                jax.clear_caches()
                stored.write_text(json.dumps(results, indent=1) + "\n")
                page.write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    start(main)
