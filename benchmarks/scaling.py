"""Which settings fit full-size runs into TPU slices, compiled for slices that are not there.

    python -m benchmarks.scaling --output=benchmarks/results/scaling.md

Each config is compiled with ever more recomputation, then with ever more parts of a batch one after
the other, until it fits. What was compiled is kept beside the table, and not compiled again.
"""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.machine import machine
from dmf.chips import GIB
from dmf.collectives import Collective

_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/scaling.md", "a .md file; .json beside")
_TOPOLOGIES = flags.DEFINE_list(
    "topologies", ["v5e:4x4", "v6e:4x4", "v5p:2x2x1", "v5e:16x16"], "slices")  # fmt: skip
_CONFIGS = flags.DEFINE_list(
    "configs", ["dmf_xl2_256:256", "dmf_xl2_256:1024", "dmf_xl2_512:256"], "NAME:BATCH"
)

# From the fastest on. What is saved of a forward pass shrinks, then how much of it there is.
LADDER = (
    {"model.remat": "none"},
    {"model.remat": "dots"},
    {"model.remat": "dots", "accumulation": 2},
    {"model.remat": "dots", "accumulation": 4},
    {"model.remat": "full", "accumulation": 4},
)
# Moments and averages are spread over "data" where it divides them; 256 divides few of the sides of
# XL/2, and 16 all.
MESHES = {"v5e:16x16": {"mesh.slices": 16}}
# Memory that "none" takes of XL/2 for a sample of 256 tokens: where even this is too much, it is
# not compiled.
NONE_TAKES = 1.5 * GIB


def compiled(config: str, batch: int, topology: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What `dmf compile` finds out, or why it cannot."""
    fields = {"data.batch_size": batch, **settings}
    output = Path(_OUTPUT.value).with_suffix(".partial")
    command = [sys.executable, "-m", "dmf", "compile", f"--config=configs/{config}.py",
               f"--topology={topology}", f"--output={output}",
               *(f"--config.{name}={value}" for name, value in fields.items())]  # fmt: skip
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if not output.exists():
        return {"error": ended.stderr.strip().splitlines()[-1]}
    found = json.loads(output.read_text())
    output.unlink()
    return found


def main(_: Sequence[str]) -> None:
    """Compiles what was not compiled yet, and writes the table after each."""
    path = Path(_OUTPUT.value).with_suffix(".json")
    known = json.loads(path.read_text()) if path.exists() else {}
    for topology in _TOPOLOGIES.value:
        for case in _CONFIGS.value:
            config, _, batch = case.partition(":")
            for step in LADDER:
                settings = step | MESHES.get(topology, {})
                key = json.dumps([topology, config, int(batch), settings])
                saves_all = settings["model.remat"] == "none"
                if key not in known:
                    if saves_all and _too_much(topology, config, int(batch)):
                        continue
                    known[key] = compiled(config, int(batch), topology, settings)
                    path.write_text(json.dumps(known, indent=1) + "\n")
                    _tell(known)
                if known[key].get("total", 0) <= known[key].get("memory", -1):
                    break


def _too_much(topology: str, config: str, batch: int) -> bool:
    """Whether saving everything cannot fit."""
    memory = {"v5e": 16, "v6e": 32, "v5p": 95}[topology[:3]] * GIB
    tokens = 1024 if config.endswith("512") else 256
    return NONE_TAKES * batch / _chips(topology) * tokens / 256 > memory


def _chips(topology: str) -> int:
    """How many chips "v5e:4x4" has."""
    return math.prod(int(side) for side in topology.partition(":")[2].split("x"))


def _tell(known: dict[str, Any]) -> None:
    lines = ["| slice | config | batch | mesh | remat | parts | temporaries GiB | total GiB | "
             "memory GiB | fits | sent GiB | TFLOP a chip | compiled in s |", "|" + "---|" * 13]
    for key, found in known.items():
        topology, config, batch, settings = json.loads(key)
        slices = settings.get("mesh.slices", 1)
        mesh = f"slices {slices} x " * (slices > 1) + f"data {_chips(topology) // slices}"
        start = (f"| {topology} | {config} | {batch} | {mesh} | {settings['model.remat']} | "
                 f"{settings.get('accumulation', 1)} | ")
        if "error" in found:
            lines.append(f"{start}{found['error']} | | | | | | |")
            continue
        sent = sum(Collective(**fields).sent for fields in found["collectives"])
        fits = found["total"] <= found["memory"]
        lines.append(
            f"{start}{found['temporaries'] / GIB:.2f} | {found['total'] / GIB:.2f} | "
            f"{found['memory'] / GIB:.0f} | {'yes' if fits else 'no'} | "
            f"{f'{sent / GIB:.2f}' if fits else '-'} | "
            f"{found['step_flops'] / found['devices'] / 1e12:.1f} | "
            f"{found['seconds_to_compile']:.0f} |")
    rest = "fsdp 1, tensor 1, shared work, flash attention"
    text = "\n".join([*lines, "", f"All with {rest}. Compiled on {machine()}."])
    print(text, flush=True)
    Path(_OUTPUT.value).write_text(text + "\n")


if __name__ == "__main__":
    app.run(main)
