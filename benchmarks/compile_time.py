r"""How long a training step takes to compile, and what memory the program takes of each device.

    python -m benchmarks.compile_time             # XL/2 for this machine and for v5e-16
    python -m benchmarks.compile_time --on=v5e:4x4 --scan=1 --remat=none,dots,full \
        --work=plain,shared

The step of Decoupled MeanFlow with model guidance at 16 samples a chip, bfloat16. TPUs need not be
there (libtpu does). Ratios are to plain work under the same scan and remat. With --output=FILE.json
what was compiled is kept, and not compiled again by the same command.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from benchmarks.machine import machine
from benchmarks.variants import HEAD, OBJECTIVES, Variant, config_of
from dmf import compiling
from dmf.chips import GIB

_ON = flags.DEFINE_list("on", ["here", "v5e:4x4"], "TPU slices; here is this machine")
_SIZE = flags.DEFINE_string("size", "XL", "of the transformer")
_OBJECTIVE = flags.DEFINE_enum("objective", OBJECTIVES[0], OBJECTIVES, "what is minimised")
_BATCH = flags.DEFINE_integer("batch", 16, "samples a device")
_SCAN = flags.DEFINE_list("scan", ["1", "0"], "1 is scanned, 0 unrolled")
_REMAT = flags.DEFINE_list("remat", ["dots"], "none, dots, full")
_ATTENTION = flags.DEFINE_list("attention", ["auto"], "implementations of attention")
_WORK = flags.DEFINE_list("work", ["shared"], "plain, shared; sharedN: null_parts=N")
_OUTPUT = flags.DEFINE_string("output", "", "a .json file; the table goes into a .md beside it")


def main(_: Sequence[str]) -> None:
    """Compiles, prints and writes the table."""
    path = Path(_OUTPUT.value) if _OUTPUT.value else None
    known = json.loads(path.read_text()) if path and path.exists() else {}
    cases = itertools.product(
        _ON.value, _SCAN.value, _REMAT.value, _ATTENTION.value, _WORK.value)
    for on, scan, remat, attention, work in cases:
        devices = jax.devices() if on == "here" else compiling.topology_devices(on)
        variant = Variant(_BATCH.value * len(devices), scan == "1", remat, attention, work)
        key = json.dumps([_SIZE.value, _OBJECTIVE.value, on, *variant])
        if key not in known:
            config = config_of(variant, size=_SIZE.value, objective=_OBJECTIVE.value,
                               dtype="bfloat16")  # fmt: skip
            found = compiling.compile_step(config, devices)
            known[key] = found._asdict() | {"jax": jax.__version__}
            print(on, variant.cells, f"{found.temporaries / GIB:.2f} GiB, "
                  f"{found.seconds_to_compile:.0f} s", flush=True)
        if path:
            path.write_text(json.dumps(known, indent=1) + "\n")
    text = _table(known)
    print(text)
    if path:
        path.with_suffix(".md").write_text(text + "\n")


def _table(known: dict[str, dict[str, Any]]) -> str:
    lines = [f"| size | objective | on {HEAD} temporaries GiB | to plain | total GiB | "
             "traced in s | compiled in s |", "|" + "---|" * 13]
    for key, found in known.items():
        size, objective, on, *fields = json.loads(key)
        variant = Variant(*fields)
        plain = known.get(json.dumps([size, objective, on, *variant.plain]))
        ratio = f"{found['temporaries'] / plain['temporaries']:.2f}" if plain else "-"
        lines.append(
            f"| {size}/2 | {objective} | {on} {variant.cells} {found['temporaries'] / GIB:.2f} | "
            f"{ratio} | {found['total'] / GIB:.2f} | {found['seconds_to_lower']:.0f} | "
            f"{found['seconds_to_compile']:.0f} |")
    return "\n".join([*lines, "", f"bfloat16, latents of 32 x 32 x 4. Compiled on {machine()}."])


if __name__ == "__main__":
    app.run(main)
