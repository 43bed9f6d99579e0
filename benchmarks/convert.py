"""Seconds and memory of bringing a checkpoint in and taking it out, for every size.

    python -m benchmarks.convert --sizes=S,XL --output=DIR

Makes SiT checkpoints of random weights as PyTorch writes them (`.pt`), and measures `dmf convert`
and `dmf export --format=safetensors` as processes of their own, start-up included. Prints a table
and writes it to OUTPUT/convert.md.
"""

import io
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.machine import machine

_SIZES = flags.DEFINE_list("sizes", ["S", "B", "L", "XL"], "sizes of the transformer, patch 2")
_OUTPUT = flags.DEFINE_string("output", "runs/convert", "a directory for files and table")


def tensors(size: str) -> Iterator[tuple[str, np.ndarray]]:
    """Random weights under the names of SiT's PyTorch checkpoints, one at a time."""
    from dmf.convert.dit import pytorch_table
    from dmf.convert.names import Unkept
    from dmf.models.dit import SIZES, DiT

    network = DiT(input_size=32, channels=4, num_classes=1000, **SIZES[size])
    draw = np.random.default_rng(0)
    for name, entry in pytorch_table(network).items():
        yield name, (entry.value if isinstance(entry, Unkept)
                     else draw.standard_normal(entry.shape, np.float32))


def write_pt(path: Path, size: str) -> None:
    """Writes a state dict in the zip form of PyTorch."""
    pickled = io.BytesIO()
    put = pickled.write
    put(b"\x80\x02ccollections\nOrderedDict\n)R(")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for key, (name, values) in enumerate(tensors(size)):
            file.writestr(f"archive/data/{key}", values.tobytes())
            put(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((")
            put(_text("storage") + b"ctorch\nFloatStorage\n" + _text(str(key)) + _text("cpu"))
            put(_number(values.size) + b"tQ" + _number(0))
            put(_numbers(values.shape))
            put(_numbers([stride // values.itemsize for stride in values.strides]))
            put(b"\x89ccollections\nOrderedDict\n)RtR")
        put(b"u.")
        file.writestr("archive/data.pkl", pickled.getvalue())
        file.writestr("archive/version", "3\n")


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _number(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _numbers(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"


def measured(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in GB of `dmf ARGUMENTS`."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, arguments)


def _measured(*arguments: str) -> tuple[float, float]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dmf", *arguments], check=False,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return time.perf_counter() - start, peak * 1024 / 1e9


def rows(folder: Path, size: str) -> Iterator[Mapping[str, str]]:
    """One size: in from `.pt`, out to safetensors, in from there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source, export, out, again = (folder / n for n in ("sit.pt", "export", "out", "again"))
    write_pt(source, size)
    gigabytes = f"{source.stat().st_size / 1e9:.2f}"
    steps = {
        "convert .pt": ("convert", str(source), f"--output={export}"),
        "export safetensors": (
            "export", f"--checkpoint={export}", f"--output={out}", "--format=safetensors"
        ),
        "convert safetensors": ("convert", str(out), f"--output={again}"),
    }
    for name, arguments in steps.items():
        seconds, peak = measured(*arguments)
        yield {"network": f"SiT-{size}/2", "file, GB": gigabytes, "command": name,
               "seconds": f"{seconds:.1f}", "peak memory, GB": f"{peak:.2f}"}
    shutil.rmtree(folder)


def main(_: Sequence[str]) -> None:
    """Measures all sizes, then prints and writes the table."""
    output = Path(_OUTPUT.value)
    found = [row for size in _SIZES.value for row in rows(output / size, size)]
    lines = ["| " + " | ".join(found[0]) + " |", "|---" * len(found[0]) + "|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in found]
    load = os.getloadavg()[0]
    text = "\n".join([*lines, "", f"On {machine()}; load {load:.1f} at the end."])
    (output / "convert.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    app.run(main)
