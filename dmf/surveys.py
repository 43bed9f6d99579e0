"""Statistics of a set of images, taken part by part over the devices of this process.

Images go through the devices in chunks of a fixed size, one a device at a time, and parts are whole
chunks; so neither images nor statistics depend on the number of devices. A part that is finished is
a file: the same survey goes on where it was interrupted, and processes share the parts.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from dmf import hosts, logs
from dmf.features import Extractor
from dmf.files import write_json
from dmf.generation import Generated, chunks
from dmf.hosts import wait_for_all
from dmf.sharding import by_device, on_this_host
from dmf.statistics import Statistics, read_statistics
from dmf.typing import InputError, RunError

ImagesOf = Callable[[Int[np.ndarray, "n"]], Generated]
Features = dict[str, np.ndarray]
Round = tuple[np.ndarray, np.ndarray, Features]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Surveyor:
    """Takes statistics.

    Attributes:
      extractor: of the features.
      on: a mesh of devices of this process.
      chunk_size: images that a device sees at a time; another size may round otherwise.
      part_size: images between two files, rounded up to whole chunks.
    """

    extractor: Extractor
    on: Mesh
    chunk_size: int
    part_size: int

    def __post_init__(self):
        for field in ("chunk_size", "part_size"):
            if getattr(self, field) < 1:
                raise InputError(f"evaluation.{field}={getattr(self, field)}: give a whole number "
                                 ">= 1")

    @functools.cached_property
    def _features(self) -> Callable[[UInt8[np.ndarray, "n h w c"]], dict[str, jax.Array]]:
        compiled = by_device(self.extractor.apply, self.on)
        params = on_this_host(self.extractor.params, self.on)
        return lambda images: compiled(params, images)

    def widths(self, shape: tuple[int, ...]) -> dict[str, int]:
        """How many values the features of images of a shape (h, w, c) have, by kind."""
        image = jax.ShapeDtypeStruct((1, *shape), np.uint8)
        found = jax.eval_shape(self.extractor.apply, self.extractor.params, image)
        return {kind: features.shape[1] for kind, features in found.items()}

    def features(self, images: UInt8[np.ndarray, "n h w c"]) -> dict[str, np.ndarray]:
        """Features of any number of images at once, by kind."""
        filled = np.zeros((-(-len(images) // self.on.size) * self.on.size, *images.shape[1:]),
                          np.uint8)
        filled[: len(images)] = images
        found = jax.device_get(self._features(filled))
        return {kind: values[: len(images)] for kind, values in found.items()}

    def survey(
        self,
        images_of: ImagesOf,
        count: int,
        folder: epath.Path,
        *,
        keep: Mapping[str, int],
        what: str,
    ) -> Statistics:
        """The statistics of images 0 to count - 1.

        Args:
          images_of: images by their indices, of which as many are asked for at once as all devices
            see; the last ones may be beyond the count.
          count: number of images.
          folder: for the parts.
          keep: kinds of features to keep, of every n-th image.
          what: to say what goes on.

        Raises:
          RunError: some images hold NaN or infinity, or a part cannot be written.
        """
        size = -(-self.part_size // self.chunk_size) * self.chunk_size
        parts = {folder / f"{number:05}.npz": (first, min(first + size, count))
                 for number, first in enumerate(range(0, count, size))}
        mine = list(parts)[jax.process_index() :: jax.process_count()]
        todo = [path for path in mine if not path.exists()]
        total = sum(last - first for first, last in (parts[path] for path in mine))
        done = total - sum(last - first for first, last in (parts[path] for path in todo))
        progress = logs.Progress(what, done, total, "images")
        for path in todo:
            self._part(images_of, *parts[path], keep, progress).write(path)
        wait_for_all(str(folder))
        statistics = Statistics(keep)
        for path in parts:
            statistics.merge(read_statistics(path, keep))
        return statistics

    def _part(
        self,
        images_of: ImagesOf,
        first: int,
        last: int,
        keep: Mapping[str, int],
        progress: logs.Progress,
    ) -> Statistics:
        """The statistics of images first to last - 1."""
        statistics, bad, waiting = Statistics(keep), [], []
        # The sums are long: some chunks are added to them together, always as many.
        at_once = max(1, 1024 // self.chunk_size)
        for seen, finite, features in self._rounds(images_of, first, last):
            bad += seen[~finite].tolist()
            progress.add(len(seen))
            for start in range(0, len(seen), self.chunk_size):
                cut = slice(start, min(start + self.chunk_size, len(seen)))
                chunk = {kind: values[cut] for kind, values in features.items()}
                waiting.append((seen[cut], chunk))
                if len(waiting) == at_once:
                    statistics.add(*_together(waiting))
                    waiting = []
        if waiting:
            statistics.add(*_together(waiting))
        if bad:
            raise RunError(f"{len(bad)} of images {first} to {last - 1} hold NaN or infinity, the "
                           f"first of them {bad[0]}: nothing can be measured on them")
        return statistics

    def _rounds(self, images_of: ImagesOf, first: int, last: int) -> Iterator[Round]:
        """What the devices see at once, in order; one round is under way while the one before is
        looked at."""

        def begin(indices: Int[np.ndarray, "n"]) -> tuple[Any, Any, Any]:
            images, finite = images_of(indices)
            return indices, finite, self._features(images)

        def end(indices: Int[np.ndarray, "n"], finite: Any, features: Any) -> Round:
            inside = indices < last
            finite, features = jax.device_get((finite, features))
            kept = {kind: values[inside] for kind, values in features.items()}
            return indices[inside], finite[inside], kept

        begun = None
        for indices in chunks(last, self.chunk_size * self.on.size, first):
            before, begun = begun, begin(indices)
            if before is not None:
                yield end(*before)
        if begun is not None:
            yield end(*begun)


def _together(parts: Sequence[tuple[np.ndarray, Features]]) -> tuple[np.ndarray, Features]:
    """Indices and features of several chunks."""
    indices, features = zip(*parts, strict=True)
    joined = {kind: np.concatenate([each[kind] for each in features]) for kind in features[0]}
    return np.concatenate(indices), joined


def claimed(folder: epath.Path, identity: Any) -> epath.Path:
    """A folder for some work, emptied if it holds other work.

    Args:
      folder: that may hold what an earlier process left.
      identity: what tells the work from others, as JSON holds it.
    """
    note, mine = folder / "work.json", json.loads(json.dumps(identity))
    theirs = json.loads(note.read_text()) if note.exists() else None
    if folder.exists() and theirs != mine:
        # Without a note, it is what is left of a folder that was being taken away.
        hosts.say(f"{folder}: what lies there is of other settings; begun anew")
        wait_for_all(f"{folder} seen")
        if jax.process_index() == 0:
            folder.rmtree()
    wait_for_all(f"{folder} free")
    if jax.process_index() == 0 and not note.exists():
        write_json(note, mine)
    wait_for_all(f"{folder} claimed")
    return folder
