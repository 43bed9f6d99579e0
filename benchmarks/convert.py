"""The time and memory of converting and exporting a checkpoint, for every size.

    python -m benchmarks.convert --sizes=S,XL --output=DIR

It writes SiT checkpoints with random weights like PyTorch (`.pt`), and measures `dmf convert` and
`dmf export --format=safetensors` as separate processes, including their start. It prints a table
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
from absl import flags

from benchmarks.machine import machine, start

_SIZES = flags.DEFINE_list("sizes", ["S", "B", "L", "XL"], "sizes of the transformer, patch 2")
_OUTPUT = flags.DEFINE_string("output", "runs/convert", "directory of the files and the table")


def tensors(size: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields random weights with the names of SiT's PyTorch checkpoints."""
    from dmf.checkpoints.convert.name_tables import Constant
    from dmf.checkpoints.convert.tables.dit import pytorch_table
    from dmf.models.dit import SIZES, DiT

    network = DiT(input_size=32, channels=4, num_classes=1000, **SIZES[size])
    draw = np.random.default_rng(0)
    for name, entry in pytorch_table(network).items():
        yield name, (entry.value if isinstance(entry, Constant)
                     else draw.standard_normal(entry.shape, np.float32))


def write_pt(path: Path, size: str) -> None:
    """Writes a state dict in the zip format of PyTorch."""
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


def measure(*arguments: str) -> tuple[float, float]:
    """The seconds and the peak memory in GB of `dmf ARGUMENTS`."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, arguments)


def _measure(*arguments: str) -> tuple[float, float]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dmf", *arguments], check=False,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return time.perf_counter() - start, peak * 1024 / 1e9


def rows(folder: Path, size: str) -> Iterator[Mapping[str, str]]:
    """Yields the rows of a size: from `.pt`, to safetensors, and back."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source, export, exported, converted = (
        folder / name for name in ("sit.pt", "export", "exported", "converted")
    )
    write_pt(source, size)
    gigabytes = f"{source.stat().st_size / 1e9:.2f}"
    steps = {
        "convert .pt": ("convert", str(source), f"--output={export}"),
        "export safetensors": (
            "export", f"--checkpoint={export}", f"--output={exported}", "--format=safetensors"
        ),
        "convert safetensors": ("convert", str(exported), f"--output={converted}"),
    }
    for name, arguments in steps.items():
        seconds, peak = measure(*arguments)
        yield {"network": f"SiT-{size}/2", "file, GB": gigabytes, "command": name,
               "seconds": f"{seconds:.1f}", "peak memory, GB": f"{peak:.2f}"}
    shutil.rmtree(folder)


def main(_: Sequence[str]) -> None:
    """Measures all sizes, then prints and writes the table."""
    output = Path(_OUTPUT.value)
    measured = [row for size in _SIZES.value for row in rows(output / size, size)]
    lines = ["| " + " | ".join(measured[0]) + " |", "|---" * len(measured[0]) + "|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in measured]
    load = os.getloadavg()[0]
    text = "\n".join([*lines, "", f"On {machine()}; load {load:.1f} at the end."])
    (output / "convert.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    start(main)
