"""The throughput of the data loader, and how long a training step waits for a batch.

    python -m benchmarks.loader --rows=8192 --output=DIR

It writes a dataset of random latents like `dmf prepare` (4 x 32 x 32, with those of the mirror
image: 32 KiB per row), larger than the cache of the dataset, and reads it through the data loader
in global batches on one device: as fast as possible, and for a consumer that sleeps instead of
computing. It prints a table and writes it to OUTPUT/loader.md.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
from absl import flags

from benchmarks.machine import machine, start

_ROWS = flags.DEFINE_integer("rows", 8192, "number of rows of the dataset", lower_bound=2100)
_BATCH = flags.DEFINE_integer("batch", 256, "batch size")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "seconds of each measurement")
_RATE = flags.DEFINE_float("rate", 2000.0, "rows per second that the sleeping consumer takes")
_OUTPUT = flags.DEFINE_string("output", "runs/loader", "directory of the dataset and the table")


class GreyImages:
    """Raw images without content, of 1,000 classes."""

    def __init__(self, count: int):
        self.names = [str(i) for i in range(count)]
        self.labels = np.arange(count) % 1000
        self.class_names = [str(i) for i in range(1000)]

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> PIL.Image.Image:
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
    prepare(GreyImages(rows), folder, settings)


def data_loader(folder: Path):
    """The data loader with which training reads the dataset."""
    from dmf.data.data_loader import DataLoader
    from dmf.data.datasets import open_dataset

    return DataLoader(
        dataset=open_dataset("latents", directory=str(folder)), batch_size=_BATCH.value
    )


def throughput(folder: Path, pause: float) -> tuple[float, float, float]:
    """Rows per second, rows per second of CPU time, and the share of time spent waiting.

    Args:
      folder: directory of the dataset.
      pause: seconds that the consumer sleeps after each batch.
    """
    from dmf.runtime.sharding import batch_sharding, make_mesh

    batches = data_loader(folder).batches(0, batch_sharding(make_mesh(devices=jax.devices()[:1])))
    jax.block_until_ready(next(batches))
    start, cpu_start, waited, steps = time.perf_counter(), time.process_time(), 0.0, 0
    while time.perf_counter() - start < _SECONDS.value:
        before = time.perf_counter()
        jax.block_until_ready(next(batches))
        waited += time.perf_counter() - before
        time.sleep(pause)
        steps += 1
    elapsed, busy = time.perf_counter() - start, time.process_time() - cpu_start
    batches.close()
    rows = steps * _BATCH.value
    return rows / elapsed, rows / busy, waited / elapsed


def main(_: Sequence[str]) -> None:
    """Measures, then prints and writes the table."""
    output = Path(_OUTPUT.value)
    folder = output / "dataset"
    write_dataset(folder, _ROWS.value)
    size = sum(path.stat().st_size for path in folder.glob("*array_record*"))
    lines = ["| consumer | rows per second | rows per second and core | time waiting |",
             "|---|---|---|---|"]
    cases = {"as fast as possible": 0.0,
             f"sleeps, {_RATE.value:.0f} rows per second": _BATCH.value / _RATE.value}
    for name, pause in cases.items():
        rate, per_core, waiting = throughput(folder, pause)
        lines.append(f"| {name} | {rate:,.0f} | {per_core:,.0f} | {waiting:.1%} |")
    text = "\n".join([*lines, "", (
        f"{_ROWS.value:,} rows, {size / 1e6:.0f} MB, batches of {_BATCH.value}, read from the "
        f"page cache. On {machine()}; load {os.getloadavg()[0]:.1f} at the end.")])
    (output / "loader.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    start(main)
