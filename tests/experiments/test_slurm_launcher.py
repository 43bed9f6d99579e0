"""Runs as an array: submitit's executor for this machine stands in for a cluster, where none of
this was run."""

import json
import os
import signal
import sys
import time
import types
from contextlib import contextmanager

import pytest
import tiny

from dmf.errors import InputError, RunError
from dmf.experiments import local_launcher, slurm_launcher

SAVES = """
import pathlib, signal, sys, time
again = pathlib.Path(sys.argv[1])
if again.exists():
    print("going on")
    sys.exit()
again.touch()
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(75)))
print("ready", flush=True)
time.sleep(60)
"""


def job(folder, name, code, *arguments):
    command = (sys.executable, "-c", code, *map(str, arguments))
    return local_launcher.Job(name=name, command=command, directory=folder / name)


def submit(folder, jobs):
    """The jobs as submitit knows them, by name; and what was told of them."""
    pytest.importorskip("submitit", reason="it comes with the extra `test`")
    told = slurm_launcher.submit(jobs, folder / slurm_launcher.FOLDER, {}, cluster="local")
    return json.loads((folder / slurm_launcher.FOLDER / slurm_launcher.JOBS_FILE).read_text()), told


def wait_for(path, text):
    until = time.monotonic() + 60
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < until, path
        time.sleep(0.05)


def test_jobs_run_into_their_logs_and_are_not_submitted_twice(tmp_path):
    jobs = [job(tmp_path, "good", "print('fine')"), job(tmp_path, "bad", "raise SystemExit(3)")]
    numbers, told = submit(tmp_path, jobs)
    assert told == {name: f"job {numbers[name]}, submitted" for name in ("good", "bad")}
    wait_for(tmp_path / "good/train.log", "fine\n")
    wait_for(tmp_path / "bad/train.log", f"{local_launcher.FAILURE_LINE} 3\n")
    results = [tmp_path / slurm_launcher.FOLDER / f"{n}_0_result.pkl" for n in numbers.values()]
    for path in results:
        wait = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < wait
            time.sleep(0.05)
    results[0].unlink()  # As if it were still running.
    again, told = submit(tmp_path, jobs)
    assert again["good"] == numbers["good"] and "still waiting or running" in told["good"]
    assert again["bad"] != numbers["bad"] and told["bad"].endswith("submitted")


@pytest.mark.slow
def test_a_job_that_has_to_end_saves_and_goes_on(tmp_path):
    one = job(tmp_path, "one", SAVES, tmp_path / "again")
    numbers, _ = submit(tmp_path, [one])
    log = tmp_path / "one/train.log"
    wait_for(log, "ready\n")
    # What SLURM sends before a job's time is up, to all its processes.
    for process in children(int(numbers["one"])):
        os.kill(process, signal.SIGUSR2)
    wait_for(log, "going on\n")
    assert log.read_text() == "ready\nsaved\ngoing on\n"


def children(parent):
    """The processes below one, but for it, those below first."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                above = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if above == parent:
            found += [*children(int(entry)), int(entry)]
    return found


@pytest.mark.slow
def test_a_failure_is_raised_where_the_job_runs(tmp_path):
    with pytest.raises(RunError, match="bad: exit code 3, see .*train.log"):
        slurm_launcher.Task(job(tmp_path, "bad", "raise SystemExit(3)"))()
    with pytest.raises(RunError, match="exit code 75"):
        slurm_launcher.Task(job(tmp_path, "saved", "raise SystemExit(75)"))()
    assert (tmp_path / "saved/train.log").read_text() == ""


def test_jax_is_told_all_devices_of_the_node(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    code = "import os; print(os.environ['JAX_LOCAL_DEVICE_IDS'])"
    slurm_launcher.Task(job(tmp_path, "one", code))()
    assert (tmp_path / "one/train.log").read_text() == "0,1,2,3\n"


@pytest.mark.slow
def test_a_job_has_the_process_that_slurm_made_for_it(tmp_path, monkeypatch):
    step = {"SLURM_JOB_ID": "9", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1",
            "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # fmt: skip
    for name, value in (tiny.environment() | step).items():
        monkeypatch.setenv(name, value)
    code = ("from dmf.runtime import processes; processes.initialize(); import jax; "
            "print(jax.distributed.is_initialized(), jax.process_count())")
    slurm_launcher.Task(job(tmp_path, "one", code))()
    assert (tmp_path / "one/train.log").read_text().split() == ["True", "1"]


class Cluster:
    """An executor whose cluster takes jobs, and may answer with an error."""

    def __init__(self, answer=None):
        self.taken, self._answer = [], answer

    @contextmanager
    def batch(self, allow_implicit_submissions):
        yield
        if self._answer and self.taken:
            raise self._answer

    def submit(self, task):
        self.taken.append(task.job.name)
        return types.SimpleNamespace(job_id=f"5_{len(self.taken)}")


def ask(monkeypatch, folder, names, answer=None):
    """What a cluster is asked for, and what is told."""
    pytest.importorskip("submitit", reason="it comes with the extra `test`")
    cluster = Cluster(answer)
    monkeypatch.setattr(slurm_launcher, "_executor", lambda *arguments: cluster)
    monkeypatch.setattr("submitit.SlurmJob.done", lambda *arguments, **more: False)
    try:
        jobs = [job(folder, name, "pass") for name in names]
        return cluster.taken, slurm_launcher.submit(jobs, folder, {})
    except KeyboardInterrupt:
        return cluster.taken, None


def test_what_was_being_submitted_at_a_kill_is_not_submitted_twice(tmp_path, monkeypatch):
    assert ask(monkeypatch, tmp_path, "a", KeyboardInterrupt()) == (["a"], None)
    taken, told = ask(monkeypatch, tmp_path, "ab")
    assert taken == ["b"] and told["b"] == "job 5_1, submitted"
    assert "was ended while it submitted this job: see squeue" in told["a"]
    path = tmp_path / slurm_launcher.JOBS_FILE
    assert json.loads(path.read_text()) == {"a": slurm_launcher.SUBMITTING, "b": "5_1"}
    path.write_text('{"b": "5_1"}')
    taken, told = ask(monkeypatch, tmp_path, "ab")
    assert taken == ["a"] and told["b"].startswith("job 5_1, still waiting or running")


def test_what_the_cluster_refuses_is_submitted_again(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="the cluster refuses the jobs: no such partition"):
        ask(monkeypatch, tmp_path, "a", RuntimeError("no such partition"))
    assert ask(monkeypatch, tmp_path, "a") == (["a"], {"a": "job 5_1, submitted"})


def test_parameters_are_names_and_values():
    assert slurm_launcher.parse_parameters("timeout_min=600,slurm_partition=gpu") == {
        "timeout_min": 600, "slurm_partition": "gpu"
    }
    assert slurm_launcher.parse_parameters("") == {}
    assert slurm_launcher.parse_parameters("mem=²") == {"mem": "²"}
    with pytest.raises(InputError, match="--slurm=fast: give NAME=VALUE"):
        slurm_launcher.parse_parameters("fast")


def test_what_submitit_refuses_is_one_line(tmp_path):
    pytest.importorskip("submitit", reason="it comes with the extra `test`")
    with pytest.raises(InputError, match="--launcher=slurm: .*slurm_partitoin") as error:
        slurm_launcher.submit([], tmp_path, {"slurm_partitoin": "gpu"}, cluster="local")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="--launcher=slurm: .*srun"):
        slurm_launcher.submit([], tmp_path, {})


def test_without_submitit_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install submitit"):
        slurm_launcher.submit([], tmp_path, {})
