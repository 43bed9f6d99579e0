"""From a dataset to global batches. A batch is a pure function of (seed, step).

Grain shuffles each epoch anew. Step s takes the batch_size samples of that endless order that start
at s * batch_size, and each process reads only the samples of its own devices. The position of a run
is therefore its step, whatever the number of devices or processes.
"""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from dmf.data.datasets import Dataset, Rows, check_labels
from dmf.runtime.checksums import fingerprint
from dmf.types import Batch

PREFETCH = 2
# Number of samples whose bytes tell a dataset from another.
_COMPARED = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataLoader:
    """Endless shuffled batches of a dataset.

    >>> from dmf.data.datasets import open_dataset
    >>> from dmf.runtime.sharding import batch_sharding, make_mesh
    >>> loader = DataLoader(dataset=open_dataset("digits"), batch_size=16, seed=0)
    >>> batch = loader.batch(0, batch_sharding(make_mesh(devices=jax.devices()[:1])))
    >>> batch.x.shape, batch.y.shape
    ((16, 8, 8, 1), (16,))

    Attributes:
      dataset: the dataset.
      batch_size: global batch size, over all devices of all processes.
      seed: random seed of the shuffle.
      weights: how often each part of a `ConcatenatedDataset` is drawn from, relative to the others;
        () for any other dataset, or to draw each sample once an epoch.
    """

    dataset: Dataset
    batch_size: int
    seed: int = 0
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        lengths = self.dataset.lengths if self.weights else (len(self.dataset),)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        orders = [
            grain.MapDataset.range(start, start + length).seed(self.seed + i).shuffle().repeat()
            for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ]
        order = grain.MapDataset.mix(orders, self.weights) if self.weights else orders[0]
        object.__setattr__(self, "_order", order)

    def position(self, step: int) -> dict[str, int]:
        """Where a run stands before a step.

        Returns:
          "step", "rows" (number of samples read before the step), "epoch" (number of whole epochs),
          and what determines the samples: "seed", "dataset_rows" (length of the dataset) and
          "dataset" (a hash of a few of its samples).
        """
        rows = step * self.batch_size
        return {
            "step": step,
            "rows": rows,
            "epoch": rows // len(self.dataset),
            "seed": self.seed,
            "dataset_rows": len(self.dataset),
            "dataset": self.dataset_fingerprint,
        }

    @functools.cached_property
    def dataset_fingerprint(self) -> str:
        """A short hash of a few samples, which are spread evenly over the dataset."""
        last = len(self.dataset) - 1
        indices = np.unique(np.linspace(0, last, _COMPARED).astype(int)).tolist()
        return fingerprint(self.dataset.read(indices))

    def batch(self, step: int, sharding: NamedSharding) -> Batch:
        """The global batch of a step, as the dataset stores its samples.

        `dmf.data.batch_transform` makes inputs of the network of it, on the device.

        Args:
          step: training step, from 0.
          sharding: sharding of the batch axis over the mesh.

        Returns:
          A batch whose fields are those that `Dataset.read` returns, [batch_size, ...].
        """
        spans = sorted(self.spans(sharding))
        rows, first, places = self._read(step, spans), 0, {}
        for start, stop in spans:
            places[start, stop] = slice(first, first + stop - start)
            first += stop - start

        def leaf(values: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                return values[places[index[0].indices(self.batch_size)[:2]]]

            shape = (self.batch_size, *values.shape[1:])
            return jax.make_array_from_callback(shape, sharding, part)

        return Batch(**{key: leaf(values) for key, values in rows.items()})

    def abstract_batch(self, sharding: NamedSharding) -> Batch:
        """The shapes, dtypes and sharding of a global batch, from one sample of the dataset."""
        return Batch(**{
            key: jax.ShapeDtypeStruct(
                (self.batch_size, *values.shape[1:]),
                jax.dtypes.canonicalize_dtype(values.dtype),
                sharding=sharding,
            )
            for key, values in self.dataset.read([0]).items()
        })

    def spans(self, sharding: NamedSharding) -> set[tuple[int, int]]:
        """The spans (start, stop) of a global batch that the devices of this process hold."""
        indices = sharding.addressable_devices_indices_map((self.batch_size,)).values()
        return {index[0].indices(self.batch_size)[:2] for index in indices}

    def batches(self, start: int, sharding: NamedSharding) -> "Batches":
        """The batches of steps start, start + 1, ..., which a thread reads ahead."""
        return Batches(self, start, sharding)

    def index(self, position: int) -> int:
        """The index in the dataset of the sample at a position of the endless order."""
        return int(self._order[position])

    def _read(self, step: int, spans: Sequence[tuple[int, int]]) -> Rows:
        """The samples of some spans of a batch, in one read, which the dataset divides among
        its threads."""
        first = step * self.batch_size
        rows = self.dataset.read([self.index(first + i) for span in spans for i in range(*span)])
        check_labels(rows["y"], self.dataset)
        return rows


class Batches:
    """An endless iterator over the batches of a data loader.

    A thread reads `PREFETCH` batches ahead, decodes them and sends them to the devices.
    """

    def __init__(self, loader: DataLoader, start: int, sharding: NamedSharding):
        """Starts to read.

        Args:
          loader: the data loader.
          start: step of the first batch.
          sharding: sharding of the batch axis over the mesh.
        """
        self._read = functools.partial(loader.batch, sharding=sharding)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "data")
        self._ahead = collections.deque(
            self._pool.submit(self._read, start + i) for i in range(PREFETCH)
        )
        self._step = start + PREFETCH

    def __iter__(self) -> Iterator[Batch]:
        return self

    def is_ready(self) -> bool:
        """Whether the next batch is read, so that nobody waits for it."""
        return self._ahead[0].done()

    def __next__(self) -> Batch:
        ready = self._ahead.popleft().result()
        self._ahead.append(self._pool.submit(self._read, self._step))
        self._step += 1
        return ready

    def close(self) -> None:
        """Ends the thread; what it has not begun to read is not read."""
        self._pool.shutdown(cancel_futures=True)
