"""Several processes on one machine: the same losses as one, and one end for all."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from dmf import files, hosts, intact, logs, training
from dmf.checkpoint import latest_step
from dmf.training import train
from dmf.typing import InputError, Lost, RunError

LONG = {"run.steps": 100_000, "run.checkpoint_every": 2, "run.log_every": 1}
FROM_RUNTIME = jax.errors.JaxRuntimeError


def environment(devices: int) -> dict[str, str]:
    """That of a process with so many devices of its own."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(tiny.ROOT)}


class Run:
    """The processes of one training, each with devices of its own."""

    def __init__(self, folder: pathlib.Path, *, processes: int, devices: int, fields: dict,
                 own: Sequence[Sequence[str]] = ((),) * 8, workdir: str = ""):  # fmt: skip
        self.workdir, port = folder / "run", tiny.free_port()
        overrides = [f"--config.{name}={value}" for name, value in fields.items()]
        self.logs = [folder / f"log{i}" for i in range(processes)]
        self.processes = []
        for i, path in enumerate(self.logs):
            command = tiny.command(
                "train", f"--config={tiny.CONFIG}", f"--workdir={workdir or self.workdir}",
                f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process={i}",
                *overrides, *own[i],
            )  # fmt: skip
            cwd = folder / f"cwd{i}"
            cwd.mkdir(exist_ok=True)
            self.processes.append(subprocess.Popen(
                command, env=environment(devices), cwd=cwd, stderr=path.open("w")
            ))  # fmt: skip

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit codes, once all have ended."""
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def told(self, i: int) -> str:
        return self.logs[i].read_text()

    def until(self, sign: str, seconds: float = 300) -> None:
        """Waits until the first process has said something."""
        end = time.monotonic() + seconds
        while sign not in self.told(0):
            assert time.monotonic() < end, self.told(0)
            assert self.processes[0].poll() is None, self.told(0)
            time.sleep(0.05)


def losses(workdir: pathlib.Path) -> list[float]:
    return [row["loss"] for row in logs.read_metrics(epath.Path(workdir)) if "loss" in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    """The losses of 24 steps of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    train(tiny.config({"run.steps": 24, "run.log_every": 1}), workdir)
    return losses(workdir)


def trains_as_one(folder, alone, processes: int, devices: int, mesh: dict[str, int]) -> None:
    """A run of 4 steps, which goes on to 24 in one process on another mesh."""
    fields = {"run.steps": 4, "run.log_every": 1} | {f"mesh.{k}": v for k, v in mesh.items()}
    run = Run(folder, processes=processes, devices=devices, fields=fields)
    assert run.wait() == [0] * processes, run.told(0)
    np.testing.assert_allclose(losses(run.workdir), alone[:4], rtol=1e-5)
    assert latest_step(run.workdir) == 4
    for i in range(processes):
        assert f"process {i} of {processes}: " in run.told(i)
        assert ("step 4/4" in run.told(i)) == (i == 0)
    train(tiny.config({"run.steps": 24, "run.log_every": 1}), run.workdir)
    np.testing.assert_allclose(losses(run.workdir), alone, rtol=1e-5)


def test_two_processes_train_as_one_and_one_goes_on(tmp_path, alone):
    """Parameters and heads are split across the border of the processes."""
    trains_as_one(tmp_path, alone, 2, 2, {"data": 1, "fsdp": 2, "tensor": 2})


def test_processes_share_what_is_measured_while_they_train(tmp_path):
    """Parts of 24 images of 72, so that each process has some; then each step goes on."""
    fields = {"run.steps": 4, "mesh.fsdp": 2, "mesh.data": 1, "evaluation.every": 2,
              "evaluation.steps": "(1,)"}  # fmt: skip
    run = Run(tmp_path, processes=2, devices=1, fields=fields)
    assert run.wait() == [0, 0], run.told(0)
    for step in (2, 4):
        found = files.read_json(logs.evaluation_file(epath.Path(run.workdir), step))
        assert (found["step"], found["count"]) == (step, 72)
        told = [row for row in logs.read_metrics(epath.Path(run.workdir))
                if row["step"] == step and "evaluation/fd_pixels/main/1" in row]
        np.testing.assert_allclose(
            told[0]["evaluation/fd_pixels/main/1"], found["results"][0]["fd_pixels"], rtol=1e-6
        )
    # As one process measures the same checkpoint.
    assert tiny.dmf("evaluate", f"--checkpoint={run.workdir}", "--steps=1",
                    f"--output={tmp_path}/alone.json") == 0
    again = files.read_json(epath.Path(tmp_path / "alone.json"))
    np.testing.assert_allclose(again["results"][0]["fd_pixels"],
                               found["results"][0]["fd_pixels"], rtol=1e-6)
    assert [run.told(i).count("main, 1 step: fd_pixels") for i in range(2)] == [2, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "mesh"), [
    (2, {"data": 4}), (2, {"data": 1, "fsdp": 4}), (2, {"data": 2, "tensor": 2}),
    (2, {"slices": 2, "data": 2}), (4, {"data": 2, "fsdp": 2, "tensor": 2}),
    (4, {"data": 1, "fsdp": 4, "tensor": 2}),
])  # fmt: skip
def test_any_axis_may_cross_the_border_of_processes(tmp_path, alone, processes, mesh):
    trains_as_one(tmp_path, alone, processes, 2, mesh)


@pytest.mark.slow
def test_the_same_processes_go_on_bit_for_bit(tmp_path):
    """Ended after 4 steps and started again, against never ended."""
    found = []
    for name, lengths in (("once", [8]), ("twice", [4, 8])):
        (tmp_path / name).mkdir()
        for steps in lengths:
            run = Run(tmp_path / name, processes=2, devices=2, fields={"run.steps": steps})
            assert run.wait() == [0, 0], run.told(0)
        state = train(tiny.config(), run.workdir)
        found.append(intact.fingerprint(jax.device_get(state.params)))
    assert found[0] == found[1]


@pytest.mark.parametrize(("raised", "kind", "waited"), [
    ("UNKNOWN: Gloo all-reduce failed", Lost, False), ("INTERNAL: a bug", FROM_RUNTIME, True),
])  # fmt: skip
def test_a_save_that_waits_for_a_lost_process_is_not_waited_for(
    raised, kind, waited, tmp_path, monkeypatch
):
    def fails(*_):
        monkeypatch.setattr(hosts, "alone", lambda: False)
        raise FROM_RUNTIME(raised)

    closed = []
    monkeypatch.setattr(training, "_loop", fails)
    monkeypatch.setattr(training.Checkpoints, "_close_anyhow", lambda it: closed.append(it))
    with pytest.raises(kind):
        train(tiny.config({"run.steps": 1}), tmp_path)
    assert bool(closed) == waited


def test_losing_one_ends_the_others_and_leaves_a_good_checkpoint(tmp_path):
    run = Run(tmp_path, processes=2, devices=1, fields=LONG)
    run.until("step 5/")  # The save of step 4 has begun, so that of step 2 has ended.
    run.processes[1].kill()
    killed = time.monotonic()
    assert run.wait(60)[0] == 1
    assert time.monotonic() - killed < 60
    assert "another process of the run was lost: ended" in run.told(0)
    assert "Traceback" not in run.told(0)
    done = latest_step(run.workdir)
    assert done >= 2
    state = train(tiny.config({"run.steps": done}), run.workdir)
    assert int(state.step) == done


WAITING = """
import sys, time
from dmf import hosts
hosts.BEAT_SECONDS, hosts.LOST_SECONDS = 0.5, 8
hosts.join(sys.argv[1], 2, int(sys.argv[2]))
print("here", flush=True)
time.sleep(float(sys.argv[3]))
"""


def waiting(seconds: Sequence[float], code: str = WAITING) -> list[subprocess.Popen]:
    """Two processes of a run that wait, so long, for something that is no collective."""
    address = f"localhost:{tiny.free_port()}"
    processes = [subprocess.Popen(
        [sys.executable, "-c", code, address, str(i), str(wait)], env=environment(1),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) for i, wait in enumerate(seconds)]  # fmt: skip
    for process in processes:
        process.stdout.readline()
    return processes


def test_losing_one_ends_those_that_wait_for_it_by_no_collective():
    ours, lost = waiting([300, 300])
    lost.kill()
    _, told = ours.communicate(timeout=60)
    assert ours.returncode == 1
    assert re.fullmatch(r"dmf: another process of the run was lost: ended; start all of them "
                        r"again, .* \(no sign of life of process 1 for 8 s\)\n", told)  # fmt: skip


FAILING = """
import sys, time
from dmf import hosts
hosts.BEAT_SECONDS, hosts.LEAVE_SECONDS = 0.5, 2
hosts.join(sys.argv[1], 2, int(sys.argv[2]))
print("here", flush=True)
if sys.argv[2] == sys.argv[3]:
    print("dmf train: no such file", file=sys.stderr)
    hosts.leave(2)
time.sleep(300)
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_fails_alone_ends_the_others(failing):
    """Whatever they are waiting for, and whichever it is."""
    processes = waiting([failing, failing], FAILING)
    ends = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [
        2 if i == failing else 1 for i in range(2)
    ]
    assert ends[failing] == "dmf train: no such file\n"
    assert re.fullmatch(rf"dmf: another process of the run was lost: ended; .* \(process {failing} "
                        r"failed, and says why\)\n", ends[1 - failing])  # fmt: skip


LEAVING = """
import sys, time
import jax
from dmf import hosts
hosts.BEAT_SECONDS = 0.1
hosts.join(sys.argv[1], 2, int(sys.argv[2]))
print("here", flush=True)
def late(function):
    return lambda *args: (time.sleep(float(sys.argv[3])), function(*args))
jax.distributed.shutdown, hosts.os._exit = late(jax.distributed.shutdown), late(hosts.os._exit)
hosts.leave(2)
"""


def test_all_that_fail_alike_end_alike_however_slowly_one_of_them_leaves():
    for process in waiting([0, 2], LEAVING):
        _, told = process.communicate(timeout=60)
        assert (process.returncode, told) == (2, "")


def test_one_that_has_ended_is_not_lost_to_those_that_go_on():
    """It waits for them, and shows signs of life until they have ended too."""
    for process in waiting([0, 12]):
        _, told = process.communicate(timeout=60)
        assert (process.returncode, told) == (0, "")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_on_sigterm_all_save_the_same_step_and_say_so(tmp_path, processes):
    run = Run(tmp_path, processes=processes, devices=1, fields=LONG | {"run.checkpoint_every": 0})
    run.until("step 3/")
    run.processes[-1].send_signal(signal.SIGTERM)
    assert run.wait() == [75] * processes
    done = latest_step(run.workdir)
    for i in range(processes):
        assert f"dmf train: told to stop at step {done} of 100000: saved" in run.told(i)
    assert int(train(tiny.config({"run.steps": done}), run.workdir).step) == done


def test_processes_that_differ_are_told_so_by_all(tmp_path):
    run = Run(tmp_path, processes=2, devices=1, fields={},
              own=[(), ["--config.optimizer.learning_rate=0.5"]])  # fmt: skip
    assert run.wait() == [2, 2]
    for i in range(2):
        assert ("config.optimizer.learning_rate: it is 0.001 on process 0 and 0.5 on process 1"
                in run.told(i))
    assert not run.workdir.exists()


def test_a_workdir_that_is_not_shared_is_told(tmp_path):
    run = Run(tmp_path, processes=2, devices=1, fields={}, workdir="runs/mine")
    assert run.wait() == [2, 2]
    for i in range(2):
        assert "workdir=runs/mine: not every host sees it (process 1 does not)" in run.told(i)


@pytest.mark.parametrize(("flags", "message"), [
    (("localhost:1", 2, -1), "--coordinator, --processes, --process: give all three"),
    (("", 2, 1), "give all three"),
    (("localhost:1", 2, 2), "--process=2: they count from 0 to 1"),
    (("localhost", 2, 0), "--coordinator=localhost: give host:port"),
])  # fmt: skip
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(InputError, match=message):
        hosts.join(*flags)


def test_a_port_in_use_is_told():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be used here .*choose another"):
            hosts.join(f"localhost:{port}", 2, 0)
    with pytest.raises(InputError, match="port 70000 cannot be used here"):
        hosts.join("localhost:70000", 2, 0)


@pytest.mark.parametrize(("processes", "raised", "kind", "message"), [
    (2, FROM_RUNTIME("UNKNOWN: Gloo AllGather failed"), Lost, "another process .* was lost"),
    (2, ValueError("UNKNOWN: Gloo AllGather failed"), Lost, "another process .* was lost"),
    (1, ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), RunError,
     "not the memory"),
    (1, OSError(116, "Stale file handle", "/data/rows"), RunError, "^/data/rows: Stale file"),
    (1, FROM_RUNTIME("RESOURCE_EXHAUSTED: out of memory"), RunError, "not the memory .*accumul"),
    (2, FROM_RUNTIME("RESOURCE_EXHAUSTED: out of memory"), RunError, "not the memory .*accumul"),
    (1, FROM_RUNTIME("INTERNAL: Gloo"), FROM_RUNTIME, "^INTERNAL: Gloo$"),
    (2, FROM_RUNTIME("INTERNAL: a bug"), FROM_RUNTIME, "^INTERNAL: a bug$"),
    (2, ValueError("shapes of a task differ"), ValueError, "^shapes of a task differ$"),
])  # fmt: skip
def test_what_the_runtime_raises(processes, raised, kind, message, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "alone", lambda: processes == 1)
    with pytest.raises(kind, match=message) as caught:
        with hosts.runtime_errors(), files.disk_errors(epath.Path(tmp_path)):
            raise raised
    assert type(caught.value) is kind


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_that_do_not_find_each_other_are_no_runs_of_their_own(
    name, monkeypatch
):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **flags: None)
    monkeypatch.setenv(name, "4")
    with pytest.raises(InputError, match=f"^{name}=4: .* --coordinator, --processes and"):
        hosts.join()
    monkeypatch.setenv(name, "1")
    hosts.join()


def test_without_flags_a_process_is_alone():
    hosts.join()
    assert hosts.alone()
    assert hosts.first()
    assert hosts.gathered({"a": 1}) == [{"a": 1}]


def test_a_program_that_has_begun_cannot_join_others():
    jax.devices()
    with pytest.raises(RunError, match="could not meet the others at localhost:1"):
        hosts.join("localhost:1", 2, 1)
