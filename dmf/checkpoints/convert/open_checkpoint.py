"""Opens a checkpoint: its tensors by name, which are read when they are used, and what the files
say of the network.

The sizes that a checkpoint claims are compared with what its files hold before anything of that
size is made.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from dmf.checkpoints import orbax_files
from dmf.checkpoints.convert import (
    msgpack_files,
    predictions,
    pytorch_files,
    source_files,
    zip_archives,
)
from dmf.checkpoints.convert.name_tables import Shape, Tensors
from dmf.checkpoints.convert.namings import IDENTIFYING_TENSORS
from dmf.checkpoints.convert.training_files import Part, choose_part
from dmf.errors import InputError, brief
from dmf.models import FROZEN_KINDS
from dmf.runtime.files import is_regular_file

# The key of the metadata of a safetensors file that holds the config as JSON.
CONFIG_KEY = "dmf.config"
_SECTIONS = ("model", *FROZEN_KINDS)
# The tensors of a part may have as many bytes as this many files, beyond the first bytes: a file
# may hold a tensor once that a network has several times.
_MAX_REPEATS = 4
_FREE_BYTES = 2**24
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
    """An opened checkpoint.

    Attributes:
      tensors: the tensors by their names in the part that is converted.
      config: the config that a file of dmf states; empty for other files.
      note: one line for the user: the part of a training file that is converted, and the file if
        the source is not the file itself; may be empty.
      settings: what a training file says of what its network predicts.
      neighbour: what the `config.json` of another project beside the file says; may be empty.
    """

    tensors: Tensors
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    neighbour: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _Contents(NamedTuple):
    """What a file or a directory holds.

    Attributes:
      path: the file, the first file, or the directory that was read.
      tensors: all tensors by name.
      config: the config that a file of dmf states; empty for other files.
      settings: what it says of what its network predicts.
      take: checks that a part is there, and returns its tensors with their values.
    """

    path: epath.Path
    tensors: Tensors
    config: Mapping[str, Any]
    settings: Mapping[str, str]
    take: Callable[[Part], Tensors]


def open_checkpoint(source: str, key: str = "") -> OpenedCheckpoint:
    """Opens a checkpoint; values are read later, one tensor at a time.

    Args:
      source: a `.pt`, `.pth`, `.bin` or `.ckpt` file of PyTorch, a `.safetensors` file, a
        directory of such a file, a pipeline of diffusers, the index of sharded files, a directory
        that Orbax or Flax wrote, a file that Flax wrote, a `.zip` of one of these, or
        `hf:OWNER/REPO/FILE`.
      key: name of the part of a training file, for example "ema" or "model"; empty for the EMA
        parameters if there are any.

    Raises:
      InputError: there is no such file, it cannot be read, it claims more than it holds, it has no
        such part, or it is unclear which part is meant.
    """
    files = source_files.find(source)
    if files.weights[0].suffix == zip_archives.SUFFIX:
        return _open_archive(files.weights[0], source, key)
    return _open(files, source, key)


def open_together(sources: Sequence[str], key: str = "") -> OpenedCheckpoint:
    """Opens a checkpoint of several sources, for example an encoder, a decoder and statistics.

    Where the `config.json` beside two of them differ, that of the first counts.

    Args:
      sources: at least one source, see `open_checkpoint`.
      key: name of the part of each training file.

    Raises:
      InputError: one of them cannot be opened, states a whole network, or has a tensor of another.
    """
    opened = open_checkpoint(sources[0], key)
    for source in sources[1:]:
        other = open_checkpoint(source, key)
        if opened.config or other.config:
            raise InputError(source, remedy="only files of other projects are read together")
        if twice := opened.tensors.keys() & other.tensors.keys():
            raise InputError(source, remedy=f"tensor {min(twice)!r} is also in another source")
        opened = OpenedCheckpoint(
            {**opened.tensors, **other.tensors},
            note="; ".join(filter(None, [opened.note, other.note])),
            settings={**other.settings, **opened.settings},
            neighbour={**other.neighbour, **opened.neighbour},
        )
    return opened


def _open_archive(archive: epath.Path, source: str, key: str) -> OpenedCheckpoint:
    """Opens a checkpoint in a zip archive. Its values are in memory, and nowhere else."""
    folder = ""
    try:
        with zip_archives.unpacked(archive) as path:
            folder = str(path)
            opened = _open(source_files.find(folder), source, key)
            tensors = {name: np.asarray(tensor) for name, tensor in opened.tensors.items()}
    except InputError as error:
        text = str(error)
        for end in ("/", ": ") if folder else ():
            text = text.replace(f"{folder}{end}", "")
        raise InputError(str(archive), remedy=text) from None
    note = opened.note.replace(f"{path.name}/", "")
    return dataclasses.replace(opened, tensors=tensors, note=note)


def _open(files: source_files.SourceFiles, source: str, key: str) -> OpenedCheckpoint:
    """Opens a checkpoint of files that are no archive."""
    contents = _contents(files)
    first = contents.path
    try:
        part = choose_part(contents.tensors, IDENTIFYING_TENSORS, key)
        tensors = contents.take(part)
    except InputError as error:
        raise error.within(str(first)) from None
    inner = first.name if first.name not in source else ""
    note = "; ".join(filter(None, [inner and f"file {first.parent.name}/{inner}", part.note]))
    return OpenedCheckpoint(tensors, contents.config, note, contents.settings, files.config)


def _contents(files: source_files.SourceFiles) -> _Contents:
    """The contents of files of weights, or of a directory that Orbax or Flax wrote."""
    first = files.weights[0]
    try:
        if first.is_dir():
            return _of_directory(first)
        if first.suffix != ".safetensors":
            return _of_msgpack(first) if msgpack_files.is_msgpack(first) else _of_pytorch(first)
    except InputError as error:
        raise error.within(str(first)) from None
    return _of_shards(files) if files.places else _of_safetensors(first)


def _of_directory(directory: epath.Path) -> _Contents:
    """The contents of the last step in a directory that Orbax or Flax wrote."""
    last = orbax_files.last_checkpoint(directory)
    if not last.is_dir():
        try:
            return _of_msgpack(last)
        except InputError as error:
            raise error.within(last.name) from None
    # Earlier versions of Orbax wrote arrays of one device into one file, as Flax does.
    inner = last / orbax_files.AGGREGATE
    if is_regular_file(inner) and msgpack_files.is_msgpack(inner):
        contents = _of_msgpack(inner)
        if contents.tensors:
            return contents
    return _of_orbax(last)


def _of_msgpack(path: epath.Path) -> _Contents:
    """The contents of a file of Flax, whose arrays cannot claim more than it holds."""
    return _Contents(path, msgpack_files.read(path), {}, {}, lambda part: part.tensors)


def _of_shards(files: source_files.SourceFiles) -> _Contents:
    """The contents of safetensors files, of which each has the tensors that the index says."""
    shards = {path: _of_safetensors(path) for path in files.weights}
    tensors: dict[str, Any] = {}
    for path, shard in shards.items():
        expected = {name for name, file in files.places.items() if file == path.name}
        if odd := expected ^ shard.tensors.keys():
            raise InputError(str(path), remedy=f"tensor {min(odd)!r} is not where the index says")
        tensors |= shard.tensors
    return shards[files.weights[0]]._replace(tensors=tensors)


def _of_pytorch(path: epath.Path) -> _Contents:
    structure = pytorch_files.read(path)
    size = path.stat().length

    def take(part: Part) -> Tensors:
        claimed = sum(math.prod(tensor.shape) * tensor.dtype.itemsize
                      for tensor in part.tensors.values())
        if claimed > _FREE_BYTES + _MAX_REPEATS * size:
            raise InputError("", remedy=f"its tensors claim {claimed} bytes, and it has {size}")
        return part.tensors

    settings = predictions.settings(pytorch_files.texts(structure))
    return _Contents(path, pytorch_files.flatten(structure), {}, settings, take)


@dataclasses.dataclass(frozen=True)
class _SafetensorsTensor:
    """A tensor of a safetensors file."""

    path: epath.Path
    name: str
    shape: Shape
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        with safe_open(self.path, framework="np") as file:
            values = file.get_tensor(self.name)
        return values if dtype is None else values.astype(dtype)


def _of_safetensors(path: epath.Path) -> _Contents:
    """The contents of a safetensors file, whose library checks its claims when it is opened."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            config = _stated_config(metadata.get(CONFIG_KEY, "{}"))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: _SafetensorsTensor(path, name, tuple(s.get_shape()), _dtype(s.get_dtype()))
                for name, s in slices.items()
            }
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(
            str(path),
            remedy=f"no safetensors file, or not a whole one ({brief(error)})",
        ) from None
    settings = predictions.settings({name: str(text) for name, text in metadata.items()})
    return _Contents(path, tensors, config, settings, lambda part: part.tensors)


def _stated_config(text: str) -> Mapping[str, Any]:
    """The config in the metadata of a file, of which only its form is checked here."""
    config = json.loads(text)
    if not isinstance(config, dict) or not all(
        isinstance(part, dict) for name, part in config.items() if name in _SECTIONS
    ):
        raise ValueError(f"{CONFIG_KEY} in its metadata is no config")
    return config


def _dtype(name: str) -> np.dtype:
    """The dtype of a safetensors name; int64 stands for all that is not floating point."""
    return _DTYPES.get(name, np.dtype(np.int64))


@dataclasses.dataclass(frozen=True)
class _OrbaxArray:
    """An array of a directory that Orbax wrote, as its metadata claims it."""

    checkpoint: epath.Path
    name: str
    metadata: Any

    @property
    def shape(self) -> Shape:
        return tuple(self.metadata.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.metadata.dtype)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        values = orbax_files.read(self.checkpoint, {self.name: self.metadata})[self.name]
        return values if dtype is None else values.astype(dtype)


def _of_orbax(checkpoint: epath.Path) -> _Contents:
    """The contents of a checkpoint that Orbax wrote."""
    arrays = orbax_files.claimed_arrays(checkpoint)

    def take(part: Part) -> Tensors:
        stored = {tensor.name: name for name, tensor in part.tensors.items()}
        values = orbax_files.read(checkpoint, {name: arrays[name] for name in stored})
        return {stored[name]: array for name, array in values.items()}

    tensors = {name: _OrbaxArray(checkpoint, name, metadata) for name, metadata in arrays.items()}
    return _Contents(checkpoint, tensors, {}, {}, take)
