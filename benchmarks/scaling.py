"""Which settings fit full-size runs into TPU slices, compiled for slices that are not there.

    python -m benchmarks.scaling --output=benchmarks/results/scaling.md

Each config is compiled with ever more recomputation, then with ever more parts of a batch one after
the other, until it fits; and a few more, beside these. What was compiled is kept beside the table,
and not compiled again. Whether it fits is asked of `dmf.chips` whenever the table is written.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from benchmarks.machine import machine
from dmf.chips import CHIPS, GIB
from dmf.collectives import Collective

_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/scaling.md", "a .md file; .json beside")


class Case(NamedTuple):
    """One line of the table.

    Attributes:
      topology: as "v5e:4x4", or "2 x v5e:4x4" for several slices.
      config: name of the file.
      batch: samples a step.
      settings: of the config, by dotted name.
    """

    topology: str
    config: str
    batch: int
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """Under which it is kept."""
        return json.dumps(self)

    @property
    def slices(self) -> tuple[int, str]:
        """How many, and of what."""
        several, _, name = self.topology.rpartition(" x ")
        return int(several or 1), name

    @property
    def chips(self) -> int:
        """Of all slices together."""
        several, name = self.slices
        return several * math.prod(int(side) for side in name.partition(":")[2].split("x"))

    @property
    def mesh(self) -> str:
        """As the table names it."""
        slices = self.settings.get("mesh.slices", self.slices[0])
        return f"slices {slices} x " * (slices > 1) + f"data {self.chips // slices}"


TOPOLOGIES = {"v5e:4x4": "TPU v5 lite", "v6e:4x4": "TPU v6 lite", "v5p:2x2x1": "TPU v5",
              "v5e:16x16": "TPU v5 lite"}  # fmt: skip
CONFIGS = (("dmf_xl2_256", 256), ("dmf_xl2_256", 1024), ("dmf_xl2_512", 256))
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
BESIDE = (
    # 256 chips along one axis.
    Case("v5e:16x16", "dmf_xl2_256", 256, LADDER[0]),
    *(Case("v5e:16x16", "dmf_xl2_256", 1024, step) for step in LADDER[:4]),
    # Two slices that the hosts join.
    Case("2 x v5e:4x4", "dmf_xl2_256", 512, LADDER[1]),
)
# Memory that "none" takes of XL/2 for a sample of 256 tokens: where even this is too much, it is
# not compiled.
NONE_TAKES = 0.8 * GIB


def planned(known: dict[str, Any]) -> Iterator[Case]:
    """The lines of the table: of a ladder, up to the first step that is known to fit."""
    for topology, device in TOPOLOGIES.items():
        for config, batch in CONFIGS:
            for step in LADDER:
                case = Case(topology, config, batch, step | MESHES.get(topology, {}))
                if step["model.remat"] == "none" and _too_much(case, device):
                    continue
                yield case
                if fits(known.get(case.key, {})):
                    break
    yield from BESIDE


def fits(found: dict[str, Any]) -> bool:
    """Whether a chip has the memory for what was compiled."""
    return "total" in found and found["total"] <= CHIPS[found["device"]].memory


def _too_much(case: Case, device: str) -> bool:
    """Whether saving everything cannot fit."""
    tokens = 1024 if case.config.endswith("512") else 256
    return NONE_TAKES * case.batch / case.chips * tokens / 256 > CHIPS[device].memory


def compiled(case: Case) -> dict[str, Any]:
    """What `dmf compile` finds out, or why it cannot; and on what."""
    fields = {"data.batch_size": case.batch, **case.settings}
    output = Path(_OUTPUT.value).with_suffix(".partial")
    several, topology = case.slices
    command = [sys.executable, "-m", "dmf", "compile", f"--config=configs/{case.config}.py",
               f"--topology={topology}", f"--slices={several}", f"--output={output}",
               *(f"--config.{name}={value}" for name, value in fields.items())]  # fmt: skip
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if not output.exists():
        return {"error": ended.stderr.strip().splitlines()[-1], "machine": machine()}
    found = json.loads(output.read_text())
    output.unlink()
    return found | {"machine": machine()}


def line(case: Case, found: dict[str, Any]) -> str:
    """What was found out of a case, as a line of the table."""
    start = (f"| {case.topology} | {case.config} | {case.batch} | {case.mesh} | "
             f"{case.settings['model.remat']} | {case.settings.get('accumulation', 1)} | ")
    if "error" in found:
        return f"{start}{found['error']} | | | | | | | |"
    messages = [Collective(**fields) for fields in found["collectives"]]
    sent = [f"{sum(c.sent for c in part) / GIB:.2f}" if part and fits(found) else "-"
            for part in (messages, [c for c in messages if c.between_slices])]
    return (f"{start}{found['temporaries'] / GIB:.2f} | {found['total'] / GIB:.2f} | "
            f"{CHIPS[found['device']].memory / GIB:.2f} | {'yes' if fits(found) else 'no'} | "
            f"{sent[0]} | {sent[1]} | {found['step_flops'] / found['devices'] / 1e12:.1f} | "
            f"{found['seconds_to_compile']:.0f} |")


def _tell(known: dict[str, Any]) -> None:
    """Prints and writes the table of what is known."""
    lines = ["| slice | config | batch | mesh | remat | parts | temporaries GiB | total GiB | "
             "memory GiB | fits | sent GiB | between slices | TFLOP a chip | compiled in s |",
             "|" + "---|" * 14]
    told = [(case, known[case.key]) for case in planned(known) if case.key in known]
    lines += [line(case, found) for case, found in told]
    machines = "; ".join(dict.fromkeys(found["machine"] for _, found in told))
    rest = "fsdp 1, tensor 1, shared work, flash attention"
    text = "\n".join([*lines, "", f"All with {rest}. Compiled on {machines}."])
    print(text, flush=True)
    Path(_OUTPUT.value).write_text(text + "\n")


def main(_: Sequence[str]) -> None:
    """Compiles what was not compiled yet, and writes the table after each."""
    path = Path(_OUTPUT.value).with_suffix(".json")
    known = json.loads(path.read_text()) if path.exists() else {}
    _tell(known)
    for case in planned(known):
        if case.key not in known:
            known[case.key] = compiled(case)
            path.write_text(json.dumps(known, indent=1) + "\n")
            _tell(known)


if __name__ == "__main__":
    app.run(main)
