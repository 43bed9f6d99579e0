"""The files of a checkpoint: in a directory, on the Hugging Face hub, or a file by itself.

Directories are those that PyTorch's ecosystem writes: weights in one file, or in several with an
index, beside a `config.json`; and pipelines of diffusers, of which the autoencoder is taken. Beside
an autoencoder may lie the statistics of its latents.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from etils import epath

from dmf.checkpoints.convert.config_files import SCALING_FIELDS
from dmf.checkpoints.latent_statistics import STATISTICS_FILE, read_statistics
from dmf.errors import InputError, brief
from dmf.runtime.files import is_regular_file
from dmf.runtime.hub import HUB, address, download
from dmf.runtime.paths import user_path

CONFIG_FILE = "config.json"
_INDEX = ".index.json"
# Files of weights in the order of preference.
_WEIGHTS = tuple(
    f"{stem}{suffix}"
    for suffix in (".safetensors", f".safetensors{_INDEX}", ".bin")
    for stem in ("model", "diffusion_pytorch_model", "pytorch_model")
)
_PIPELINE_FILE = "model_index.json"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_LFS_POINTER = b"version https://git-lfs"
_MAX_JSON_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class SourceFiles:
    """The files of a checkpoint.

    Attributes:
      weights: the files of weights, several if they are sharded; or a directory that Orbax or Flax
        wrote.
      config: what `config.json` beside the weights says, unless dmf wrote it, and the statistics of
        latents beside them; empty without these.
      places: the name of the file of each tensor, as the index of sharded files says; empty
        without one.
    """

    weights: tuple[epath.Path, ...]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    places: dict[str, str] = dataclasses.field(default_factory=dict)


def find(source: str) -> SourceFiles:
    """The files of a checkpoint.

    Args:
      source: a file, a directory, or `hf:OWNER/REPO/FILE`, also with @REVISION behind REPO.

    Raises:
      InputError: there is no such file, it is a pointer of Git LFS, or it is unclear which file of
        a directory is meant.
    """
    if source.startswith(HUB):
        return _of_hub(source)
    path = _absolute(source)
    if not path.exists():
        raise InputError(source, remedy="there is no such file or directory")
    if path.is_dir():
        path = _in_directory(path)
    if path.is_dir():
        return SourceFiles((path,))
    places = _places(path)
    weights = _distinct(places, path, lambda name: path.parent / name)
    for file in weights:
        if not is_regular_file(file):
            raise InputError(str(file), remedy=f"it is no file, and {path.name} names it"
                             if file != path else "is not a file")
        _refuse_pointer(file)
    config = _config(path.parent / CONFIG_FILE)
    return SourceFiles(weights, _with_statistics(config, path.parent / STATISTICS_FILE), places)


def _absolute(source: str) -> epath.Path:
    """The absolute path of a source; links stay, which in the hub's cache bear the files' names."""
    if "://" in source:
        return epath.Path(source)
    return epath.Path(os.path.abspath(user_path(source)))


def _in_directory(directory: epath.Path) -> epath.Path:
    """The file of weights in a directory; the directory itself if there is none.

    Raises:
      InputError: there are several, and none has a usual name.
    """
    inner = [directory / name for name in _WEIGHTS if (directory / name).exists()]
    if inner:
        return inner[0]
    others = sorted(path for path in directory.iterdir()
                    if (path.suffix in _SUFFIXES or path.name.endswith(_INDEX))
                    and path.name != STATISTICS_FILE)
    if len(others) > 1:
        names = ", ".join(path.name for path in others[:8])
        raise InputError(str(directory), remedy=f"it holds several files of weights, give one: "
                         f"{names}")
    return others[0] if others else _in_pipeline(directory)


def _in_pipeline(directory: epath.Path) -> epath.Path:
    """The weights of the autoencoder of a pipeline of diffusers; the directory if it is none.

    An average, as `vae_ema`, comes before the raw parameters.
    """
    parts = [directory / name for name in ("vae_ema", "vae")
             if (directory / name / CONFIG_FILE).is_file()]
    if parts:
        return _in_directory(parts[0])
    if (directory / _PIPELINE_FILE).exists():
        raise InputError(str(directory), remedy="it is a pipeline of diffusers without a vae; give "
                         "the directory of one of its networks")
    return directory


def _places(path: epath.Path) -> dict[str, str]:
    """The name of the file of each tensor in an index; empty if the file is no index.

    Raises:
      InputError: the index is damaged, or lists a file elsewhere.
    """
    if not path.name.endswith(_INDEX):
        return {}
    places = _read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(str(path), remedy="it has no weight_map, which lists the files of weights")
    for name in places.values():
        if not (isinstance(name, str) and name.endswith(".safetensors")
                and name == os.path.basename(name)):
            raise InputError(str(path), remedy=f"it lists {str(name)[:80]!r}, which is no "
                             ".safetensors file beside it")
    return places


def _distinct(
    places: dict[str, str], path: epath.Path, locate: Callable[[str], epath.Path]
) -> tuple[epath.Path, ...]:
    """The files that an index names, each once; the file itself if it is no index."""
    return tuple(map(locate, dict.fromkeys(places.values()))) or (path,)


def _config(path: epath.Path) -> dict[str, Any]:
    """The config beside weights; empty if there is none, or dmf wrote it."""
    config = _read_json(path) if is_regular_file(path) else {}
    return {} if "format" in config else config


def _with_statistics(config: dict[str, Any], path: epath.Path | None) -> dict[str, Any]:
    """A config with the scaling of latents that a file of statistics beside weights states, where
    it states none itself; in the fields of diffusers."""
    scaling = read_statistics(path) if path else None
    if scaling is None or any(name in config for name in SCALING_FIELDS):
        return config
    return config | {"latents_mean": list(scaling.mean), "latents_std": list(scaling.std)}


def _read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON file with an object.

    Raises:
      InputError: it is too large, damaged, or holds something else.
    """
    _refuse_pointer(path)
    try:
        if path.stat().length > _MAX_JSON_BYTES:
            raise ValueError(f"more than {_MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(str(path), remedy=f"it cannot be read ({brief(error)})") from None
    return value


def _refuse_pointer(path: epath.Path) -> None:
    """Raises InputError for a pointer of Git LFS, which stands for a file that is elsewhere."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InputError(str(path), remedy="it is a pointer of Git LFS, and no file itself; "
                             "get the file with git lfs pull")


def _of_hub(source: str) -> SourceFiles:
    """The files of a repository of the hub, which are downloaded if they are not there yet."""
    wanted = address(source)
    if wanted is None or not wanted.file:
        raise InputError(source, remedy="give hf:OWNER/REPO/FILE, or hf:OWNER/REPO of an export")
    repository, revision, file = wanted
    path = download(source, repository, file, revision=revision)
    folder, places = file.rpartition("/")[0], _places(path)

    def beside(inner: str, needed: bool = True) -> epath.Path | None:
        return download(source, repository, f"{folder}/{inner}".lstrip("/"), revision=revision,
                        needed=needed)

    config, statistics = (beside(name, needed=False) for name in (CONFIG_FILE, STATISTICS_FILE))
    stated = _with_statistics(_config(config) if config else {}, statistics)
    return SourceFiles(_distinct(places, path, beside), stated, places)
