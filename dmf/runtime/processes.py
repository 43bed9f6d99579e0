"""The processes of a run: how they connect, compare their settings, log, and stop together.

Each host (or each GPU) runs one process, all with the same program. The first process logs and
writes what is logged and written once.
"""

import json
import os
import re
import signal
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from dmf.errors import InputError, Lost, RunError
from dmf.runtime import progress
from dmf.runtime.heartbeats import ABORT_SECONDS, LOST_MESSAGE, start_heartbeats
from dmf.runtime.signals import handle

# Seconds that processes wait for each other at the start.
START_SECONDS = 300
# Environment variables in which launchers give the number of processes; JAX reads others.
PROCESS_COUNT_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
# Every error of the runtime begins with its status code.
_STATUS_CODE = re.compile("[A-Z_]+: ")
# Words in the errors of collectives and of the coordination service after a process was lost.
_LOST_PROCESS_WORDS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "Connection",
                       "heartbeat", "peer", "task")  # fmt: skip


def initialize(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Connects this process with the others of a run, before JAX is used for anything.

    Without arguments, the environment tells JAX about the other processes: a TPU pod, SLURM, Open
    MPI or Kubernetes. Where it does not, there is one process.

    Args:
      coordinator: host:port of the first process.
      processes: number of processes.
      process: number of this process, in [0, processes).

    Raises:
      InputError: arguments that do not go together, a port that is in use, or an environment of
        several processes that does not say how they connect.
      RunError: the other processes do not connect.
    """
    if jax.distributed.is_initialized():
        return
    given = bool(coordinator), processes > 0, process >= 0
    if any(given):
        _check_flags(coordinator, processes, process)
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
            return  # JAX was used before, so that there is one process.
        reason = " ".join(str(error).split())
        this_process = f"process {process} of {processes}" if any(given) else "this process"
        raise RunError(f"{this_process} could not connect to the others at "
                       f"{coordinator or 'the coordinator'}; check that its port is free, and that "
                       f"every host reaches it ({reason[:200]})") from None
    if jax.distributed.is_initialized():
        start_heartbeats()
    else:
        _check_single_process()


def _check_flags(coordinator: str, processes: int, process: int) -> None:
    """Raises InputError for arguments of `initialize` that cannot be used."""
    if not (coordinator and processes > 0 and process >= 0):
        raise InputError(
            "--coordinator, --processes, --process",
            remedy="give all three, or none where the environment (TPU pod, SLURM, Open MPI) has "
                   "them",
        )
    if process >= processes:
        raise InputError("--process", process, f"with --processes={processes} it is between 0 and "
                         f"{processes - 1}")
    if not coordinator.rpartition(":")[2].isdecimal():
        raise InputError("--coordinator", coordinator, "give host:port of the first process")
    if process == 0:
        _check_port(coordinator)


def _check_port(coordinator: str) -> None:
    """Raises InputError if the port of the coordinator, which is this process, cannot be used; the
    runtime would crash."""
    port = int(coordinator.rpartition(":")[2])
    try:
        listener = socket.socket(socket.AF_INET6)
    except OSError:  # A kernel without IPv6.
        listener = socket.socket(socket.AF_INET)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except (OSError, OverflowError) as error:
            raise InputError("--coordinator", coordinator,
                             f"port {port} cannot be used ({error}); choose another") from None


def _check_single_process() -> None:
    """Raises InputError if the environment says that this is one of several processes."""
    for name in PROCESS_COUNT_VARIABLES:
        count = os.environ.get(name, "1")
        if count.isdecimal() and int(count) > 1:
            raise InputError(
                name, count,
                "there are several processes, and JAX does not know how they connect; give "
                f"--coordinator, --processes and --process, or unset {name} for separate runs",
            )


def is_single_process() -> bool:
    """Whether the run has one process."""
    return jax.process_count() == 1


def is_first_process() -> bool:
    """Whether this is the process that logs and writes for all."""
    return jax.process_index() == 0


def log(line: str, *, each: bool = False) -> None:
    """Prints a line to standard error.

    Args:
      line: the line.
      each: whether every process prints its own line, with its number in front; by default the
        first process prints for all.
    """
    if is_single_process():
        progress.log(line)
    elif each:
        progress.log(f"process {jax.process_index()} of {jax.process_count()}: {line}")
    elif is_first_process():
        progress.log(line)


def log_step(line: str) -> None:
    """Prints a line of a series in the first process, see `progress.log_step`."""
    if is_first_process():
        progress.log_step(line)


def show(text: str) -> None:
    """Shows a text in the live line of the first process, see `progress.show`."""
    if is_first_process():
        progress.show(text)


def all_gather(value: Any) -> list[Any]:
    """Gathers a value from every process; all processes must call it.

    >>> all_gather({"a": 1})
    [{'a': 1}]

    Args:
      value: the value of this process, which JSON can represent.

    Returns:
      The values of all processes, in the order of their numbers.
    """
    if is_single_process():
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(encoded)))))
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(encoded)] = encoded
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def barrier(name: str) -> None:
    """Returns when all processes have called it with the same name."""
    if not is_single_process():
        multihost_utils.sync_global_devices(name)


def check_same(settings: Mapping[str, Any]) -> None:
    """Checks that every process was started with the same settings.

    Args:
      settings: flags and config fields by name; values may be nested mappings.

    Raises:
      InputError: on every process; it names the first field that differs, and its values.
    """
    flat = {name: repr(value) for name, value in flatten_dict(settings, sep=".").items()}
    by_process = all_gather(flat)
    for field in sorted(set().union(*by_process)):
        values = [gathered.get(field, "unset") for gathered in by_process]
        for process, value in enumerate(values):
            if value != values[0]:
                raise InputError(
                    field,
                    remedy=f"it is {values[0]} on process 0 and {value} on process {process}; "
                           "start all processes with the same config",
                )


def check_shared(workdir: epath.Path) -> None:
    """Checks that all processes share one workdir.

    The others look for it once the first process has made it: clients of a network file system
    remember for half a minute that something was not there.

    Raises:
      InputError: on every process; it names the processes that do not see the workdir of the first
        one, or says why the first one cannot write it.
    """
    if is_single_process():
        return
    (name, *_) = all_gather(f".shared-{uuid.uuid4().hex}")
    marker, is_new, failure = workdir / name, False, ""
    if is_first_process():
        is_new = not workdir.exists()
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            marker.touch()
        except OSError as error:
            failure = error.strerror or str(error)
    (failure, *_) = all_gather(failure)
    if failure:
        raise InputError("workdir", workdir, f"it cannot be written ({failure})")
    visible = all_gather(marker.exists())
    if is_first_process():
        marker.unlink()
        if is_new and not all(visible):
            workdir.rmdir()
    missing = [str(process) for process, sees_it in enumerate(visible) if not sees_it]
    if missing:
        raise InputError(
            "workdir", workdir,
            f"not every host sees it (process {', '.join(missing)} does not); give a directory on "
            "a shared file system, or a bucket as gs://...",
        )


class StopSignal:
    """A context in which SIGTERM, SIGHUP and Ctrl-C ask the run to stop after the current step.

    It listens once there is something to save. SIGTERM announces that the machine will be taken
    away. Whichever process receives a signal, all of them stop after the same step. Ctrl-C a second
    time raises KeyboardInterrupt, without a save.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous_handlers: dict[int, Any] = {}
        self._wakeup_file = -1

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._previous_handlers:
            signal.set_wakeup_fd(self._wakeup_file)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Starts to listen, in the main thread; in other threads it does nothing."""
        # JAX listens to SIGTERM in each of several processes.
        several = jax.distributed.is_initialized()
        for number in (signal.SIGINT, signal.SIGHUP, *(() if several else (signal.SIGTERM,))):
            previous = handle(number, self._forward if several else self._receive)
            if previous is not None:
                self._previous_handlers[number] = previous
        if self._previous_handlers:
            self._wakeup_file = signal.set_wakeup_fd(-1)

    def _receive(self, number: int, _: Any) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True

    def _forward(self, number: int, _: Any) -> None:
        self._receive(number, None)
        os.kill(os.getpid(), signal.SIGTERM)

    def after(self, step: int) -> bool:
        """Whether to stop after a step; every process must call it after every step."""
        if not jax.distributed.is_initialized():
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def runtime_errors() -> Iterator[None]:
    """Turns errors of the runtime about a lost process or device memory into one line.

    Raises:
      Lost: another process was lost.
      RunError: a device is out of memory.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # jit raises either.
        reason = " ".join(str(error).split())
        if not _STATUS_CODE.match(reason):
            raise
        if "RESOURCE_EXHAUSTED" in reason:
            raise RunError("out of device memory: raise gradient_accumulation or mesh.fsdp, or set "
                           "model.remat=dots or full; dmf compile prints the memory that a step "
                           f"takes ({reason[:200]})") from None
        if is_single_process() or not any(word in reason for word in _LOST_PROCESS_WORDS):
            raise
        raise Lost(f"{LOST_MESSAGE} ({reason[:200]})") from None
