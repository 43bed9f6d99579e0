"""What measuring costs: 50,000 features, their distance, precision and recall; and features.

    python -m benchmarks.evaluation [--precision_recall] [--images=32]

Prints a table of seconds and of peak memory above what the process had before, and writes it with
--output=FILE. Features are random, of the width of Inception's, made part by part as a survey does.
"""

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from benchmarks.machine import machine
from dmf import metrics
from dmf.encoders.inception import Inception
from dmf.features import extractor
from dmf.sharding import local_mesh
from dmf.surveys import Surveyor

WIDTH = 2048

_COUNT = flags.DEFINE_integer("count", 50_000, "features of each of two sets")
_AT_ONCE = flags.DEFINE_integer("at_once", 1024, "features that are added at once")
_PRECISION_RECALL = flags.DEFINE_boolean("precision_recall", False, "that too, with 10,000 others")
_IMAGES = flags.DEFINE_integer("images", 0, "images of 256 x 256 through Inception; 0 is none")
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table")


def _peak() -> float:
    """The most memory that this process had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _timed(rows: list[str], what: str, work: Callable[[], object]) -> object:
    """Does some work; adds a row with its time, and how far it raised the peak of memory."""
    before, start = _peak(), time.perf_counter()
    result = work()
    took = time.perf_counter() - start
    rows.append(f"| {what} | {took:.1f} | {_peak() - before:.0f} |")
    print(rows[-1], flush=True)
    return result


def _moments(seed: int) -> metrics.RunningMoments:
    """Of as many features as --count says, which are never there all at once."""
    draw, running = np.random.default_rng(seed), metrics.RunningMoments()
    for start in range(0, _COUNT.value, _AT_ONCE.value):
        size = min(_AT_ONCE.value, _COUNT.value - start)
        running.add(draw.standard_normal((size, WIDTH), np.float32) * 0.5 + 0.4 + seed * 0.01)
    return running


def _precision_recall() -> tuple[float, float]:
    draw = np.random.default_rng(0)
    sets = [draw.standard_normal((n, WIDTH), np.float32) for n in (10_000, _COUNT.value)]
    return metrics.precision_recall(*sets)


def _inception(rows: list[str]) -> None:
    network, mesh = Inception(), local_mesh()
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(0, 0.05, leaf.shape).astype("f"), shapes)
    kinds = ("pool3", "spatial", "probabilities")
    surveyor = Surveyor(extractor=extractor(kinds, inception=(network, params)), on=mesh,
                        chunk_size=_IMAGES.value, part_size=_IMAGES.value)  # fmt: skip
    images = draw.integers(0, 256, (_IMAGES.value, 256, 256, 3)).astype(np.uint8)
    _timed(rows, "compiling Inception", lambda: surveyor.features(images))
    _timed(rows, f"{_IMAGES.value} images of 256 x 256 through Inception",
           lambda: surveyor.features(images))


def main(_: Sequence[str]) -> None:
    """Measures, prints and writes the table."""
    rows = ["| what | seconds | MiB above before |", "|---|---|---|"]
    print("\n".join(rows), flush=True)
    count = f"{_COUNT.value:,}"
    pair = [_timed(rows, f"moments of {count} features of {WIDTH:,}", lambda s=s: _moments(s))
            for s in (0, 1)]
    _timed(rows, "their Frechet distance", lambda: metrics.frechet_distance(*pair))
    if _PRECISION_RECALL.value:
        _timed(rows, f"precision and recall of {count} against 10,000", _precision_recall)
    if _IMAGES.value:
        _inception(rows)
    text = "\n".join([*rows, "", f"Drawing the features is part of their time. On {machine()}."])
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    app.run(main)
