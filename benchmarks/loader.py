"""How fast latents are read, and how long a training step waits for them.

    python -m benchmarks.loader --rows=8192 --output=DIR

Makes a dataset of random latents as `dmf prepare` writes it (4 x 32 x 32, with those of the mirror
image: 32 KiB a row), larger than what is kept in memory, and reads it through the training pipeline
in global batches on one device: as fast as it goes, and for a consumer that sleeps instead of
computing. Prints a table and writes it to OUTPUT/loader.md.
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
from absl import app, flags

from benchmarks.machine import machine

_ROWS = flags.DEFINE_integer("rows", 8192, "rows of the dataset", lower_bound=2100)
_BATCH = flags.DEFINE_integer("batch", 256, "rows of a batch")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "how long each measurement takes")
_RATE = flags.DEFINE_float("rate", 2000.0, "rows a second that the sleeping consumer takes")
_OUTPUT = flags.DEFINE_string("output", "runs/loader", "a directory for dataset and table")


class Blank:
    """Grey images of 1,000 classes."""

    def __init__(self, count: int):
        self.names = [str(i) for i in range(count)]
        self.labels = np.arange(count) % 1000
        self.class_names = [str(i) for i in range(1000)]

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> PIL.Image.Image:
        """One image, of the size of its latents."""
        return PIL.Image.new("RGB", (32, 32), (index % 256,) * 3)


def make(folder: Path, rows: int) -> None:
    """Writes the dataset, unless it is there: moments that do not compress, at no cost."""
    from dmf.encoders.autoencoder import Autoencoder
    from dmf.preparation import prepare
    from dmf.shards import Preparation

    if (folder / "dataset_info.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    draw = np.random.default_rng(0)

    class Random(Preparation):
        def encoder(self, params: Any) -> Callable[[np.ndarray], np.ndarray]:
            shape = (self.batch_size, *self.row_shape)
            return lambda pixels: draw.standard_normal(shape, np.float32).astype(np.float16)

    latents = Autoencoder(widths=(4,), groups=4)  # as large as the images
    made = Random(resolution=32, autoencoder=latents, batch_size=64)
    prepare(Blank(rows), folder, made)


def pipeline(folder: Path):
    """The pipeline that training reads the dataset with."""
    from dmf.data.pipeline import Pipeline
    from dmf.data.sources import open_source

    return Pipeline(source=open_source("latents", directory=str(folder)), batch_size=_BATCH.value)


def consumed(folder: Path, pause: float) -> tuple[float, float, float]:
    """Rows a second, rows a second of processor time, and the share of time spent waiting."""
    from dmf.sharding import batch_sharding, make_mesh

    batches = pipeline(folder).batches(0, batch_sharding(make_mesh(devices=jax.devices()[:1])))
    jax.block_until_ready(next(batches))
    start, processor, waited, steps = time.perf_counter(), time.process_time(), 0.0, 0
    while time.perf_counter() - start < _SECONDS.value:
        before = time.perf_counter()
        jax.block_until_ready(next(batches))
        waited += time.perf_counter() - before
        time.sleep(pause)
        steps += 1
    elapsed, worked = time.perf_counter() - start, time.process_time() - processor
    batches.close()
    rows = steps * _BATCH.value
    return rows / elapsed, rows / worked, waited / elapsed


def main(_: Sequence[str]) -> None:
    """Measures, then prints and writes the table."""
    output = Path(_OUTPUT.value)
    folder = output / "dataset"
    make(folder, _ROWS.value)
    size = sum(path.stat().st_size for path in folder.glob("*array_record*"))
    lines = ["| consumer | rows a second | rows a second and core | time waiting |",
             "|---|---|---|---|"]
    cases = {"as fast as it goes": 0.0,
             f"sleeps, {_RATE.value:.0f} rows a second": _BATCH.value / _RATE.value}
    for name, pause in cases.items():
        rate, per_core, waiting = consumed(folder, pause)
        lines.append(f"| {name} | {rate:,.0f} | {per_core:,.0f} | {waiting:.1%} |")
    text = "\n".join([*lines, "", (
        f"{_ROWS.value:,} rows, {size / 1e6:.0f} MB, batches of {_BATCH.value}, read from the "
        f"page cache. On {machine()}; load {os.getloadavg()[0]:.1f} at the end.")])
    (output / "loader.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    app.run(main)
