"""Processes side by side: what each may use, what becomes of one that fails, and how all stop."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny

from dmf.errors import InputError, RunError, Stopped
from dmf.experiments import local_launcher

SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(75)))
print("ready", flush=True)
time.sleep(60)
"""


def job(folder, name, code):
    command = (sys.executable, "-c", code)
    return local_launcher.Job(name=name, directory=folder / name, command=command)


def pool(folder, jobs, parallel=1, gpus=()):
    shares = local_launcher.device_shares(parallel, list(gpus))
    with local_launcher.sweep_lock(folder) as lock:
        job_pool = local_launcher.JobPool(jobs, shares, lock)
        job_pool.run()
    return job_pool


def wait_for(path, text):
    until = time.monotonic() + 30
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < until, path
        time.sleep(0.02)


def test_one_that_fails_stops_no_other(tmp_path, capsys):
    jobs = [
        job(tmp_path, "bad", "print('why'); print(); raise SystemExit(3)"),
        job(tmp_path, "stopped", "print('told to stop'); raise SystemExit(75)"),
        job(tmp_path, "good", "print('fine')"),
    ]
    made = pool(tmp_path, jobs)
    assert made.failures == {"bad": "why", "stopped": "told to stop"}
    assert (tmp_path / "good/train.log").read_text() == "fine\n"
    assert (tmp_path / "bad/train.log").read_text().endswith(f"{local_launcher.FAILURE_LINE} 3\n")
    assert local_launcher.last_log_line(jobs[0].log) == "why"
    assert local_launcher.FAILURE_LINE not in (tmp_path / "stopped/train.log").read_text()
    said = capsys.readouterr().err
    assert "good: complete; 1 of 3 complete, 2 failed, 0 to go" in said
    with pytest.raises(RunError, match="2 of 3 runs failed: bad, stopped"):
        local_launcher.report_failures(made.failures, 3)
    assert "bad: why" in capsys.readouterr().err


def test_no_more_run_at_a_time_than_there_are_shares_each_with_its_own(tmp_path):
    code = ("import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], time.monotonic()); "
            "time.sleep(0.3); print(time.monotonic())")
    pool(tmp_path, [job(tmp_path, str(i), code) for i in range(4)], 2, ["4", "6"])
    logs = [(tmp_path / str(i) / "train.log").read_text().split() for i in range(4)]
    for gpu in ("4", "6"):
        spans = sorted((float(a), float(b)) for g, a, b in logs if g == gpu)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert {gpu for gpu, _, _ in logs} == {"4", "6"}


def test_a_process_keeps_to_its_cores(tmp_path, monkeypatch):
    core, given = min(os.sched_getaffinity(0)), tmp_path / "given"
    monkeypatch.setattr(local_launcher.progress, "log", lambda line: given.touch())
    code = (f"import os, time\nwhile not os.path.exists({str(given)!r}): time.sleep(0.01)\n"
            "print(os.sched_getaffinity(0))")
    with local_launcher.sweep_lock(tmp_path) as lock:
        share = local_launcher.DeviceShare(cores=frozenset({core}))
        local_launcher.JobPool([job(tmp_path, "one", code)], [share], lock).run()
    assert (tmp_path / "one/train.log").read_text().strip() == str({core})


def test_what_interrupts_this_process_group_does_not_reach_the_runs(tmp_path):
    code = "import os; print(os.getsid(0) == os.getpgid(0) == os.getpid())"
    pool(tmp_path, [job(tmp_path, "one", code)])
    assert (tmp_path / "one/train.log").read_text() == "True\n"


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1",
         "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # fmt: skip
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "28672.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "1",
            "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}  # fmt: skip
JOINS = ("from dmf.runtime import processes; processes.initialize(); import jax; "
         "print(jax.distributed.is_initialized())")  # fmt: skip


@pytest.mark.parametrize("around", [
    pytest.param(SLURM, id="slurm"), pytest.param(OPEN_MPI, marks=pytest.mark.slow, id="open_mpi")
])  # fmt: skip
def test_a_run_is_alone_though_the_sweep_is_one_of_several_processes(tmp_path, monkeypatch, around):
    for name, value in (tiny.environment() | around).items():
        monkeypatch.setenv(name, value)
    pool(tmp_path, [job(tmp_path, "one", JOINS)])
    assert (tmp_path / "one/train.log").read_text().split() == ["False"]


def test_of_what_is_around_a_run_only_that_is_taken_away(tmp_path, monkeypatch):
    kept = {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost", "SLURM_JOB_ID": "7"}
    for name, value in (dict.fromkeys(local_launcher.MULTIPROCESS_VARIABLES, "0") | kept).items():
        monkeypatch.setenv(name, value)
    pool(tmp_path, [job(tmp_path, "one", "import os; print(*os.environ)")], 1, ["3"])
    names = set((tmp_path / "one/train.log").read_text().split())
    assert not local_launcher.MULTIPROCESS_VARIABLES & names
    assert {*kept, "CUDA_VISIBLE_DEVICES", "PATH"} <= names


def test_shares_are_equal():
    device_shares, Share = local_launcher.device_shares, local_launcher.DeviceShare
    two = [share.variables for share in device_shares(2, ["0", "1", "2", "3", "4"])]
    assert two == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    cores = os.sched_getaffinity(0)
    assert device_shares(1, []) == [Share(cores=frozenset(cores))]
    assert {share.cores for share in device_shares(len(cores) + 1, [])} == {frozenset()}
    with pytest.raises(InputError, match="--parallel=3: there are 2 GPUs"):
        local_launcher.device_shares(3, ["0", "1"])
    with pytest.raises(InputError, match="--parallel=0"):
        local_launcher.device_shares(0, [])


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, ["2", "3"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "2", "JAX_PLATFORMS": "cpu"}, []),
        ({}, ["0", "1"]),
    ],
)
def test_gpus_are_those_that_jax_would_use(tmp_path, monkeypatch, variables, found):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"PATH": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    assert local_launcher.visible_gpus() == found
    if found == ["0", "1"]:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho it has failed\nexit 9\n")
        assert local_launcher.visible_gpus() == []
        monkeypatch.setenv("PATH", "/nowhere")
        assert local_launcher.visible_gpus() == []


@pytest.mark.parametrize(
    ("variables", "device", "found"),
    [
        ({}, "", True),
        ({}, "accel0", False),
        ({}, "vfio/3", False),
        ({}, "vfio/vfio", True),
        ({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "0"}, "accel0", True),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "", False),
    ],
)
def test_runs_are_on_the_cpu_without_gpu_and_tpu(tmp_path, monkeypatch, variables, device, found):
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"PATH": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    patterns = [p.replace("/dev", str(tmp_path)) for p in local_launcher.TPU_DEVICE_FILES]
    monkeypatch.setattr(local_launcher, "TPU_DEVICE_FILES", patterns)
    (tmp_path / "vfio").mkdir()
    (tmp_path / (device or "null")).touch()
    assert local_launcher.uses_cpu() is found


@pytest.mark.usefixtures("sighup_not_ignored")
@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped), (signal.SIGHUP, Stopped)],
)
def test_told_to_stop_all_save_and_no_more_start(tmp_path, number, error):
    jobs = [job(tmp_path, name, SAVES) for name in ("a", "b", "c")]

    def tell():
        for name in ("a", "b"):
            wait_for(tmp_path / name / "train.log", "ready")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell)
    thread.start()
    before = signal.getsignal(number)
    with pytest.raises(error):
        pool(tmp_path, jobs, 2)
    thread.join()
    assert signal.getsignal(number) is before
    for name in ("a", "b"):
        assert (tmp_path / name / "train.log").read_text() == "ready\nsaved\n"
    assert not (tmp_path / "c").exists()


def test_a_sweep_that_fails_waits_for_its_runs(tmp_path, monkeypatch):
    def fails(self):
        wait_for(tmp_path / "a/train.log", "ready")
        raise ZeroDivisionError

    monkeypatch.setattr(local_launcher.JobPool, "_log_progress", fails)
    with pytest.raises(ZeroDivisionError):
        pool(tmp_path, [job(tmp_path, "a", SAVES)])
    assert (tmp_path / "a/train.log").read_text() == "ready\nsaved\n"


def test_a_disk_without_locks_is_taken_as_it_is(tmp_path, monkeypatch):
    """Each run owns its workdir in another way."""
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(local_launcher.fcntl, "flock", unsupported)
    assert pool(tmp_path, [job(tmp_path, "a", "print('fine')")]).failures == {}


def test_told_twice_those_that_do_not_end_are_ended(tmp_path):
    code = ("import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True))"
            "; print('ready', flush=True); time.sleep(50); time.sleep(50); print('by itself')")

    def tell():
        for text in ("ready", "no"):
            wait_for(tmp_path / "a/train.log", text)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell).start()
    with pytest.raises(Stopped, match="stopped after 0 of 1 runs"):
        pool(tmp_path, [job(tmp_path, "a", code)])
    assert (tmp_path / "a/train.log").read_text() == "ready\nno\n"


def test_what_a_killed_sweep_left_behind_keeps_others_away(tmp_path):
    code = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[2]); "
        "from dmf.experiments import local_launcher; root = pathlib.Path(sys.argv[1]); "
        "job = local_launcher.Job(name='a', directory=root / 'a', command="
        "(sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); "
        "time.sleep(60)'))\n"
        "with local_launcher.sweep_lock(root) as lock: "
        "local_launcher.JobPool([job], local_launcher.device_shares(1, []), lock).run()"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(tiny.ROOT)])
    log = tmp_path / "a/train.log"
    wait_for(log, "\n")
    child = int(log.read_text())
    sweep.kill()
    sweep.wait()
    try:
        with pytest.raises(InputError, match="another sweep, or a run that it has left behind"):
            pool(tmp_path, [])
    finally:
        os.kill(child, signal.SIGKILL)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            pool(tmp_path, [])
            break
        except InputError:
            time.sleep(0.05)
    else:
        raise AssertionError("the lock outlives all that held it")
