"""What started a run: `starts.json` in the workdir has one entry for each start and resume.

An entry tells the time, the command, the versions, the git commit, the hosts and their devices, so
that a result can be traced to what made it. It holds no environment variables.
"""

import collections
import datetime as dt
import functools
import importlib.metadata
import json
import pathlib
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from typing import Any

import jax
from etils import epath

import dmf
from dmf.runtime import processes
from dmf.runtime.files import is_regular_file, write_json

STARTS_FILE = "starts.json"
# Distributions whose versions are recorded, where they are installed.
PACKAGES = (
    "array-record", "clu", "etils", "flax", "grain", "jax", "jaxlib", "jaxtyping", "libtpu",
    "ml-collections", "ml-dtypes", "numpy", "optax", "orbax-checkpoint", "pillow", "safetensors",
    "tensorboardX", "tensorflow-datasets", "trackio", "wandb",
)  # fmt: skip
_GIT_SECONDS = 10


def record_start(workdir: epath.Path, step: int) -> None:
    """Adds an entry to the `starts.json` of a run; all processes call it, the first one writes.

    Args:
      workdir: the workdir of the run.
      step: the step that the run starts or resumes at.
    """
    hosts = processes.all_gather({"host": platform.node(), "devices": local_devices()})
    if processes.is_first_process():
        write_json(workdir / STARTS_FILE, [*read_starts(workdir), start_entry(step, hosts)])


def read_starts(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The entries of a run, the oldest first; [] where there is no file that can be read."""
    path = epath.Path(workdir) / STARTS_FILE
    with suppress(OSError, ValueError, RecursionError):
        entries = json.loads(path.read_bytes()) if is_regular_file(path) else []
        if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            return entries
    processes.log(f"{path}: it cannot be read, and is written anew")
    return []


def start_entry(step: int, hosts: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of a start now.

    Args:
      step: the step that the run starts or resumes at.
      hosts: for each process its host and its devices.
    """
    return {
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": command(),
        "versions": versions(),
        "git_commit": git_commit(pathlib.Path(dmf.__file__).parent),
        "hosts": hosts,
    }


def local_devices() -> dict[str, int]:
    """The number of devices of this process by kind, as JAX reports it."""
    return dict(collections.Counter(device.device_kind for device in jax.local_devices()))


def command() -> str:
    """The command line of this process, as it can be pasted into a shell."""
    program, *arguments = sys.argv
    path = pathlib.Path(program)
    is_ours = path.name == "dmf" or path == pathlib.Path(dmf.__file__).parent / "__main__.py"
    return shlex.join(["dmf" if is_ours else program, *arguments])


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python, of this package, and of the installed packages that it uses."""
    found = {"python": platform.python_version(), "dmf": dmf.__version__}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def git_commit(folder: pathlib.Path) -> str:
    """The commit of the git checkout whose files lie in a folder; "" without one.

    "+changes" stands behind it if a file that git tracks differs from the commit.
    """
    try:
        tracked = _git(folder, "ls-files", "__init__.py")
        commit = _git(folder, "rev-parse", "HEAD") if tracked else ""
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if commit else ""
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+changes" if changes else "")


def _git(folder: pathlib.Path, *arguments: str) -> str:
    """What a git command prints."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True,
                          check=True, stdin=subprocess.DEVNULL, timeout=_GIT_SECONDS)
    return done.stdout.strip()
