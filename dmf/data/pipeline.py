"""From rows to global batches. A batch is a pure function of (seed, step).

Grain shuffles anew each epoch; step s takes the rows s * batch_size and following of that endless
order, and each process reads only the rows that its own devices hold. The position of a run is
therefore its step, whatever the number of devices or processes.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from dmf.typing import Batch

AHEAD = 2


@runtime_checkable
class Source(Protocol):
    """Random-access rows, read several at a time."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Endless shuffled batches of a source.

    Attributes:
      source: `len` and `read(indices)`, giving x [n, h, w, c] float32 and y [n] int32.
      batch_size: rows of a global batch.
      seed: of the shuffle.
    """

    source: Source
    batch_size: int
    seed: int = 0

    def __post_init__(self):
        order = grain.MapDataset.range(len(self.source)).seed(self.seed).shuffle().repeat()
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
        """The batch of one step, split over the mesh as `sharding` says."""
        indices = sharding.addressable_devices_indices_map((self.batch_size,)).values()
        spans = {index[0].indices(self.batch_size)[:2] for index in indices}
        parts = {span: self._read(step, *span) for span in spans}

        def leaf(i: int) -> jax.Array:
            shape = next(iter(parts.values()))[i].shape[1:]

            def part(index: tuple[slice, ...]) -> np.ndarray:
                return parts[index[0].indices(self.batch_size)[:2]][i]

            return jax.make_array_from_callback((self.batch_size, *shape), sharding, part)

        return Batch(x=leaf(0), y=leaf(1))

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

    def _read(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        first = step * self.batch_size
        return self.source.read([int(self._order[first + i]) for i in range(start, stop)])
