r"""The time to compile a training step, and the memory of the program on each device.

    python -m benchmarks.compile_time             # XL/2 for this machine and for v5e-16
    python -m benchmarks.compile_time --topology=v5e:4x4 --scan=1 --remat=none,dots,full \
        --sharing=plain,shared

It compiles the step of Decoupled MeanFlow with model guidance in bfloat16, for 16 samples a device.
TPUs need libtpu but need not be attached. Ratios are relative to the plain step (without compute
sharing) with the same scan and remat. With --output=FILE.json results are stored, and the same
command does not compile them again.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks.machine import machine, start
from benchmarks.variants import HEAD, OBJECTIVES, Variant, config_of
from dmf.runtime.device_specs import GIB
from dmf.training import compile

_TOPOLOGY = flags.DEFINE_list("topology", ["here", "v5e:4x4"],
                              "TPU slices, GPUs as h100:8; here: this machine")
_SIZE = flags.DEFINE_string("size", "XL", "size of the transformer")
_OBJECTIVE = flags.DEFINE_enum("objective", OBJECTIVES[0], OBJECTIVES, "objective")
_BATCH = flags.DEFINE_integer("batch", 16, "samples per device")
_SCAN = flags.DEFINE_list("scan", ["1", "0"], "1: scanned blocks, 0: unrolled blocks")
_REMAT = flags.DEFINE_list("remat", ["dots"], "rematerialisation: none, dots, full")
_ATTENTION = flags.DEFINE_list("attention", ["auto"], "implementations of attention")
_SHARING = flags.DEFINE_list("sharing", ["shared"],
                             "plain, shared; sharedN: unconditional_microbatches=N")
_OUTPUT = flags.DEFINE_string("output", "", "a .json file; the table goes into a .md beside it")


def main(_: Sequence[str]) -> None:
    """Compiles, prints and writes the table."""
    path = Path(_OUTPUT.value) if _OUTPUT.value else None
    known = json.loads(path.read_text()) if path and path.exists() else {}
    cases = itertools.product(
        _TOPOLOGY.value, _SCAN.value, _REMAT.value, _ATTENTION.value, _SHARING.value)
    devices_of = {  # All of them first: a TPU without libtpu is told before minutes are spent.
        topology: jax.devices() if topology == "here" else compile.topology_devices(topology)
        for topology in _TOPOLOGY.value
    }
    for topology, scan, remat, attention, sharing in cases:
        devices = devices_of[topology]
        variant = Variant(_BATCH.value * len(devices), scan == "1", remat, attention, sharing)
        key = json.dumps([_SIZE.value, _OBJECTIVE.value, topology, *variant])
        if key not in known:
            config = config_of(variant, size=_SIZE.value, objective=_OBJECTIVE.value,
                               dtype="bfloat16")  # fmt: skip
            step = compile.compile_step(config, devices)
            known[key] = step._asdict() | {"jax": jax.__version__}
            print(topology, variant.cells, f"{step.temporaries / GIB:.2f} GiB, "
                  f"{step.seconds_to_compile:.0f} s", flush=True)
        if path:
            path.write_text(json.dumps(known, indent=1) + "\n")
    text = _table(known)
    print(text)
    if path:
        path.with_suffix(".md").write_text(text + "\n")


def _table(known: dict[str, dict[str, Any]]) -> str:
    lines = [f"| size | objective | topology {HEAD} temporaries GiB | to plain | total GiB | "
             "traced in s | compiled in s |", "|" + "---|" * 13]
    for key, step in known.items():
        size, objective, topology, *fields = json.loads(key)
        variant = Variant(*fields)
        plain = known.get(json.dumps([size, objective, topology, *variant.plain]))
        ratio = f"{step['temporaries'] / plain['temporaries']:.2f}" if plain else "-"
        lines.append(
            f"| {size}/2 | {objective} | {topology} {variant.cells} "
            f"{step['temporaries'] / GIB:.2f} | "
            f"{ratio} | {step['total'] / GIB:.2f} | {step['seconds_to_lower']:.0f} | "
            f"{step['seconds_to_compile']:.0f} |")
    return "\n".join([*lines, "", f"bfloat16, latents of 32 x 32 x 4. Compiled on {machine()}."])


if __name__ == "__main__":
    start(main)
