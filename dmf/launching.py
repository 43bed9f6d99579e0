"""Runs as processes of this machine: so many at a time, each with its share of the devices.

Each writes to a log of its own. When this process is told to stop, they are told too, save, and are
waited for. A lock that all of them hold tells whether some are still at it, whatever became of the
process that started them.
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

from dmf import hosts, logs
from dmf.typing import InputError, RunError, Stopped

LOG_FILE = "train.log"
LOCK_FILE = ".sweep.lock"
# How the log of a run that failed ends.
FAILED = "dmf sweep: failed with exit code"
# What TPU chips are to Linux, before and since v5.
TPUS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
# By these `jax.distributed` takes a process for one of several: under SLURM, Open MPI, Kubernetes,
# or as JAX itself is told. What says which chips a TPU host has is not among them.
OF_SEVERAL = frozenset({
    "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID",
    "OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
    "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_ADDRESS", *hosts.COUNTS,
})  # fmt: skip
POLL_SECONDS = 0.1
SAY_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run to be started.

    Attributes:
      name: what to call it.
      command: and arguments.
      directory: of the run; its log lies there.
    """

    name: str
    command: tuple[str, ...]
    directory: pathlib.Path

    @property
    def log(self) -> pathlib.Path:
        """What the run has said, each time it went on."""
        return self.directory / LOG_FILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What one of several processes may use: some GPUs by environment variable, or some cores."""

    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cores: frozenset[int] = frozenset()


def gpus() -> list[str]:
    """The GPUs that JAX would use here, by number or name; asks no library that would take them."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return []


def on_cpu() -> bool:
    """Whether JAX would use the CPU here: it is told to, or there is neither a GPU nor a TPU."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return True
    return not (gpus() or any(map(glob.glob, TPUS)))


def shares(parallel: int, found: Sequence[str]) -> list[Share]:
    """Equal shares for so many processes: of the GPUs that were found, or else of the cores.

    Equal, so that a run that goes on computes as before. With more processes than cores, all cores
    are everybody's.

    Raises:
      InputError: there are fewer GPUs than processes.
    """
    if parallel < 1:
        raise InputError(f"--parallel={parallel}: give 1 or more")
    if 0 < len(found) < parallel:
        raise InputError(f"--parallel={parallel}: there are {len(found)} GPUs here, and each run "
                         "needs one of its own; give as many or fewer")
    if found:
        return [Share(variables={"CUDA_VISIBLE_DEVICES": ",".join(mine)})
                for mine in _cut(list(found), parallel)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [Share(cores=frozenset(mine)) for mine in _cut(cores, parallel)]


def _cut(things: list[Any], parts: int) -> list[list[Any]]:
    """Equal parts; what is left over is nobody's."""
    size = len(things) // parts
    return [things[i * size : (i + 1) * size] for i in range(parts)]


@contextmanager
def claimed(workdir: pathlib.Path) -> Iterator[int]:
    """Holds the lock of a directory; gives the file that processes must inherit to hold it too.

    Raises:
      InputError: another process holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"workdir={workdir}: another sweep, or a run that one has left "
                             "behind, still goes on there; wait for it or end it") from None
        yield file.fileno()


class _Told:
    """Whether this process was told to stop: by SIGINT or SIGTERM, and how often."""

    def __init__(self) -> None:
        self.signal, self.times = 0, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Told":
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # In another thread, whoever started it sees to signals.
                self._before[number] = signal.signal(number, self._tell)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _tell(self, number: int, _: Any) -> None:
        self.signal, self.times = number, self.times + 1


class Pool:
    """Runs jobs, each share taking the next one as soon as it is free."""

    def __init__(self, jobs: Sequence[Job], shares: Sequence[Share], lock: int):
        """Takes note of what to run.

        Args:
          jobs: in the order in which they are started.
          shares: one for each process at a time.
          lock: a file that the processes inherit.
        """
        self._waiting, self._total = collections.deque(jobs), len(jobs)
        self._free, self._lock = list(shares)[::-1], lock
        self._running: list[tuple[Job, Share, subprocess.Popen[bytes]]] = []
        self._ended = self._heard = 0
        self._said = time.monotonic()
        self.failures: dict[str, str] = {}

    def run(self) -> None:
        """Runs all of them; one that fails stops no other.

        Raises:
          KeyboardInterrupt, Stopped: this process was told to stop, and all have ended.
        """
        try:
            with _Told() as told:
                while self._running or (self._waiting and not told.times):
                    self._turn(told)
        finally:
            for _, _, process in self._running:
                process.terminate()
        if told.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if told.signal:
            raise Stopped(f"told to stop after {self._ended} of {self._total} runs; the same "
                          "command goes on")

    def _turn(self, told: _Told) -> None:
        while self._waiting and self._free and not told.times:
            self._start(self._waiting.popleft(), self._free.pop())
        time.sleep(POLL_SECONDS)
        if told.times > self._heard:
            self._heard = told.times
            self._pass_on(kill=told.times > 1)
        for entry in list(self._running):
            if entry[2].poll() is not None:
                self._running.remove(entry)
                self._free.append(entry[1])
                self._end(entry[0], entry[2].returncode, stopping=told.times > 0)
        self._progress()

    def _start(self, job: Job, share: Share) -> None:
        job.directory.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            # In a session of its own, a run hears of an interruption from this process alone.
            process = subprocess.Popen(
                job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=_alone() | share.variables, start_new_session=True,
                pass_fds=(self._lock,),
            )  # fmt: skip
        self._running.append((job, share, process))
        if share.cores:
            with suppress(OSError):  # Threads that it starts later inherit its cores.
                os.sched_setaffinity(process.pid, share.cores)
        logs.say(f"{job.name}: started, see {job.log}")

    def _pass_on(self, *, kill: bool) -> None:
        """Tells the runs to save and stop; the second time, ends them."""
        logs.say(f"{'ending' if kill else 'stopping'} {len(self._running)} runs")
        for _, _, process in self._running:
            process.kill() if kill else process.terminate()

    def _end(self, job: Job, code: int, *, stopping: bool) -> None:
        self._ended += code == 0
        if code and not stopping:
            self.failures[job.name] = last_line(job.log)
        if code not in (0, Stopped.exit_code) and not stopping:
            note_failure(job.log, code)
        how = "stopped" if stopping else f"failed with exit code {code}"
        left = len(self._waiting) + len(self._running)
        logs.say(f"{job.name}: {how if code else 'complete'}; {self._ended} of {self._total} "
                 f"complete, {len(self.failures)} failed, {left} to go")

    def _progress(self) -> None:
        if time.monotonic() - self._said >= SAY_SECONDS:
            self._said = time.monotonic()
            for job, _, _ in self._running:
                logs.say(f"{job.name}: {last_line(job.log)}")


def _alone() -> dict[str, str]:
    """The environment of a run, which is alone whatever this process is one of."""
    return {name: value for name, value in os.environ.items() if name not in OF_SEVERAL}


def note_failure(log: pathlib.Path, code: int) -> None:
    """Ends a log with a line that says how the run ended, for reports."""
    with log.open("a") as file:
        file.write(f"{FAILED} {code}\n")


def last_line(log: pathlib.Path) -> str:
    """The last line of a log that says something, but for how the run ended; empty without one."""
    with suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip() and not line.startswith(FAILED)]
        return said[-1] if said else ""
    return ""


def told_failures(failures: Mapping[str, str], total: int) -> None:
    """Lists runs that failed, each with the last line of its log.

    Raises:
      RunError: there are some.
    """
    for name, line in failures.items():
        logs.say(f"{name}: {line}")
    if failures:
        raise RunError(f"{len(failures)} of {total} runs failed: {', '.join(failures)}; the same "
                       "command starts them again")
