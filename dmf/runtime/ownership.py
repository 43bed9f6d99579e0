"""One owner of a workdir or an output at a time, by a lock file that no dead process keeps.

The lock file names its owner: host, process, and a token that no other owner has. While the owner
lives, a thread of it counts beats in the file. A process that finds the file of another one
replaces it if the owner is dead: on this host the kernel knows, on another host no beat comes for a
minute. This needs only files that are created exclusively, so that it holds on shared file systems
too, where `flock` may do nothing.
"""

import dataclasses
import json
import os
import pathlib
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from etils import epath

from dmf.errors import InputError
from dmf.runtime import processes, progress
from dmf.runtime.hub import is_address
from dmf.runtime.paths import user_path

# The lock file within a workdir.
LOCK_FILE = ".lock"
# Seconds between two beats of an owner, and without one until it counts as dead on another host.
BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0
_held: "set[_Lock]" = set()


@contextmanager
def owned(lock: epath.Path, field: str, subject: epath.PathLike) -> Iterator[None]:
    """A context in which this process, or the run of several processes, owns something alone.

    The directory of the lock file is created, and removed again if it stays empty. All processes
    must enter it; the first one holds the lock. Buckets (gs://...) have no locks.

    Args:
      lock: the lock file.
      field: the flag or field that names what is owned.
      subject: its value.

    Raises:
      InputError: on every process: another process owns it, the lock file cannot be written, or
        an address of the Hugging Face hub is given.
    """
    if is_address(subject):
        raise InputError(field, subject, "give a local path; of the Hugging Face hub checkpoints "
                         "are read, and dmf export --push=OWNER/REPO uploads one")
    held, failure = _Lock(pathlib.Path(os.path.abspath(lock))), ""
    if processes.is_first_process() and "://" not in os.fspath(lock):
        try:
            failure = held.acquire()
        except OSError as error:
            failure = f"it cannot be written ({error.strerror or error})"
    (failure, *_) = processes.all_gather(failure)
    if failure:
        raise InputError(field, subject, failure)
    try:
        yield
    finally:
        held.release()


def owned_output(field: str, output: epath.PathLike) -> AbstractContextManager[None]:
    """`owned` for a file or directory that is made; the lock file is hidden beside it."""
    path = user_path(output)
    return owned(path.parent / f".{path.name}.lock", field, output)


def release_all() -> None:
    """Releases all locks of this process, which is about to exit."""
    for lock in list(_held):
        lock.release()


@dataclasses.dataclass(frozen=True)
class _Owner:
    """The owner of a lock.

    Attributes:
      name: name of its host.
      machine: host, boot and process namespace, within which process numbers are unique.
      process: its process number.
      started: when the kernel started the process; "" where it does not tell.
      token: random; no other owner has it.
    """

    name: str
    machine: str
    process: int
    started: str
    token: str

    @classmethod
    def of_this_process(cls) -> "_Owner":
        boot, namespace = "", ""
        with suppress(OSError):
            boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        machine = f"{platform.node()} {boot} {namespace}"
        started = _start_of_process(os.getpid()) or ""
        return cls(platform.node(), machine, os.getpid(), started, uuid.uuid4().hex)

    @property
    def is_here(self) -> bool:
        """Whether its process number means something in this process."""
        return self.machine == _Owner.of_this_process().machine

    @property
    def lives_here(self) -> bool:
        return _start_of_process(self.process) == self.started

    def __str__(self) -> str:
        return f"process {self.process} on host {self.name}"


def _start_of_process(process: int) -> str | None:
    """When the kernel started a process, in ticks; "" without /proc; None if it has ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if pathlib.Path("/proc/self").exists() else ""
    return None if fields[0] in "ZX" else fields[19]


class _Lock:
    """A lock file, and the thread that counts its beats while it is held."""

    def __init__(self, path: pathlib.Path):
        self._path, self._made = path, ()
        self._owner, self._ended = _Owner.of_this_process(), threading.Event()

    def acquire(self) -> str:
        """Creates the lock file; the file of a dead owner is replaced.

        Returns:
          "" if this process is the owner now; else who is.

        Raises:
          OSError: the file cannot be written.
        """
        parents = self._path.parents
        self._made = tuple(path for path in parents if not path.exists())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            content = self._content()
            if content is None:
                continue
            if self._is_dead(content):
                self._remove_dead(content)
            elif self._content() is not None:  # It has not ended while it was watched.
                self._remove_directories()
                return (f"another command is writing there, {_parsed(content) or 'just started'}; "
                        "wait until it ends, or stop it")
        _held.add(self)
        threading.Thread(target=self._beat, daemon=True).start()
        return ""

    def release(self) -> None:
        """Removes the lock file if this process owns it, and directories that stayed empty."""
        if self not in _held:
            return
        _held.discard(self)
        self._ended.set()
        with suppress(OSError):
            if _parsed(self._content()) == self._owner:
                self._path.unlink()
        self._remove_directories()

    def _create(self) -> bool:
        """Creates the file if there is none; whether this process has created it.

        Raises:
          OSError: the file cannot be written, as on a full disk; none is left.
        """
        try:
            file = self._path.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(json.dumps(dataclasses.asdict(self._owner)) + f"\n{0:020}\n")
        except OSError:
            with suppress(OSError):
                self._path.unlink()
            self._remove_directories()
            raise
        return True

    def _content(self) -> bytes | None:
        """The content of the lock file; None without one. A file that is opened anew is read from
        the server of a shared file system."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _is_dead(self, content: bytes) -> bool:
        """Whether the owner is dead, after watching it for a minute if it is on another host."""
        owner = _parsed(content)
        if owner is not None and owner.is_here:
            return not owner.lives_here
        progress.log(f"{self._path.parent}: waiting up to {DEAD_SECONDS:.0f} s for a sign of life "
                     f"of {owner or 'another process'}, which was writing there")
        until = time.monotonic() + DEAD_SECONDS
        while time.monotonic() < until:
            time.sleep(min(1.0, DEAD_SECONDS))
            if self._content() != content:
                return False
        return True

    def _remove_dead(self, content: bytes) -> None:
        """Removes the lock file of a dead owner, if it is still there.

        Of several processes that find it, one at a time has its turn, so that none removes the file
        that another one has just created in its place.
        """
        turn = _Lock(self._path.with_name(f"{self._path.name}.turn"))
        if turn.acquire():
            time.sleep(0.01)
            return
        try:
            if self._content() == content:
                self._path.unlink()
        finally:
            turn.release()

    def _beat(self) -> None:
        """Counts beats in the file; exits this process if another one has replaced the file."""
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            with suppress(OSError), self._path.open("r+b") as file:
                content = file.read()
                if _parsed(content) == self._owner:
                    file.seek(content.index(b"\n") + 1)
                    file.write(f"{beat:020}".encode())
                elif not self._ended.is_set():
                    progress.log(f"dmf: {self._path.parent}: {_parsed(content)} has taken it over, "
                                 "because this process stood still: this one stops", always=True)
                    os._exit(1)

    def _remove_directories(self) -> None:
        """Removes the directories that were made for the lock file, if they are empty."""
        with suppress(OSError):
            for path in self._made:
                path.rmdir()


def _parsed(content: bytes | None) -> _Owner | None:
    """The owner that a lock file names; None if it names none yet."""
    try:
        return _Owner(**json.loads((content or b"").partition(b"\n")[0]))
    except (ValueError, TypeError):
        return None
