"""The time and memory of an evaluation: moments, distances, precision and recall, and Inception.

    python -m benchmarks.evaluation [--precision-recall] [--images=32]

It prints a table of seconds and of the increase of peak memory, and writes the table with
--output=FILE. Features are random and have the width of Inception's features. They are drawn part
by part, as an evaluation computes them.
"""

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks.machine import machine, start
from dmf.evaluation import metrics
from dmf.evaluation.feature_extractors import extractor
from dmf.evaluation.running_statistics import RunningMoments
from dmf.evaluation.statistics_collector import StatisticsCollector
from dmf.models.encoders.inception import Inception
from dmf.runtime.sharding import local_mesh

WIDTH = 2048

_COUNT = flags.DEFINE_integer("count", 50_000, "number of features of each of two sets")
_BATCH = flags.DEFINE_integer("batch", 1024, "number of features that are added at once")
_PRECISION_RECALL = flags.DEFINE_boolean("precision-recall", False,
                                         "also precision and recall against 10,000 features")
_IMAGES = flags.DEFINE_integer("images", 0, "images of 256 x 256 through Inception; 0: none")
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table")


def _peak() -> float:
    """The peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _timed(rows: list[str], name: str, function: Callable[[], object]) -> object:
    """Calls a function; adds a row with its time and its increase of the peak memory."""
    before, start = _peak(), time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    rows.append(f"| {name} | {seconds:.1f} | {_peak() - before:.0f} |")
    print(rows[-1], flush=True)
    return result


def _moments(seed: int) -> RunningMoments:
    """The moments of --count features, of which one batch is in memory at a time."""
    draw, running = np.random.default_rng(seed), RunningMoments()
    for first in range(0, _COUNT.value, _BATCH.value):
        size = min(_BATCH.value, _COUNT.value - first)
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
    collector = StatisticsCollector(
        extractor=extractor(kinds, inception=(network, params)), mesh=mesh,
        chunk_size=_IMAGES.value, part_size=_IMAGES.value,
    )  # fmt: skip
    images = draw.integers(0, 256, (_IMAGES.value, 256, 256, 3)).astype(np.uint8)
    _timed(rows, "compiling Inception", lambda: collector.features(images))
    _timed(rows, f"{_IMAGES.value} images of 256 x 256 through Inception",
           lambda: collector.features(images))


def main(_: Sequence[str]) -> None:
    """Measures, prints and writes the table."""
    rows = ["| computation | seconds | MiB added to the peak |", "|---|---|---|"]
    print("\n".join(rows), flush=True)
    count = f"{_COUNT.value:,}"
    pair = [_timed(rows, f"moments of {count} features of {WIDTH:,}", lambda s=s: _moments(s))
            for s in (0, 1)]
    _timed(rows, "their Frechet distance", lambda: metrics.frechet_distance(*pair))
    if _PRECISION_RECALL.value:
        _timed(rows, f"precision and recall of {count} against 10,000", _precision_recall)
    if _IMAGES.value:
        _inception(rows)
    note = f"The time of the moments includes drawing the features. On {machine()}."
    text = "\n".join([*rows, "", note])
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    start(main)
