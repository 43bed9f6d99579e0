"""Runs as a SLURM array, through submitit.

A job holds one run, on one node. Before its time is up SLURM tells it; the run saves, and the job
goes back into the queue.
"""

import dataclasses
import os
import pathlib
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from etils import epath

from dmf.files import read_json, write_json
from dmf.launching import Job, note_failure
from dmf.typing import InputError, RunError, Stopped

# Below the workdir of a sweep: what submitit writes, and which job has which run.
FOLDER = "slurm"
JOBS_FILE = "jobs.json"
# What stands for the number of a job while the cluster is asked to take it.
ASKED = "asked for"
# What a cluster needs as little as any to be given: more is given as --slurm=NAME=VALUE.
TIMEOUTS = 100  # so often a run may go back into the queue
DEFAULTS = {"name": "dmf-sweep", "timeout_min": 24 * 60, "nodes": 1, "tasks_per_node": 1}


@dataclasses.dataclass
class Task:
    """What a job does: one run, whose output goes to its log."""

    job: Job
    started: int = 0

    def __call__(self) -> None:
        """Runs the job to its end.

        Raises:
          RunError: the run failed.
        """
        self.job.directory.mkdir(parents=True, exist_ok=True)
        with self.job.log.open("ab") as log:
            # SLURM sends submitit's signal to every process of a job; the run shall not die of it.
            process = subprocess.Popen(
                self.job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **_devices()}, preexec_fn=_deaf,
            )  # fmt: skip
        self.started = process.pid
        code = process.wait()
        if code not in (0, Stopped.exit_code):
            note_failure(self.job.log, code)
        if code:
            raise RunError(f"{self.job.name}: exit code {code}, see {self.job.log}")

    def checkpoint(self) -> Any:
        """What submitit calls when the job has to end: the run saves, and is queued again."""
        from submitit.helpers import DelayedSubmission

        if self.started:
            # This interrupts the call above in its own wait, whose lock it may not ask for.
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.started, signal.SIGTERM)
                os.waitpid(self.started, 0)
        return DelayedSubmission(Task(self.job))


def _deaf() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _devices() -> dict[str, str]:
    """JAX under SLURM gives a task one GPU, unless told which."""
    count = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if not count.isdigit():
        return {}
    return {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(int(count))))}


def parameters(given: str) -> dict[str, Any]:
    """submitit's parameters, from NAME=VALUE,...; whole numbers as such.

    Raises:
      InputError: something else was given.
    """
    found = {}
    for part in filter(None, given.split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise InputError(f"--slurm={given}: give NAME=VALUE,..., as timeout_min=600,"
                             "slurm_partition=gpu")
        found[name] = int(value) if value.isdigit() else value
    return found


def at_most(parallel: int) -> dict[str, int]:
    """The parameter that limits how many jobs of an array run at a time; 0 for no limit."""
    return {"slurm_array_parallelism": parallel} if parallel else {}


def submit(
    jobs: Sequence[Job],
    folder: pathlib.Path,
    given: Mapping[str, Any],
    cluster: str = "slurm",
) -> dict[str, str]:
    """Submits an array of jobs, without those that an earlier submission has under way.

    That a job is to be submitted is written down before, and its number after it: where this is
    ended between the two, the job may wait or run, and is not submitted again.

    Args:
      jobs: that are not complete.
      folder: for what submitit writes.
      given: parameters of submitit, beside `DEFAULTS`.
      cluster: as submitit names it.

    Returns:
      What became of each job, by its name.

    Raises:
      InputError: submitit is not installed, refuses a parameter, or finds no such cluster.
      RunError: the cluster refuses the jobs.
    """
    executor = _executor(folder, given, cluster)
    path = epath.Path(folder / JOBS_FILE)
    numbers = read_json(path) if path.exists() else {}
    due = [job for job in jobs if not _under_way(folder, numbers.get(job.name))]
    write_json(path, numbers | {job.name: ASKED for job in due})
    try:
        with executor.batch(allow_implicit_submissions=True):
            submitted = [executor.submit(Task(job)) for job in due]
    except RuntimeError as error:
        write_json(path, numbers)
        raise RunError(f"the cluster refuses the jobs: {_line(error)}") from None
    new = {job.name: mine.job_id for job, mine in zip(due, submitted, strict=True)}
    write_json(path, numbers | new)
    return {job.name: _told(path, numbers.get(job.name), new.get(job.name)) for job in jobs}


def _told(path: epath.Path, before: str | None, new: str | None) -> str:
    if new is not None:
        return f"job {new}, submitted"
    if before == ASKED:
        return ("an earlier command was ended while it submitted this one: see squeue; if it is "
                f"not there, remove it from {path}")
    return f"job {before}, still under way (as {path} and sacct have it)"


def _executor(folder: pathlib.Path, given: Mapping[str, Any], cluster: str) -> Any:
    try:
        import submitit
    except ImportError:
        raise InputError("--on=slurm: it needs submitit; pip install 'dmf-jax[sweep]'") from None
    try:
        executor = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(**{**DEFAULTS, **given})
    except (NameError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"--on=slurm: {_line(error)}") from None
    return executor


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _under_way(folder: pathlib.Path, number: str | None) -> bool:
    """Whether a job of an earlier submission waits or runs; one of which nothing is known may."""
    from submitit import SlurmJob

    if number == ASKED:
        return True
    return number is not None and not SlurmJob(folder, number).done(force_check=True)
