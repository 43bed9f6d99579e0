"""The processes of a run: how they find each other, agree, stop together, and end together.

One process runs on each host (or for each GPU), all of them the same program. The first one says
and writes what is said and written once. Whatever happens to one process ends the others within a
minute, with a message; what was saved before is whole.
"""

import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from dmf import logs
from dmf.typing import InputError, Lost, RunError

# Each process shows a sign of life so often; after so long without one it counts as lost.
BEAT_SECONDS = 5
LOST_SECONDS = 30
_SIGNS = "dmf/signs"
# The runtime's own limit, after which it aborts: later, so that ours is the one that speaks.
ABORT_SECONDS = 55
# So long processes wait for each other at the start.
START_SECONDS = 300
# A process that fails waits so long for the others to fail of the same, and leaves.
LEAVE_SECONDS = 5
_LOST = ("another process of the run was lost: ended; start all of them again, and the run goes on "
         "from its last checkpoint")
# How a message of the runtime begins.
_STATUS = re.compile("[A-Z_]+: ")
# What collectives and the coordination service say then.
_OF_A_LOST_PROCESS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "Connection",
                      "heartbeat", "peer", "task")  # fmt: skip


def join(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Makes this process one of a run's, before JAX is used for anything.

    Without flags the environment says which run: that of a TPU pod, SLURM, Open MPI or Kubernetes.
    Where it says nothing, the process is alone.

    Args:
      coordinator: host:port of the first process.
      processes: how many there are.
      process: which of them this one is, from 0.

    Raises:
      InputError: flags that do not go together.
      RunError: the others do not come, or the port is taken.
    """
    if jax.distributed.is_initialized():
        return
    given = bool(coordinator), processes > 0, process >= 0
    if any(given) and not all(given):
        raise InputError("--coordinator, --processes, --process: give all three, or none where "
                         "the environment (TPU pod, SLURM, Open MPI) says them")
    if all(given) and process >= processes:
        raise InputError(f"--process={process}: they count from 0 to {processes - 1}, as "
                         f"--processes={processes}")
    if all(given) and not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator={coordinator}: give host:port of the first process")
    if process == 0:
        _check_free(coordinator)
    flags = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    try:
        jax.distributed.initialize(
            **(flags if any(given) else {}),
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=ABORT_SECONDS,
        )
    except ValueError:
        if any(given):
            raise
    except RuntimeError as error:
        if not any(given) and "before" in str(error):
            return  # A program that has used JAX already is alone unless it joined by itself.
        reason = " ".join(str(error).split())
        raise RunError(f"process {max(process, 0)} of {processes} could not meet the others at "
                       f"{coordinator or 'the coordinator'}: is its port free, and does every "
                       f"host reach it? ({reason[:200]})") from None
    if jax.distributed.is_initialized():
        mine = jax.process_index()
        _show(mine, 0)
        threading.Thread(target=_watch, args=(mine,), daemon=True).start()


def _show(mine: int, beat: int) -> Any:
    """Shows a sign of life of this process; returns the service that keeps those of all."""
    client = ocp.multihost.get_jax_distributed_client()
    client.key_value_set(f"{_SIGNS}/process {mine}", str(beat), allow_overwrite=True)
    return client


def _watch(mine: int) -> None:
    """Ends this process once another one is lost, whatever this one is waiting for by then.

    A collective fails at once where a process is gone; a barrier, in which a checkpoint is saved,
    waits until the runtime aborts.
    """
    heard: dict[str, tuple[str, float]] = {}
    for beat in itertools.count(1):
        try:
            signs = _show(mine, beat).key_value_dir_get(_SIGNS)
        except jax.errors.JaxRuntimeError:
            return  # The run has ended, or the first process is gone, which the runtime says.
        now = time.monotonic()
        for name, sign in signs:
            process = name.rpartition("/")[2]
            if process not in heard or heard[process][0] != sign:
                heard[process] = sign, now
        lost = [process for process, (_, when) in heard.items() if now - when > LOST_SECONDS]
        if lost:
            reason = f"no sign of life of {', '.join(lost)} for {LOST_SECONDS} s"
            print(f"dmf: {_LOST} ({reason})", file=sys.stderr, flush=True)
            if mine == 0:
                time.sleep(BEAT_SECONDS + 1)  # The others speak before their coordinator is gone.
            os._exit(1)
        time.sleep(BEAT_SECONDS)


def _check_free(coordinator: str) -> None:
    """Checks that the port of the coordinator, which is this process, is free; the runtime would
    crash on it."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except (OSError, OverflowError) as error:
            raise InputError(f"--coordinator={coordinator}: port {port} cannot be used here "
                             f"({error}); choose another") from None


def alone() -> bool:
    """Whether there is one process."""
    return jax.process_count() == 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def say(line: str, *, each: bool = False) -> None:
    """Prints a line of progress: the first process for all, or each one for itself."""
    if alone():
        logs.say(line)
    elif each:
        logs.say(f"process {jax.process_index()} of {jax.process_count()}: {line}")
    elif first():
        logs.say(line)


def gathered(value: Any) -> list[Any]:
    """What each process holds of a value that JSON can tell, in the order of the processes."""
    if alone():
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(mine)))))
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(mine)] = mine
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def check_same(given: Mapping[str, Any]) -> None:
    """Checks that every process was started with the same flags and config, by their names.

    Raises:
      InputError: on every process; it names the first field that differs, and who has what.
    """
    flat = {name: repr(value) for name, value in flatten_dict(given, sep=".").items()}
    all_of_them = gathered(flat)
    for field in sorted(set().union(*all_of_them)):
        values = [theirs.get(field, "unset") for theirs in all_of_them]
        for process, value in enumerate(values):
            if value != values[0]:
                raise InputError(f"{field}: it is {values[0]} on process 0 and {value} on "
                                 f"process {process}; start all with the same config")


def check_shared(directory: epath.Path) -> None:
    """Checks that every process sees the directory that the first one sees.

    Raises:
      InputError: on every process; it names those that do not.
    """
    if alone():
        return
    (name, *_) = gathered(f".seen-by-all-{uuid.uuid4().hex}")
    mark = directory / name
    if first():
        directory.mkdir(parents=True, exist_ok=True)
        mark.touch()
    gathered(True)
    seen = gathered(mark.exists())
    if first():
        mark.unlink()
    blind = [str(process) for process, sees in enumerate(seen) if not sees]
    if blind:
        raise InputError(f"workdir={directory}: not every host sees it (process {', '.join(blind)} "
                         "does not); give a directory on a file system that all share, or a "
                         "bucket as gs://...")


class StopSignal:
    """Whether the run was told to stop (SIGTERM: the machine is about to be taken away).

    Whichever process is told, all of them stop after the same step.
    """

    def __init__(self) -> None:
        self._told = False
        self._before: Any = None

    def __enter__(self) -> "StopSignal":
        if alone():
            # In another thread than the main one, whoever started it sees to signals.
            with suppress(ValueError):
                self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, *_: Any) -> None:
        self._told = True

    def after(self, step: int) -> bool:
        """Whether to stop after this step; every process must ask after every step."""
        if alone():
            return self._told
        return multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def runtime_errors() -> Iterator[None]:
    """Turns what the runtime raises where a process is lost, or memory is short, into one line.

    Raises:
      Lost: another process is gone.
      RunError: a device has not the memory.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # jit raises either.
        reason = " ".join(str(error).split())
        if not _STATUS.match(reason):
            raise
        if "RESOURCE_EXHAUSTED" in reason:
            raise RunError("a device has not the memory for a step: raise accumulation or "
                           "mesh.fsdp, or set model.remat=dots or full; dmf compile says what a "
                           f"step takes ({reason[:200]})") from None
        if alone() or not any(sign in reason for sign in _OF_A_LOST_PROCESS):
            raise
        raise Lost(f"{_LOST} ({reason[:200]})") from None


def leave(code: int) -> None:
    """Ends a process that failed, at once; the others do not wait for it."""
    if not jax.distributed.is_initialized():
        return
    with suppress(Exception):  # They go on, or are lost.
        ocp.multihost.sync_global_processes("leave", timeout=LEAVE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
