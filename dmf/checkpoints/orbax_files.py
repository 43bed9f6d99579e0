"""Directories that Orbax wrote: the arrays that they claim, what is stored of them, and the values.
"""

import bisect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from dmf.errors import Damaged, InputError
from dmf.runtime.checksums import reading_errors
from dmf.runtime.files import is_regular_file

# Arrays may be this many times as large as the compressed files, beyond the first bytes.
MAX_COMPRESSION = 100
FREE_BYTES = 2**26
# The file in which earlier versions of Orbax and Flax put all arrays of one device.
AGGREGATE = "checkpoint"
_FLAX_FILE = re.compile(r"checkpoint_\d+")
_METADATA = (".zarray", "zarr.json", ".zattrs")


def last_checkpoint(directory: epath.Path) -> epath.Path:
    """The checkpoint of the last step in a directory.

    It is a directory that Orbax wrote, which may be this one, or a file checkpoint_STEP of
    flax.training.checkpoints.

    Raises:
      InputError: there is none.
    """
    folders = [directory, *directory.glob("*"), *directory.glob("*/*")]
    checkpoints = [folder for folder in folders if _is_checkpoint(folder)]
    if not checkpoints:
        raise InputError("", remedy="it holds no checkpoint of Orbax or Flax, and no file of "
                         "weights with a usual name")
    return max(checkpoints, key=_step)


def _is_checkpoint(path: epath.Path) -> bool:
    if is_regular_file(path):
        return bool(_FLAX_FILE.fullmatch(path.name))
    return any((path / name).exists() for name in ("_METADATA", AGGREGATE))


def _step(path: epath.Path) -> tuple[int, ...]:
    """The numbers in the last two names of a path, for the order of steps."""
    digits = ["".join(filter(str.isdecimal, part))[:18] for part in path.parts[-2:]]
    return tuple(int(number) if number else -1 for number in digits)


def tree_metadata(item: epath.Path) -> Mapping[str, Any] | None:
    """The metadata of the arrays of one Orbax item, in their tree; None where it cannot be read.

    The handler is asked, and no `Checkpointer`, which also looks for the metadata of a step: an
    item of a step has none of its own, and Orbax would warn of that.
    """
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(item)
    except (FileNotFoundError, NotImplementedError, ValueError, TypeError):
        return None
    return getattr(metadata, "tree", metadata)


def claimed_arrays(checkpoint: epath.Path) -> dict[str, Any]:
    """The metadata of each array of a checkpoint, by its path: its shape, dtype and chunks.

    Raises:
      InputError: the metadata is damaged.
    """
    with _damage_refused():
        metadata = tree_metadata(checkpoint)
        if metadata is None:
            raise Damaged("its list of arrays cannot be read")
        leaves = flatten_dict(metadata, sep="/")
        arrays = {name: leaf for name, leaf in leaves.items()
                  if isinstance(leaf, ocp.metadata.ArrayMetadata)}
        for leaf in arrays.values():
            if not all(size >= 0 for size in leaf.shape):
                raise Damaged(f"an array has shape {leaf.shape}")
            np.dtype(leaf.dtype)
    return arrays


def check_stored(checkpoint: epath.Path, arrays: Mapping[str, Any]) -> None:
    """Checks that the arrays that a checkpoint claims are stored, before any is read.

    Args:
      checkpoint: the directory.
      arrays: metadata of the arrays by path, as `claimed_arrays` returns it.

    Raises:
      Damaged: chunks of an array are missing, or the arrays are far larger than the files.
    """
    files = [folder / name for folder, _, names in checkpoint.walk() for name in names]
    size = sum(path.stat().length for path in files if path.is_file())
    keys = _stored_keys(checkpoint, files)
    claimed = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
                  for leaf in arrays.values())
    if claimed > FREE_BYTES + MAX_COMPRESSION * size:
        raise Damaged(f"its arrays claim {claimed} bytes, and its files hold {size}")
    for name, leaf in arrays.items():
        storage = getattr(leaf, "storage", None)
        written = getattr(storage, "write_shape", None) or getattr(storage, "chunk_shape", None)
        chunks = written or leaf.shape
        count = math.prod(-(-size // max(chunk, 1))
                          for size, chunk in zip(leaf.shape, chunks, strict=True))
        stored = _count_below(keys, leaf.name or name.replace("/", "."))
        if stored < count:
            raise Damaged(f"its array {name!r} has {stored} of {count} chunks")


def _stored_keys(checkpoint: epath.Path, files: Iterable[epath.Path]) -> list[str]:
    """The keys of all chunks that are stored in the files of a checkpoint, sorted."""
    if (checkpoint / "manifest.ocdbt").exists():
        path = f"{checkpoint}/"
        base = path if "://" in path else {"driver": "file", "path": path}
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys: Iterable[str] = (key.decode() for key in store.list().result())
    else:
        keys = (str(path.relative_to(checkpoint)) for path in files)
    return sorted(key for key in keys if not key.endswith(_METADATA))


def _count_below(keys: list[str], name: str) -> int:
    """The number of keys that begin with `name/`."""
    return bisect.bisect(keys, f"{name}0") - bisect.bisect(keys, f"{name}/")


def read(checkpoint: epath.Path, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values of arrays.

    Args:
      checkpoint: the directory.
      arrays: metadata of the arrays by path, as `claimed_arrays` returns it.

    Raises:
      InputError: they are not stored, or damaged.
    """
    with _damage_refused(), ocp.PyTreeCheckpointer() as checkpointer:
        check_stored(checkpoint, arrays)
        item = unflatten_dict(dict.fromkeys(arrays, 0), sep="/")
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        wanted = unflatten_dict(dict.fromkeys(arrays, as_numpy), sep="/")
        restored = checkpointer.restore(checkpoint, args=ocp.args.PyTreeRestore(
            item, restore_args=wanted, partial_restore=True
        ))
    return flatten_dict(restored, sep="/")


@contextmanager
def _damage_refused() -> Iterator[None]:
    """Turns damage into an error of input.

    Raises:
      InputError: something in the directory is damaged.
    """
    try:
        with reading_errors():
            yield
    except Damaged as error:
        raise InputError("", remedy=f"it is damaged ({error})") from None
