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
from dmf.typing import InputError, Lost, RunError, Stopped

# Each process shows a sign of life so often; after so long without one it counts as lost.
BEAT_SECONDS = 5
LOST_SECONDS = 30
_SIGNS = "dmf/signs"
# The runtime's own limit, after which it aborts: later, so that ours is the one that speaks.
ABORT_SECONDS = 55
# So long processes wait for each other at the start.
START_SECONDS = 300
# A process that fails waits so long for the others to fail of the same, and leaves; one that was
# told to stop waits longer, for what the others are saving.
LEAVE_SECONDS = 5
SAVE_SECONDS = 60
_LOST = ("another process of the run was lost: ended; start all of them again, and the run goes on "
         "from its last checkpoint")
# The mark of a process that failed, and is about to leave, beside its signs of life.
_FAILED = " failed"
_leaving = threading.Event()
# How many processes there are by those who may have started them, where JAX knows the way they find
# each other by other variables alone.
COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
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
      InputError: flags that do not go together, a port that is taken, or an environment of several
        processes that does not say how they find each other.
      RunError: the others do not come.
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
        who = f"process {process} of {processes}" if any(given) else "this process"
        raise RunError(f"{who} could not meet the others at "
                       f"{coordinator or 'the coordinator'}: is its port free, and does every "
                       f"host reach it? ({reason[:200]})") from None
    if jax.distributed.is_initialized():
        mine = jax.process_index()
        _show(mine, "0")
        threading.Thread(target=_watch, args=(mine,), daemon=True).start()
    else:
        _check_alone()


def _check_alone() -> None:
    """Raises InputError where the environment says that this is one of several processes."""
    for name in COUNTS:
        count = os.environ.get(name, "1")
        if count.isdigit() and int(count) > 1:
            raise InputError(f"{name}={count}: there are several processes, and JAX does not know "
                             "how they find each other here; give --coordinator, --processes and "
                             f"--process, or unset {name} for runs that are each alone")


def _show(mine: int, sign: str, mark: str = "") -> Any:
    """Shows a sign of this process to all; returns the service that keeps those of all."""
    client = ocp.multihost.get_jax_distributed_client()
    client.key_value_set(f"{_SIGNS}/process {mine}{mark}", sign, allow_overwrite=True)
    return client


def _watch(mine: int) -> None:
    """Ends this process once another one is lost or has failed, whatever this one is waiting for
    by then.

    A collective fails at once where a process is gone; a barrier, in which a checkpoint is saved,
    waits until the runtime aborts.
    """
    heard: dict[str, tuple[str, float]] = {}
    for beat in itertools.count(1):
        try:
            signs = _show(mine, str(beat)).key_value_dir_get(_SIGNS)
        except (jax.errors.JaxRuntimeError, ValueError):  # The latter where this one has left.
            return  # The run has ended, or the first process is gone, which the runtime says.
        now = time.monotonic()
        for name, sign in signs:
            process = name.rpartition("/")[2]
            if process not in heard or heard[process][0] != sign:
                heard[process] = sign, now
        failed = [process for process in heard if process.endswith(_FAILED)]
        lost = [process for process, (_, when) in heard.items() if now - when > LOST_SECONDS]
        if failed and not _leaving.wait(LEAVE_SECONDS):  # of the same, perhaps, and says more of it
            _end(mine, f"{failed[0]}, and says why")
        elif lost and not failed:
            _end(mine, f"no sign of life of {', '.join(lost)} for {LOST_SECONDS} s")
        time.sleep(BEAT_SECONDS)


def _end(mine: int, reason: str) -> None:
    """Says why this process ends, which waits for what will not come, and ends it."""
    print(f"dmf: {_LOST} ({reason})", file=sys.stderr, flush=True)
    if mine == 0:
        time.sleep(BEAT_SECONDS + 1)  # The others speak before their coordinator is gone.
    os._exit(1)


def _check_free(coordinator: str) -> None:
    """Checks that the port of the coordinator, which is this process, is free; the runtime would
    crash on it."""
    port = int(coordinator.rpartition(":")[2])
    try:
        opened = socket.socket(socket.AF_INET6)
    except OSError:  # a kernel without it
        opened = socket.socket(socket.AF_INET)
    with opened as listener:
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


def wait_for_all(name: str) -> None:
    """Returns when all processes of the run are here."""
    if not alone():
        multihost_utils.sync_global_devices(name)


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
      InputError: on every process; it names those that do not, or says why the first cannot write.
    """
    if alone():
        return
    (name, *_) = gathered(f".seen-by-all-{uuid.uuid4().hex}")
    mark, made, trouble = directory / name, not directory.exists(), ""
    if first():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            trouble = error.strerror or str(error)
    (trouble, *_) = gathered(trouble)
    if trouble:
        raise InputError(f"workdir={directory}: it cannot be written ({trouble})")
    seen = gathered(mark.exists())
    if first():
        mark.unlink()
        if made and not all(seen):
            directory.rmdir()
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
        if not jax.distributed.is_initialized():
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
        if not jax.distributed.is_initialized():
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
    """Ends a process of several that failed; the others hear of it, and end too.

    Args:
      code: to exit with; after that of `Stopped` the others, told as well, may still be saving.
    """
    if not jax.distributed.is_initialized():
        return
    _leaving.set()
    stopped = code == Stopped.exit_code
    mine, seconds = jax.process_index(), SAVE_SECONDS if stopped else LEAVE_SECONDS
    try:
        client = _show(mine, "stopped") if stopped else _show(mine, str(code), _FAILED)
        client.wait_at_barrier("dmf/leave", 1000 * seconds)
    except jax.errors.JaxRuntimeError:  # They are waiting for something else, or gone.
        if mine == 0:
            time.sleep(BEAT_SECONDS + LEAVE_SECONDS + 1)  # Without their coordinator they crash.
    else:
        _part(code)
    _exit(code)


def _part(code: int) -> None:
    """Takes leave of the others, who are all leaving; the first waits until each has done so, as
    one that is only on its way out still crashes without its coordinator."""
    late = threading.Timer(LEAVE_SECONDS, _exit, (code,))
    late.daemon = True
    late.start()
    with suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
