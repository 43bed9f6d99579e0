"""The `config.json` of a checkpoint, which may come from anybody.

Nothing that it names is imported. It is checked when it is read, so that whatever a file holds ends
in one line; and the paths in it are followed only where the run itself wrote them.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dmf.errors import RunError
from dmf.runtime.files import read_json
from dmf.runtime.hub import is_address
from dmf.runtime.paths import BUCKETS

# Fields that hold paths of the machine that trained the network.
_LOCAL_PATHS = (
    ("init", "checkpoint"), ("teacher", "checkpoint"), ("alignment", "encoder"),
    ("data", "directory"), ("latents", "autoencoder"), ("evaluation", "reference"),
    ("evaluation", "inception"), ("evaluation", "dinov2"), ("run", "preview_autoencoder"),
)  # fmt: skip
# Names of those fields that take no address of the Hugging Face hub.
_NO_ADDRESSES = ("directory", "reference")
# Far more than any config has: nested sections, and bytes.
_MAX_DEPTH, _MAX_BYTES = 16, 2**20


def read(path: epath.Path) -> dict[str, Any]:
    """Reads the `config.json` of a run or an export.

    Raises:
      RunError: the file is damaged, or no config could be so large or so deep.
    """
    if path.stat().length > _MAX_BYTES:
        raise RunError(f"{path}: it is damaged (it is larger than any config)")
    config = read_json(path)
    if not isinstance(config.get("origin", ""), str):
        raise RunError(f"{path}: it is damaged (its origin is no text)")
    waiting: list[tuple[int, Any]] = [(0, config)]
    while waiting:
        depth, value = waiting.pop()
        if depth > _MAX_DEPTH:
            raise RunError(f"{path}: it is damaged (it is nested deeper than any config)")
        if isinstance(value, str):
            _check_text(path, value)
        elif isinstance(value, list):
            waiting += [(depth + 1, element) for element in value]
        elif isinstance(value, dict):
            for name in value:
                _check_name(path, name)
            waiting += [(depth + 1, element) for element in value.values()]
    return config


def _check_name(path: epath.Path, name: str) -> None:
    """Raises RunError for the name of a field or of a component that no config can have."""
    _check_text(path, name)
    if not name or name.startswith("_") or "." in name:
        raise RunError(f"{path}: it is damaged (no field has the name {name!r})")


def _check_text(path: epath.Path, text: str) -> None:
    """Raises RunError for text that cannot be written as UTF-8, or that holds a zero."""
    try:
        zeros = b"\0" in text.encode()
    except UnicodeEncodeError:
        zeros = True
    if zeros:
        raise RunError(f"{path}: it is damaged ({text!r:.80} is no text)")


def named_paths(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The paths that a config names: the dotted field, the section that holds it, and its name.

    >>> [field for field, _, _ in named_paths({"data": {"directory": "/data", "mixture": {}}})]
    ['data.directory']
    """
    parts = [(f"{section}.{name}", config.get(section), name) for section, name in _LOCAL_PATHS]
    mixture = _section(config.get("data")).get("mixture")
    parts += [(f"data.mixture.{key}.directory", part, "directory")
              for key, part in _section(mixture).items()]
    for field, section, name in parts:
        path = _section(section).get(name)
        if path and isinstance(path, str):
            yield field, section, name


def _section(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def without_local_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose paths of this machine are empty."""
    public = copy.deepcopy(dict(config))
    for _, section, name in named_paths(public):
        section[name] = ""
    return public


def without_foreign_paths(
    config: Mapping[str, Any], directory: epath.Path, *, exported: bool
) -> tuple[dict[str, Any], list[str]]:
    """A config of a checkpoint without the paths that its run cannot have written.

    An export has no paths when it is written. A run does not train on what lies in its own workdir.

    Args:
      config: as JSON holds it.
      directory: the run or the export.
      exported: whether it is an export.

    Returns:
      The config with those paths empty, and "FIELD='PATH'" of each of them.
    """
    followed, left_out = copy.deepcopy(dict(config)), []
    home = _place(directory)
    for field, section, name in named_paths(followed):
        path = section[name]
        elsewhere = is_address(path) and name not in _NO_ADDRESSES
        if exported or (not elsewhere and os.path.commonpath([home, _place(path)]) == home):
            left_out.append(f"{field}={path!r:.200}")
            section[name] = ""
    return followed, left_out


def _place(path: epath.PathLike) -> str:
    """Where a path leads, without links, as an absolute path that can be compared; that of a bucket
    as if its scheme was a directory.

    >>> _place("gs://bucket/runs/../vae")
    '/gs:/bucket/vae'
    """
    text = os.path.expanduser(path)
    return os.path.normpath(f"/{text}") if text.startswith(BUCKETS) else os.path.realpath(text)
