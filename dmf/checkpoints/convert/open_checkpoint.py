"""Opens a checkpoint: a file, a directory, or a repository of the Hugging Face hub.

Whatever the form, it becomes tensors by name that are read when they are used, and the config that
a file of dmf states.
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

from dmf.checkpoints.convert import pytorch_files
from dmf.checkpoints.convert.name_tables import Shape, Tensors
from dmf.checkpoints.convert.training_files import choose_part
from dmf.checkpoints.params import SAFETENSORS_FILE
from dmf.errors import InputError
from dmf.models import FROZEN_KINDS

HUB = "hf:"
# The key of the metadata of a safetensors file that holds the config as JSON.
CONFIG_KEY = "dmf.config"
_SECTIONS = ("model", *FROZEN_KINDS)
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
      tensors: the tensors by their names in the file.
      config: the config that a file of dmf states; empty for other files.
      part: name of the part of a training file that the tensors are of; empty for a whole file.
    """

    tensors: Tensors
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    part: str = ""


def open_checkpoint(source: str, key: str = "") -> OpenedCheckpoint:
    """Opens a checkpoint; values are read later, one tensor at a time.

    Args:
      source: a `.pt`, `.pth`, `.bin` or `.ckpt` file of PyTorch, a `.safetensors` file, a
        directory with `model.safetensors`, a directory that Orbax wrote, or `hf:OWNER/REPO/FILE`.
      key: name of the part of a training file, for example "ema" or "model"; empty for the EMA
        parameters if there are any.

    Raises:
      InputError: there is no such file, it cannot be read, or it has no such part.
    """
    path = _download(source) if source.startswith(HUB) else epath.Path(source)
    if not path.exists():
        raise InputError(source, remedy="there is no such file or directory")
    if path.is_dir() and (path / SAFETENSORS_FILE).exists():
        path = path / SAFETENSORS_FILE
    if path.suffix == ".safetensors":
        return _open_safetensors(path, key)
    structure = None if path.is_dir() else pytorch_files.read(path)
    try:
        if path.is_dir():
            return _open_orbax(path, key)
        part, tensors = pytorch_files.find_state_dict(structure, key)
    except InputError as error:
        raise error.within(str(path)) from None
    return OpenedCheckpoint(tensors, part=part)


def _download(source: str) -> epath.Path:
    """The local copy of a file of the hub, which is downloaded if it is not there yet."""
    owner, _, rest = source.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not file:
        raise InputError(source, remedy="give hf:OWNER/REPO/FILE")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise InputError(source, remedy="it needs huggingface_hub; install dmf-jax[hub]") from None
    try:
        return epath.Path(hub.hf_hub_download(f"{owner}/{name}", file))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            source,
            remedy=f"it cannot be downloaded ({type(error).__name__}: {reason}); without a "
                   "network, give a file that was downloaded elsewhere",
        ) from None


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


def _open_safetensors(path: epath.Path, key: str) -> OpenedCheckpoint:
    try:
        with safe_open(path, framework="np") as file:
            config = _stated_config((file.metadata() or {}).get(CONFIG_KEY, "{}"))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: _SafetensorsTensor(path, name, tuple(s.get_shape()), _dtype(s.get_dtype()))
                for name, s in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            str(path),
            remedy=f"no safetensors file, or not a whole one ({error})",
        ) from None
    try:
        part = key or choose_part(sorted({name.split(".")[0] for name in tensors if "." in name}))
    except InputError as error:
        raise error.within(str(path)) from None
    return OpenedCheckpoint(_below(tensors, part, path), config, part)


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


def _below(tensors: Tensors, key: str, path: epath.Path) -> Tensors:
    """The tensors whose names begin with `key.`, by the rest of their names; all without a key."""
    if not key:
        return tensors
    prefix = f"{key}."
    part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix)}
    if not part:
        raise InputError(
            str(path),
            remedy=f"it has no part {key!r}; its names begin with "
                   f"{', '.join(sorted({name.split('.')[0] for name in tensors})[:8])}",
        )
    return part


def _open_orbax(directory: epath.Path, key: str) -> OpenedCheckpoint:
    """The parameters in a directory that Orbax wrote, of its last step.

    The names are the paths below the part, without a further `params/`.
    """
    checkpoint = _last_orbax_checkpoint(directory)
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(checkpoint).item_metadata
        stored = flatten_dict(getattr(metadata, "tree", metadata), sep="/")
        parts = sorted({name.split("/")[0] for name in stored})
        if key and key not in parts:
            raise InputError("", remedy=f"it has no part {key!r}; it has {', '.join(parts)}")
        part = key or choose_part([name.split("/")[0] for name in stored if "/" in name])
        wanted = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in stored.items()
                  if not part or name.startswith(f"{part}/")}
        item = unflatten_dict(wanted, sep="/")
        restored = checkpointer.restore(
            checkpoint,
            args=ocp.args.PyTreeRestore(
                item, restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            ),
        )
    flat = flatten_dict(restored, sep="/")
    tensors = {name.removeprefix(f"{part}/").removeprefix("params/"): leaf
               for name, leaf in flat.items()}
    return OpenedCheckpoint(tensors, part=part)


def _last_orbax_checkpoint(directory: epath.Path) -> epath.Path:
    """The directory itself, or the checkpoint of the last step in it."""
    folders = [directory, *directory.glob("*"), *directory.glob("*/*")]
    checkpoints = [folder for folder in folders if (folder / "_METADATA").exists()]
    if not checkpoints:
        raise InputError("", remedy=f"it holds no checkpoint of Orbax, and no {SAFETENSORS_FILE}")
    return max(checkpoints, key=_step)


def _step(directory: epath.Path) -> tuple[int, ...]:
    """The numbers in the last two names of a path, for the order of steps."""
    digits = ["".join(filter(str.isdigit, part)) for part in directory.parts[-2:]]
    return tuple(int(number) if number else -1 for number in digits)
