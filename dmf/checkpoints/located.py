"""Where the files of a checkpoint are: in a local directory, or in a repository of the Hugging Face
hub, whose export is downloaded to the local cache of `huggingface_hub`.

Every function that takes the directory of a run or an export finds it here, so that `hf:OWNER/REPO`
is a checkpoint wherever a directory is one.
"""

import functools
import os

from etils import epath

from dmf.errors import InputError
from dmf.runtime import hub
from dmf.runtime.paths import user_path
from dmf.runtime.progress import log

# The files of an export with Orbax parameters, and of the autoencoder in it. Nothing else of a
# repository is downloaded.
_CONFIG = "config.json"
_FILES = (_CONFIG, "checksums.json", "params/*")
_PATTERNS = (*_FILES, *(f"autoencoder/{name}" for name in _FILES))
# Files that `dmf convert` reads.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".ckpt", ".zip")
_NAMED = 3


def local_directory(checkpoint: epath.PathLike) -> epath.Path:
    """The local directory of a run or an export.

    >>> local_directory("runs/digits")
    PosixGPath('runs/digits')

    Args:
      checkpoint: a directory; or hf:OWNER/REPO or hf:OWNER/REPO@REVISION, whose export is
        downloaded when it is first asked for. Until `look_again` its commit stays the same.

    Raises:
      InputError: the repository cannot be downloaded, or holds no export with Orbax parameters.
    """
    if hub.is_address(checkpoint):
        return _downloaded(os.fspath(checkpoint))
    return user_path(checkpoint)


def look_again() -> None:
    """Has the next use of each repository ask the hub for its newest commit. A call of Python
    begins with it; a command is a process of its own."""
    _downloaded.cache_clear()


@functools.cache
def _downloaded(source: str) -> epath.Path:
    """The local copy of the export in a repository.

    Raises:
      InputError: there is none, or it cannot be downloaded.
    """
    wanted = hub.address(source)
    if wanted is None or wanted.file:
        raise InputError("checkpoint", source, "give hf:OWNER/REPO or hf:OWNER/REPO@REVISION; of "
                         "a file of weights dmf convert makes an export")
    try:
        folder = hub.download_folder(source, wanted, _CONFIG, _PATTERNS)
        if folder is None or not (folder / "params").exists():
            raise InputError(source, remedy=_what_it_is(source, hub.list_files(source, wanted)))
    except InputError as error:
        raise InputError("checkpoint", source, error.remedy) from None
    log(f"{source}: commit {folder.name[:12]}")
    return folder


def _what_it_is(source: str, files: list[str]) -> str:
    """What a repository without an export with Orbax parameters is, and what to do.

    >>> _what_it_is("hf:a/b", ["README.md", "a.pt"])
    'it holds no export of dmf, but a.pt; make one with dmf convert hf:a/b/a.pt --output=DIR'
    """
    if "sample.stablehlo" in files:
        return "it holds a StableHLO function, which its model card shows how to run"
    if "checkpoints" in {path.partition("/")[0] for path in files}:
        return "it holds a run and no export; its owner can push one with dmf export --push"
    weights = [path for path in files if path.endswith(_WEIGHTS)]
    if not weights:
        return "it holds no export of dmf, and no weights that dmf convert reads"
    weights.sort(key=lambda path: (path.count("/"), path))
    named = ", ".join(weights[:_NAMED]) + ", ..." * (len(weights) > _NAMED)
    return (f"it holds no export of dmf, but {named}; make one with dmf convert "
            f"{source}/{weights[0]} --output=DIR")
