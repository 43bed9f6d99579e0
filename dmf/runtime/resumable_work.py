"""Work that can be interrupted: it resumes in the folder that it started in."""

import json
from collections.abc import Callable
from typing import Any

from etils import epath

from dmf.runtime.files import refuse_link, write_json
from dmf.runtime.processes import barrier, is_first_process, log

IDENTITY_FILE = "work.json"


def claim_folder(folder: epath.Path, identity: Any) -> epath.Path:
    """Claims a folder for some work, so that it resumes there if it is interrupted.

    The same work finds the files that it has written; the files of other work are deleted. All
    processes must call it.

    Args:
      folder: the folder, which need not exist.
      identity: all settings that determine the results of the work, which JSON can represent.

    Returns:
      The folder.

    Raises:
      InputError: the folder is a symbolic link; nothing is changed.
    """
    refuse_link(folder)
    path, identity = folder / IDENTITY_FILE, json.loads(json.dumps(identity))
    # The first process alone decides: clients of a network file system may see different files.
    if is_first_process():
        if folder.exists() and _read(path) != identity:
            # A folder without the file was being deleted when a process was interrupted. So is one
            # whose file cannot be read: a machine that stops may leave it empty.
            log(f"{folder}: it holds work with other settings, which is deleted")
            folder.rmtree()
        if _read(path) != identity:
            write_json(path, identity)
    barrier(f"{folder} claimed")
    return folder


def finish_work(
    folder: epath.Path, write: Callable[..., None], path: epath.Path, *contents: Any
) -> None:
    """Writes the output with write(path, *contents), and removes the folder of unfinished work; the
    first process does it, and the others wait."""
    if is_first_process():
        write(path, *contents)
        if folder.exists():
            folder.rmtree()
    barrier(f"{path} written")


def _read(path: epath.Path) -> Any:
    """What a file says that work is; None if there is no such file, or it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
