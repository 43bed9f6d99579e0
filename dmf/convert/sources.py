"""Where a checkpoint comes from: a file, a directory, or a repository of Hugging Face's hub.

Whatever it is, it becomes tensors by name that are read when they are used, and the config that
the file states, if it is one of ours.
"""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from dmf.convert import pytorch_files
from dmf.convert.names import Shape, Tensors
from dmf.typing import InputError

HUB = "hf:"
CONFIG_KEY = "dmf.config"
WEIGHTS_FILE = "model.safetensors"
_AVERAGES = ("ema_params", "params_ema", "ema", "params", "model")
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
      tensors: by the names they have there.
      config: what a file of ours states about itself; empty for others.
    """

    tensors: Tensors
    config: Mapping[str, Any]


def open_source(source: str, key: str = "") -> Source:
    """Opens a checkpoint; values are read later, one tensor at a time.

    Args:
      source: a `.pt`, `.pth`, `.bin` or `.ckpt` file of PyTorch, a `.safetensors` file, a
        directory with one (`model.safetensors`), a directory that Orbax wrote, or
        `hf:OWNER/REPO/FILE`.
      key: which part of a training file, as "ema" or "model"; an average by default.

    Raises:
      InputError: nothing is there, or it cannot be read, or it has no such part.
    """
    path = _fetched(source) if source.startswith(HUB) else epath.Path(source)
    if not path.exists():
        raise InputError(f"{source}: there is no such file or directory")
    if path.is_dir() and (path / WEIGHTS_FILE).exists():
        path = path / WEIGHTS_FILE
    if path.is_dir():
        return Source(_orbax(path, key), {})
    if path.suffix == ".safetensors":
        return _safetensors(path, key)
    structure = pytorch_files.read(path)
    try:
        return Source(pytorch_files.state_dict(structure, key), {})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _fetched(source: str) -> epath.Path:
    """The local copy of a file of the hub, downloaded if it is not there yet."""
    owner, _, rest = source.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not file:
        raise InputError(f"{source}: give hf:OWNER/REPO/FILE")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise InputError(f"{source}: it needs huggingface_hub; install dmf-jax[hub]") from None
    try:
        return epath.Path(hub.hf_hub_download(f"{owner}/{name}", file))
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: it cannot be fetched ({type(error).__name__}: {why}); with "
                         "no network, give a file that was downloaded elsewhere") from None


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A tensor of a safetensors file."""

    path: epath.Path
    name: str
    shape: Shape
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        with safe_open(self.path, framework="np") as file:
            values = file.get_tensor(self.name)
        return values if dtype is None else values.astype(dtype)


def _safetensors(path: epath.Path, key: str) -> Source:
    try:
        with safe_open(path, framework="np") as file:
            stated = _config((file.metadata() or {}).get(CONFIG_KEY, "{}"))
            names = file.keys()
            slices = {name: file.get_slice(name) for name in names}
            tensors = {
                name: _Slice(path, name, tuple(found.get_shape()), _dtype(found.get_dtype()))
                for name, found in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: no safetensors file, or not a whole one ({error})") from None
    return Source(_part(tensors, key, path), stated)


def _config(text: str) -> Mapping[str, Any]:
    """The config in a file's metadata, which only has to be about a network here."""
    stated = json.loads(text)
    if not isinstance(stated, dict) or not all(isinstance(v, dict) for v in _networks(stated)):
        raise ValueError(f"{CONFIG_KEY} in its metadata is no config")
    return stated


def _networks(stated: Mapping[str, Any]) -> list[Any]:
    return [stated[kind] for kind in ("model", "encoder") if kind in stated]


def _dtype(name: str) -> np.dtype:
    """Only floating point is ever used; what else there is need only be told from it."""
    return _DTYPES.get(name, np.dtype(np.int64))


def _part(tensors: Tensors, key: str, path: epath.Path) -> Tensors:
    """The tensors below `key`, or all."""
    if not key:
        return tensors
    below = {name.removeprefix(f"{key}."): tensor for name, tensor in tensors.items()
             if name.startswith(f"{key}.")}
    if not below:
        raise InputError(f"{path}: it has no part {key!r}; its names begin with "
                         f"{', '.join(sorted({name.split('.')[0] for name in tensors})[:8])}")
    return below


def _orbax(path: epath.Path, key: str) -> Tensors:
    """The parameters in a directory that Orbax wrote: of its last step, an average if there is one.

    Names are the paths below the chosen part, without a further `params/`.
    """
    trees = [d for pattern in ("", "*", "*/*") for d in (path.glob(pattern) if pattern else [path])
             if (d / "_METADATA").exists()]
    if not trees:
        raise InputError(f"{path}: no checkpoint of Orbax, and no {WEIGHTS_FILE} in it")
    tree = max(trees, key=_step)
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(tree).item_metadata
        stored = flatten_dict(getattr(metadata, "tree", metadata), sep="/")
        parts = sorted({name.split("/")[0] for name in stored})
        known = [part for part in _AVERAGES if part in parts]
        chosen = key or (known[0] if known else "")
        if key and key not in parts:
            raise InputError(f"{path}: it has no part {key!r}; it has {', '.join(parts)}")
        wanted = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in stored.items()
                  if not chosen or name.startswith(f"{chosen}/")}
        item = unflatten_dict(wanted, sep="/")
        restored = checkpointer.restore(
            tree,
            args=ocp.args.PyTreeRestore(
                item, restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            ),
        )
    flat = flatten_dict(restored, sep="/")
    return {name.removeprefix(f"{chosen}/").removeprefix("params/"): leaf
            for name, leaf in flat.items()}


def _step(directory: epath.Path) -> tuple[int, ...]:
    """The numbers in the last two names of a path, for the order of steps."""
    digits = ["".join(filter(str.isdigit, part)) for part in directory.parts[-2:]]
    return tuple(int(number) if number else -1 for number in digits)
