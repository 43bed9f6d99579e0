"""The throughput of the data loader, of one process and of several, and how long a step waits.

    python -m benchmarks.loader --rows=8192 --processes=1,2,4 --output=DIR

It writes a dataset of random latents like `dmf prepare` (4 x 32 x 32, with those of the mirror
image: 32 KiB per row), larger than the cache of the dataset, and reads it through the data loader
in global batches: on one device, as fast as possible and for a consumer that sleeps instead of
computing; and by several processes at once, each its own part of every batch, as the hosts of a run
do. The processes share the cores of this machine, so that what tells of hosts is rows per second of
CPU time. It also decodes PNG images of 256 x 256, as alignment to stored images does. The tables
are printed and written to OUTPUT/loader.md.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image
from absl import flags
from jax.sharding import Mesh

from benchmarks.machine import machine, start

_ROWS = flags.DEFINE_integer("rows", 8192, "number of rows of the dataset", lower_bound=2100)
_BATCH = flags.DEFINE_integer("batch", 256, "global batch size")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "seconds of each measurement")
_RATE = flags.DEFINE_float("rate", 2000.0, "rows per second that the sleeping consumer takes")
_PROCESSES = flags.DEFINE_list("processes", ["1", "2", "4"], "numbers of processes that read at "
                               "once; each divides the batch size")  # fmt: skip
_OUTPUT = flags.DEFINE_string("output", "runs/loader", "directory of the dataset and the table")
# Of the processes that this benchmark starts.
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of the first process")
_PROCESS = flags.DEFINE_integer("process", 0, "number of this process")
_OF = flags.DEFINE_integer("of", 1, "number of processes")


class GreyImages:
    """Raw images without content, of 1,000 classes; see `dmf.data.raw_images.RawImages`."""

    source, left_out = "grey images", {}

    def __init__(self, count: int):
        self.names = [str(i) for i in range(count)]
        self.labels = np.arange(count) % 1000
        self.class_names = [str(i) for i in range(1000)]

    def __len__(self) -> int:
        return len(self.names)

    def file_size(self, index: int) -> int:
        """No file is read."""
        return 0

    def open(self, index: int) -> PIL.Image.Image:
        """An image of the size of its latents."""
        return PIL.Image.new("RGB", (32, 32), (index % 256,) * 3)


def write_dataset(folder: Path, rows: int) -> None:
    """Writes the dataset, unless it exists: random moments, which do not compress."""
    from dmf.data.prepare import prepare
    from dmf.data.shard_writer import PrepareSettings
    from dmf.models.encoders.autoencoder_kl import AutoencoderKL

    if (folder / "dataset_info.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    draw = np.random.default_rng(0)

    class RandomMoments(PrepareSettings):
        def encoder(self, params: Any) -> Callable[[np.ndarray], np.ndarray]:
            shape = (self.batch_size, *self.stored_shape)
            return lambda pixels: draw.standard_normal(shape, np.float32).astype(np.float16)

    autoencoder = AutoencoderKL(widths=(4,), groups=4)  # latents as large as the images
    settings = RandomMoments(resolution=32, autoencoder=autoencoder, batch_size=64)
    prepare(GreyImages(rows), folder, settings, autoencoder_params={})


def data_loader(folder: Path):
    """The data loader with which training reads the dataset."""
    from dmf.data.data_loader import DataLoader
    from dmf.data.datasets import open_dataset

    return DataLoader(
        dataset=open_dataset("latents", directory=str(folder)), batch_size=_BATCH.value
    )


class Throughput(NamedTuple):
    """What one process read.

    Attributes:
      rows: number of rows of this process in each batch.
      batches: number of batches.
      seconds: wall-clock time.
      cpu_seconds: CPU time of all threads.
      waited: seconds spent waiting for a batch.
    """

    rows: int
    batches: int
    seconds: float
    cpu_seconds: float
    waited: float

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows * self.batches / self.seconds

    @property
    def rate_per_core(self) -> float:
        """Rows per second of CPU time."""
        return self.rows * self.batches / self.cpu_seconds


def throughput(folder: Path, mesh: Mesh, pause: float = 0.0) -> Throughput:
    """Reads this process's part of each batch.

    Args:
      folder: directory of the dataset.
      mesh: the devices of all processes.
      pause: seconds that the consumer sleeps after each batch.
    """
    from dmf.runtime import processes
    from dmf.runtime.sharding import batch_sharding

    loader, sharding = data_loader(folder), batch_sharding(mesh)
    batches = loader.batches(0, sharding)
    jax.block_until_ready(next(batches))
    processes.barrier("the first batch is read")
    start, cpu_start, waited, count = time.perf_counter(), time.process_time(), 0.0, 0
    while time.perf_counter() - start < _SECONDS.value:
        before = time.perf_counter()
        jax.block_until_ready(next(batches))
        waited += time.perf_counter() - before
        time.sleep(pause)
        count += 1
    elapsed, busy = time.perf_counter() - start, time.process_time() - cpu_start
    batches.close()
    rows = sum(stop - start for start, stop in loader.spans(sharding))
    return Throughput(rows, count, elapsed, busy, waited)


def one_of_several(folder: Path) -> None:
    """Reads as one of several processes, and prints what it read."""
    from dmf.runtime import processes
    from dmf.runtime.sharding import make_mesh

    processes.initialize(_COORDINATOR.value, _OF.value, _PROCESS.value)
    print(json.dumps(throughput(folder, make_mesh())))


def several(folder: Path, count: int) -> list[Throughput]:
    """What each of several processes reads, all at once."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.loader", f"--output={folder.parent}",
               f"--batch={_BATCH.value}", f"--seconds={_SECONDS.value}", f"--of={count}",
               f"--coordinator=localhost:{port}"]
    started = [
        subprocess.Popen([*command, f"--process={i}"], stdout=subprocess.PIPE, text=True,
                         env=os.environ | {"JAX_PLATFORMS": "cpu"})
        for i in range(count)
    ]  # fmt: skip
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed, see above")
    return [Throughput(*json.loads(text.splitlines()[-1])) for text in printed]  # Gloo prints, too


def decoding_rate() -> tuple[float, float]:
    """Images of 256 x 256 that a core decodes per second, and the KB of the PNG file of one."""
    from dmf.data.tfds_records import StoredFeature, tf_example_pb2

    draw = np.random.default_rng(0)
    coarse = PIL.Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8))
    smooth = np.asarray(coarse.resize((256, 256), PIL.Image.Resampling.BICUBIC), np.int32)
    noisy = np.clip(smooth + draw.integers(-4, 5, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noisy).save(file, "PNG")
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(file.getvalue())
    feature = StoredFeature("image", noisy.shape, noisy.dtype, is_encoded=True)
    start, count = time.process_time(), 0
    while time.process_time() - start < min(2.0, _SECONDS.value):
        feature.parse(example.features.feature)
        count += 1
    return count / (time.process_time() - start), len(file.getvalue()) / 1e3


def main(_: Sequence[str]) -> None:
    """Measures, then prints and writes the tables."""
    from dmf.runtime.sharding import make_mesh

    output = Path(_OUTPUT.value)
    folder = output / "dataset"
    if _COORDINATOR.value:
        one_of_several(folder)
        return
    write_dataset(folder, _ROWS.value)
    size = sum(path.stat().st_size for path in folder.glob("*array_record*"))
    lines = ["| consumer | rows per second | rows per second and core | time waiting |",
             "|---|---|---|---|"]
    cases = {"as fast as possible": 0.0,
             f"sleeps, {_RATE.value:.0f} rows per second": _BATCH.value / _RATE.value}
    for name, pause in cases.items():
        read = throughput(folder, make_mesh(devices=jax.devices()[:1]), pause)
        lines.append(f"| {name} | {read.rate:,.0f} | {read.rate_per_core:,.0f} | "
                     f"{read.waited / read.seconds:.1%} |")
    lines += ["", *_table_of_processes(folder), ""]
    decoded, kilobytes = decoding_rate()
    lines.append(
        f"{_ROWS.value:,} rows, {size / 1e6:.0f} MB, batches of {_BATCH.value}, read from the page "
        f"cache. A core decodes {decoded:,.0f} PNG images of 256 x 256 per second ({kilobytes:.0f} "
        f"KB each). On {machine()}; load {os.getloadavg()[0]:.1f} at the end.")
    (output / "loader.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _table_of_processes(folder: Path) -> list[str]:
    """A row for each number of processes that read at once."""
    lines = ["| processes | rows of a batch, each | rows per second, each | all | "
             "rows per second and core, each | relative to one process |",
             "|---|---|---|---|---|---|"]
    alone = None
    for count in map(int, _PROCESSES.value):
        read = several(folder, count)
        per_core = float(np.mean([each.rate_per_core for each in read]))
        alone = alone or per_core
        rows = ", ".join(sorted({str(each.rows) for each in read}))
        rates = [each.rate for each in read]
        lines.append(f"| {count} | {rows} | {np.mean(rates):,.0f} | {sum(rates):,.0f} | "
                     f"{per_core:,.0f} | {per_core / alone:.2f} |")
    return lines


if __name__ == "__main__":
    start(main)
