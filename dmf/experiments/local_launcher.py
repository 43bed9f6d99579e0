"""Runs as processes of this machine: some at a time, each with its share of the devices.

Each run writes to its own log. When this process receives a signal to stop, it passes the signal on
and waits until the runs have saved. All of them hold one lock, so that a later sweep notices runs
that are still going on, even after the process that started them was killed.
"""

import collections
import dataclasses
import fcntl
import glob
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from dmf.errors import InputError, RunError, Stopped
from dmf.runtime import processes, progress
from dmf.runtime.files import refuse_link
from dmf.runtime.signals import handle

LOG_FILE = "train.log"
LOCK_FILE = ".sweep.lock"
# The beginning of the last line in the log of a run that failed.
FAILURE_LINE = "dmf sweep: failed with exit code"
# Device files of TPU chips, before and since v5.
TPU_DEVICE_FILES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
# Environment variables from which `jax.distributed` concludes that there are several processes:
# those of SLURM, Open MPI, Kubernetes, and JAX itself. Those that say which chips a TPU host has
# are not among them.
MULTIPROCESS_VARIABLES = frozenset({
    "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID",
    "OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
    "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_ADDRESS", *processes.PROCESS_COUNT_VARIABLES,
})  # fmt: skip
POLL_SECONDS = 0.1
PROGRESS_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run to be started.

    Attributes:
      name: name of the run.
      command: program and arguments.
      directory: workdir of the run, which holds its log.
    """

    name: str
    command: tuple[str, ...]
    directory: pathlib.Path

    @property
    def log(self) -> pathlib.Path:
        """The file of the run's output, to which every attempt appends."""
        return self.directory / LOG_FILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceShare:
    """The devices of one of several processes.

    Attributes:
      variables: environment variables that name its GPUs.
      cores: its CPU cores; empty for all.
    """

    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cores: frozenset[int] = frozenset()


def visible_gpus() -> list[str]:
    """The numbers or names of the GPUs that JAX would use here; no GPU is initialized."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return []


def uses_cpu() -> bool:
    """Whether JAX would use the CPU here: JAX_PLATFORMS says so, or there is no GPU and no TPU."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return True
    return not (visible_gpus() or _has_tpu())


def _has_tpu() -> bool:
    """Whether JAX would use TPU chips here, if there are no GPUs."""
    is_cpu = os.environ.get("JAX_PLATFORMS", "") == "cpu"
    return not is_cpu and any(map(glob.glob, TPU_DEVICE_FILES))


def device_shares(parallel: int, gpus: Sequence[str]) -> list[DeviceShare]:
    """Divides the devices into equal shares, so that a run that resumes computes the same numbers.

    Args:
      parallel: number of processes that run at a time.
      gpus: names of the GPUs; without GPUs the CPU cores are divided. If there are more processes
        than cores, every process may use all cores.

    Returns:
      One share for each process.

    Raises:
      InputError: there are fewer GPUs than processes, or several for the chips of a TPU host.
    """
    if parallel < 1:
        raise InputError("--parallel", parallel, "give 1 or more")
    if parallel > 1 and not gpus and _has_tpu():
        raise InputError("--parallel", parallel, "one process takes all TPU chips of this host; "
                         "give 1, or set JAX_PLATFORMS=cpu")
    if 0 < len(gpus) < parallel:
        raise InputError("--parallel", parallel, f"there are {len(gpus)} GPUs here, and each run "
                         "needs one of its own; give as many or fewer")
    if gpus:
        return [DeviceShare(variables={"CUDA_VISIBLE_DEVICES": ",".join(part)})
                for part in _equal_parts(list(gpus), parallel)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [DeviceShare(cores=frozenset(part)) for part in _equal_parts(cores, parallel)]


def _equal_parts(items: list[Any], parts: int) -> list[list[Any]]:
    """Equal parts of a list; the remainder is in none."""
    size = len(items) // parts
    return [items[i * size : (i + 1) * size] for i in range(parts)]


@contextmanager
def sweep_lock(workdir: pathlib.Path) -> Iterator[int]:
    """Locks the workdir of a sweep; yields the file descriptor that runs inherit to hold the lock.

    Raises:
      InputError: another process holds the lock, or its file is a symbolic link.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    refuse_link(workdir / LOCK_FILE)
    with (workdir / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("workdir", workdir, "another sweep, or a run that it has left behind, "
                             "is still going on there; wait for it or end it") from None
        except OSError:  # Some shared disks have no such locks; each run still owns its workdir.
            pass
        yield file.fileno()


class _StopSignals:
    """Counts the signals to stop that this process receives, and keeps the last one."""

    def __init__(self) -> None:
        self.signal, self.count = 0, 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            previous = handle(number, self._receive)
            if previous is not None:
                self._handlers[number] = previous
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        self.signal, self.count = number, self.count + 1


class JobPool:
    """Runs jobs; each share of the devices takes the next job as soon as it is free.

    Attributes:
      failures: last line of the log of each failed job, by its name.
    """

    def __init__(self, jobs: Sequence[Job], shares: Sequence[DeviceShare], lock: int):
        """Queues the jobs.

        Args:
          jobs: in the order in which they are started.
          shares: one for each process at a time.
          lock: file descriptor that the processes inherit.
        """
        self._waiting, self._total = collections.deque(jobs), len(jobs)
        self._free, self._lock = list(shares)[::-1], lock
        self._running: list[tuple[Job, DeviceShare, subprocess.Popen[bytes]]] = []
        self._completed = self._forwarded = 0
        self._logged = time.monotonic()
        self.failures: dict[str, str] = {}

    def run(self) -> None:
        """Runs all jobs; a job that fails stops no other.

        Raises:
          KeyboardInterrupt, Stopped: this process received a signal to stop, and all jobs ended.
        """
        try:
            with _StopSignals() as stop:
                while self._running or (self._waiting and not stop.count):
                    self._poll(stop)
        finally:
            for _, _, process in self._running:
                process.terminate()
            for _, _, process in self._running:
                process.wait()
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.signal:
            raise Stopped(f"stopped after {self._completed} of {self._total} runs; the same "
                          "command resumes the sweep")

    def _poll(self, stop: _StopSignals) -> None:
        """Starts jobs on free shares, forwards signals, and collects jobs that ended."""
        while self._waiting and self._free and not stop.count:
            self._start(self._waiting.popleft(), self._free.pop())
        time.sleep(POLL_SECONDS)
        if stop.count > self._forwarded:
            self._forwarded = stop.count
            self._forward_signal(kill=stop.count > 1)
        for entry in list(self._running):
            job, share, process = entry
            if process.poll() is not None:
                self._running.remove(entry)
                self._free.append(share)
                self._end(job, process.returncode, stopping=stop.count > 0)
        self._log_progress()

    def _start(self, job: Job, share: DeviceShare) -> None:
        job.directory.mkdir(parents=True, exist_ok=True)
        refuse_link(job.log)
        with job.log.open("ab") as log:
            # A session of its own: the terminal interrupts this process only, which forwards it.
            process = subprocess.Popen(
                job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=_single_process_environment() | share.variables, start_new_session=True,
                pass_fds=(self._lock,),
            )  # fmt: skip
        self._running.append((job, share, process))
        if share.cores:
            with suppress(OSError):  # Threads that it starts later inherit its cores.
                os.sched_setaffinity(process.pid, share.cores)
        progress.log(f"{job.name}: started, see {job.log}")

    def _forward_signal(self, *, kill: bool) -> None:
        """Asks the runs to save and stop; the second time, kills them."""
        progress.log(f"{'killing' if kill else 'stopping'} {len(self._running)} runs")
        for _, _, process in self._running:
            process.kill() if kill else process.terminate()

    def _end(self, job: Job, code: int, *, stopping: bool) -> None:
        self._completed += code == 0
        if code and not stopping:
            self.failures[job.name] = last_log_line(job.log)
        if code not in (0, Stopped.exit_code) and not stopping:
            log_failure(job.log, code)
        outcome = "stopped" if stopping else f"failed with exit code {code}"
        left = len(self._waiting) + len(self._running)
        progress.log(f"{job.name}: {outcome if code else 'complete'}; {self._completed} of "
                     f"{self._total} complete, {len(self.failures)} failed, {left} to go")

    def _log_progress(self) -> None:
        if time.monotonic() - self._logged >= PROGRESS_SECONDS:
            self._logged = time.monotonic()
            for job, _, _ in self._running:
                progress.log(f"{job.name}: {last_log_line(job.log)}")


def _single_process_environment() -> dict[str, str]:
    """The environment of a run: a single process, even if this process is one of several."""
    return {name: value for name, value in os.environ.items() if name not in MULTIPROCESS_VARIABLES}


def log_failure(log: pathlib.Path, code: int) -> None:
    """Appends the exit code of a failed run to its log, for reports."""
    with log.open("a") as file:
        file.write(f"{FAILURE_LINE} {code}\n")


def last_log_line(log: pathlib.Path) -> str:
    """The last line of a log that is neither blank nor that of `log_failure`; "" without one."""
    with suppress(OSError):
        lines = map(str.strip, log.read_text(errors="replace").splitlines())
        return next((line for line in reversed(list(lines))
                     if line and not line.startswith(FAILURE_LINE)), "")
    return ""


def report_failures(failures: Mapping[str, str], total: int) -> None:
    """Logs the failed runs, each with the last line of its log.

    Args:
      failures: last lines by the name of the run.
      total: number of runs of the sweep.

    Raises:
      RunError: there are failed runs.
    """
    for name, line in failures.items():
        progress.log(f"{name}: {line}")
    if failures:
        raise RunError(f"{len(failures)} of {total} runs failed: {', '.join(failures)}; the same "
                       "command starts them again")
