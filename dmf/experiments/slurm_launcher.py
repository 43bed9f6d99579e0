"""Runs as a SLURM array, through submitit.

A job holds one run, on one node. Before its time is up SLURM sends a signal; the run saves, and the
job returns to the queue.
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

from dmf.errors import InputError, RunError, Stopped
from dmf.experiments.local_launcher import Job, log_failure
from dmf.runtime.files import read_json, refuse_link, write_json

# Below the workdir of a sweep: the files of submitit, and the job number of each run.
FOLDER = "slurm"
JOBS_FILE = "jobs.json"
# Stands for the number of a job while the job is being submitted.
SUBMITTING = "submitting"
# How often a run may return to the queue.
MAX_TIMEOUTS = 100
# Parameters of submitit that every cluster needs; --slurm=NAME=VALUE gives others.
DEFAULTS = {"name": "dmf-sweep", "timeout_min": 24 * 60, "nodes": 1, "tasks_per_node": 1}


@dataclasses.dataclass
class Task:
    """The function that a SLURM job calls: one run, whose output goes to its log.

    Attributes:
      job: the run.
      process: process number of the run after its start; 0 before.
    """

    job: Job
    process: int = 0

    def __call__(self) -> None:
        """Runs the job to its end.

        Raises:
          RunError: the run failed.
        """
        self.job.directory.mkdir(parents=True, exist_ok=True)
        refuse_link(self.job.log)
        with self.job.log.open("ab") as log:
            # SLURM sends submitit's signal to every process of a job, also to the run.
            process = subprocess.Popen(
                self.job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **_device_ids()}, preexec_fn=_ignore_submitit_signal,
            )  # fmt: skip
        self.process = process.pid
        code = process.wait()
        if code not in (0, Stopped.exit_code):
            log_failure(self.job.log, code)
        if code:
            raise RunError(f"{self.job.name}: exit code {code}, see {self.job.log}")

    def checkpoint(self) -> Any:
        """Lets the run save, and returns the job to the queue; submitit calls it before the job's
        time is up."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            # This interrupts `process.wait` in `__call__`, which holds the lock of the process
            # object: only its number can be used here.
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process, signal.SIGTERM)
                os.waitpid(self.process, 0)
        return DelayedSubmission(Task(self.job))


def _ignore_submitit_signal() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _device_ids() -> dict[str, str]:
    """The variable that gives a task all GPUs of its node; JAX takes one GPU by default."""
    count = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if not count.isdecimal():
        return {}
    return {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(int(count))))}


def parse_parameters(text: str) -> dict[str, Any]:
    """Parses submitit's parameters.

    >>> parse_parameters("timeout_min=600,slurm_partition=gpu")
    {'timeout_min': 600, 'slurm_partition': 'gpu'}

    Args:
      text: NAME=VALUE,...

    Raises:
      InputError: the text has another form.
    """
    parameters = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise InputError("--slurm", text, "give NAME=VALUE,..., as "
                             "timeout_min=600,slurm_partition=gpu")
        parameters[name] = int(value) if value.isdecimal() else value
    return parameters


def parallelism(parallel: int) -> dict[str, int]:
    """The parameter that limits how many jobs of an array run at a time; none for 0."""
    return {"slurm_array_parallelism": parallel} if parallel else {}


def submit(
    jobs: Sequence[Job],
    folder: pathlib.Path,
    parameters: Mapping[str, Any],
    cluster: str = "slurm",
) -> dict[str, str]:
    """Submits an array of jobs, except those of an earlier submission that wait or run.

    Before a job is submitted, `JOBS_FILE` says so, and afterwards it has the job's number. If this
    process is ended in between, the job may be in the queue, and is not submitted again.

    Args:
      jobs: jobs that are not complete.
      folder: folder for the files of submitit.
      parameters: parameters of submitit, in addition to `DEFAULTS`.
      cluster: submitit's name of the cluster.

    Returns:
      The status of each job, by its name.

    Raises:
      InputError: submitit is not installed, refuses a parameter, or finds no such cluster.
      RunError: the cluster refuses the jobs.
    """
    executor = _executor(folder, parameters, cluster)
    path = epath.Path(folder / JOBS_FILE)
    numbers = read_json(path) if path.exists() else {}
    due = [job for job in jobs if not _is_active(folder, numbers.get(job.name))]
    write_json(path, numbers | {job.name: SUBMITTING for job in due})
    try:
        with executor.batch(allow_implicit_submissions=True):
            submitted = [executor.submit(Task(job)) for job in due]
    except RuntimeError as error:
        write_json(path, numbers)
        raise RunError(f"the cluster refuses the jobs: {_one_line(error)}") from None
    new = {job.name: entry.job_id for job, entry in zip(due, submitted, strict=True)}
    write_json(path, numbers | new)
    return {job.name: _status(path, numbers.get(job.name), new.get(job.name)) for job in jobs}


def _status(path: epath.Path, before: str | None, new: str | None) -> str:
    if new is not None:
        return f"job {new}, submitted"
    if before == SUBMITTING:
        return ("an earlier command was ended while it submitted this job: see squeue; if the job "
                f"is not there, remove it from {path}")
    return f"job {before}, still waiting or running (according to {path} and sacct)"


def check_installed() -> None:
    """Raises InputError if submitit is not installed."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise InputError("--launcher", "slurm", "it needs submitit; pip install submitit") from None


def _executor(folder: pathlib.Path, parameters: Mapping[str, Any], cluster: str) -> Any:
    check_installed()
    import submitit

    try:
        executor = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(**{**DEFAULTS, **parameters})
    except (NameError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError("--launcher", "slurm", _one_line(error)) from None
    return executor


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _is_active(folder: pathlib.Path, number: str | None) -> bool:
    """Whether a job of an earlier submission waits or runs; also if that is not known."""
    from submitit import SlurmJob

    if number == SUBMITTING:
        return True
    return number is not None and not SlurmJob(folder, number).done(force_check=True)
