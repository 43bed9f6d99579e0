"""From rows to global batches. A batch is a pure function of (seed, step).

Grain shuffles anew each epoch; step s takes the rows s * batch_size and following of that endless
order, and each process reads only the rows that its own devices hold. The position of a run is
therefore its step, whatever the number of devices or processes.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterator

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from dmf.data.sources import Source
from dmf.typing import Batch

AHEAD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Endless shuffled batches of a source.

    Attributes:
      source: of rows.
      batch_size: rows of a global batch.
      seed: of the shuffle.
      weights: of the parts of a `JoinedSource`, how often each is drawn from; none for another.
      beside: which field of a batch the source reads along with its rows: "images", "features", or
        none.
    """

    source: Source
    batch_size: int
    seed: int = 0
    weights: tuple[float, ...] = ()
    beside: str = ""

    def __post_init__(self):
        lengths = self.source.lengths if self.weights else (len(self.source),)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        orders = [
            grain.MapDataset.range(start, start + length).seed(self.seed + i).shuffle().repeat()
            for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ]
        order = grain.MapDataset.mix(orders, self.weights) if self.weights else orders[0]
        object.__setattr__(self, "_order", order)

    def position(self, step: int) -> dict[str, int]:
        """Where a run stands before `step`: rows seen, whole epochs, and what determines order."""
        rows = step * self.batch_size
        return {
            "step": step,
            "rows": rows,
            "epoch": rows // len(self.source),
            "seed": self.seed,
            "dataset_rows": len(self.source),
        }

    def batch(self, step: int, sharding: NamedSharding) -> Batch:
        """The batch of one step, split over the mesh as `sharding` says.

        Its fields hold rows: `dmf.data.samples` makes samples of them, on the device.
        """
        parts = {span: self._read(step, *span) for span in self.spans(sharding)}

        def leaf(i: int) -> jax.Array:
            shape = next(iter(parts.values()))[i].shape[1:]

            def part(index: tuple[slice, ...]) -> np.ndarray:
                return parts[index[0].indices(self.batch_size)[:2]][i]

            return jax.make_array_from_callback((self.batch_size, *shape), sharding, part)

        more = {self.beside: leaf(2)} if self.beside else {}
        return Batch(x=leaf(0), y=leaf(1), **more)

    def spans(self, sharding: NamedSharding) -> set[tuple[int, int]]:
        """Which rows (start, stop) of a batch this process reads for its devices."""
        indices = sharding.addressable_devices_indices_map((self.batch_size,)).values()
        return {index[0].indices(self.batch_size)[:2] for index in indices}

    def batches(self, start: int, sharding: NamedSharding) -> Iterator[Batch]:
        """The batches of steps start, start + 1, ..., read ahead in a thread."""
        with concurrent.futures.ThreadPoolExecutor(1, "data") as pool:
            ahead = collections.deque(
                pool.submit(self.batch, start + i, sharding) for i in range(AHEAD)
            )
            step = start + AHEAD
            while True:
                ready = ahead.popleft().result()
                ahead.append(pool.submit(self.batch, step, sharding))
                step += 1
                yield ready

    def index(self, place: int) -> int:
        """Which row of the source stands at a place of the endless order."""
        return int(self._order[place])

    def _read(self, step: int, start: int, stop: int) -> tuple[np.ndarray, ...]:
        first = step * self.batch_size
        return self.source.read([self.index(first + i) for i in range(start, stop)])
