"""Several processes on one machine: they train as one, and they end together."""

import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest
import small_network
import tiny
from etils import epath

from dmf.checkpoints import manager
from dmf.checkpoints.load import load_network
from dmf.checkpoints.params import latest_step
from dmf.errors import InputError, Lost
from dmf.runtime import checksums, files, processes
from dmf.training import loop, metrics_writer
from dmf.training.loop import train

pytestmark = pytest.mark.usefixtures("small_network_registered")
LONG = {"run.steps": 100_000, "run.checkpoint_every": 2, "run.log_every": 1}
FROM_RUNTIME = jax.errors.JaxRuntimeError


def environment(devices: int) -> dict[str, str]:
    """The environment of a process with a number of devices of its own."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(tiny.ROOT)}


# The command line, whose processes do not wait for long for those that are lost.
IMPATIENT = """
from dmf.__main__ import main
from dmf.runtime import heartbeats
heartbeats.HEARTBEAT_SECONDS, heartbeats.LOST_SECONDS, heartbeats.EXIT_SECONDS = 1, 8, 2
main()
"""


class Run:
    """The processes of one training, each with devices of its own."""

    def __init__(self, folder: pathlib.Path, *, processes: int, devices: int, fields: dict,
                 flags: Sequence[Sequence[str]] = ((),) * 8, workdir: str = "",
                 impatient: bool = False, config: pathlib.Path = small_network.CONFIG):  # fmt: skip
        self.workdir, port = folder / "run", tiny.free_port()
        overrides = [f"--config.{name}={value}" for name, value in fields.items()]
        self.logs = [folder / f"log{i}" for i in range(processes)]
        self.processes = []
        for i, path in enumerate(self.logs):
            command = tiny.command(
                "train", f"--config={config}", f"--workdir={workdir or self.workdir}",
                f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process={i}",
                *overrides, *flags[i], code=IMPATIENT if impatient else None,
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

    def log(self, i: int) -> str:
        return self.logs[i].read_text()

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Waits until the log of the first process contains a text."""
        end = time.monotonic() + seconds
        while text not in self.log(0):
            assert time.monotonic() < end, self.log(0)
            assert self.processes[0].poll() is None, self.log(0)
            time.sleep(0.05)


def losses(workdir: pathlib.Path) -> list[float]:
    rows = metrics_writer.read_metrics(epath.Path(workdir))
    return [row["loss"] for row in rows if "loss" in row]


# The config file and the config of a run of each network.
NETWORKS = {
    "two layers": (small_network.CONFIG, small_network.config), "DiT": (tiny.CONFIG, tiny.config),
}  # fmt: skip


@functools.cache
def single_process_losses(network: str) -> list[float]:
    """The losses of 8 steps of one process."""
    workdir = tiny.SCRATCH / f"single {network}"
    train(NETWORKS[network][1]({"run.steps": 8, "run.log_every": 1}), workdir)
    return losses(workdir)


def check_trains_as_one(
    folder, network: str, processes: int, mesh: dict[str, int],
    others: Mapping[str, Any] = types.MappingProxyType({}),
) -> Run:  # fmt: skip
    """A run of 4 steps with two devices a process, which one process on another mesh resumes to
    8."""
    file, config = NETWORKS[network]
    fields = {"run.steps": 4, "run.log_every": 1} | {f"mesh.{k}": v for k, v in mesh.items()}
    run = Run(folder, processes=processes, devices=2, fields=fields | dict(others), config=file)
    assert run.wait() == [0] * processes, run.log(0)
    expected = single_process_losses(network)
    np.testing.assert_allclose(losses(run.workdir), expected[:4], rtol=1e-5)
    assert latest_step(run.workdir) == 4
    for i in range(processes):
        assert f"process {i} of {processes}: " in run.log(i)
        assert ("step 4/4" in run.log(i)) == (i == 0)
    train(config({"run.steps": 8, "run.log_every": 1}), run.workdir)
    np.testing.assert_allclose(losses(run.workdir), expected, rtol=1e-5)
    return run


def test_two_processes_train_as_one_and_one_resumes(tmp_path):
    check_trains_as_one(tmp_path, "two layers", 2, {"data": 4})


@pytest.mark.slow
@pytest.mark.parametrize(("network", "mesh"), [
    ("two layers", {"data": 4}),
    # Parameters and heads are split across the border of the processes.
    ("DiT", {"data": 1, "fsdp": 2, "tensor": 2}),
])  # fmt: skip
def test_two_processes_train_and_evaluate_as_one_and_one_resumes(tmp_path, network, mesh):
    """An evaluation has three parts of 24 images, so that each process has some; then training
    continues."""
    others = {"evaluation.every": 2, "evaluation.steps": "(1,)"}
    run = check_trains_as_one(tmp_path, network, 2, mesh, others)
    for step in (2, 4):
        evaluation = files.read_json(
            metrics_writer.evaluation_file(epath.Path(run.workdir), step)
        )
        assert (evaluation["step"], evaluation["count"]) == (step, 72)
        rows = [row for row in metrics_writer.read_metrics(epath.Path(run.workdir))
                if row["step"] == step and "evaluation/fd_pixels/main/1" in row]
        np.testing.assert_allclose(
            rows[0]["evaluation/fd_pixels/main/1"], evaluation["results"][0]["fd_pixels"],
            rtol=1e-6,
        )
    # One process evaluates the same checkpoint.
    shutil.rmtree(run.workdir / "checkpoints" / "8")
    assert tiny.dmf("evaluate", f"--checkpoint={run.workdir}", "--steps=1",
                    f"--output={tmp_path}/single.json") == 0
    again = files.read_json(epath.Path(tmp_path / "single.json"))
    np.testing.assert_allclose(again["results"][0]["fd_pixels"],
                               evaluation["results"][0]["fd_pixels"], rtol=1e-6)
    assert [run.log(i).count("main, 1 step: fd_pixels") for i in range(2)] == [2, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "mesh"), [
    (2, {"data": 4}), (2, {"data": 1, "fsdp": 4}), (2, {"data": 2, "tensor": 2}),
    (2, {"slices": 2, "data": 2}), (4, {"data": 1, "fsdp": 4, "tensor": 2}),
])  # fmt: skip
def test_any_axis_may_cross_the_border_of_processes(tmp_path, processes, mesh):
    check_trains_as_one(tmp_path, "DiT", processes, mesh)


@pytest.mark.slow
def test_two_processes_keep_snapshots_of_power_emas_beside_their_checkpoints(tmp_path):
    fields = {"run.steps": 6, "emas.power.name": "power", "run.snapshot_every": 1,
              "run.keep_snapshots": 4, "run.checkpoint_every": 2}
    run = Run(tmp_path, processes=2, devices=2, fields=fields)
    assert run.wait() == [0, 0], run.log(0)
    assert sorted(path.name for path in run.workdir.glob("ema_snapshots/*")) == ["2", "4", "6"]
    kept, synthesised = (load_network(run.workdir, ema)[2] for ema in ("power", "std=0.1"))
    assert checksums.fingerprint(kept) == checksums.fingerprint(synthesised)


@pytest.mark.slow
def test_the_same_processes_resume_bit_for_bit(tmp_path):
    """A run of 4 steps that is resumed to 8, against an uninterrupted one."""
    fingerprints = []
    for name, lengths in (("once", [8]), ("twice", [4, 8])):
        (tmp_path / name).mkdir()
        for steps in lengths:
            run = Run(tmp_path / name, processes=2, devices=2, fields={"run.steps": steps},
                      config=tiny.CONFIG)  # fmt: skip
            assert run.wait() == [0, 0], run.log(0)
        state = train(tiny.config(), run.workdir)
        fingerprints.append(checksums.fingerprint(jax.device_get(state.params)))
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.slow
@pytest.mark.parametrize(("raised", "kind", "waited"), [
    ("UNKNOWN: Gloo all-reduce failed", Lost, False), ("INTERNAL: a bug", FROM_RUNTIME, True),
])  # fmt: skip
def test_a_save_that_waits_for_a_lost_process_is_not_waited_for(
    raised, kind, waited, tmp_path, monkeypatch
):
    def fails(*_):
        monkeypatch.setattr(processes, "is_single_process", lambda: False)
        raise FROM_RUNTIME(raised)

    closed = []
    monkeypatch.setattr(loop.Loop, "run", fails)
    monkeypatch.setattr(manager.CheckpointManager, "_close_ignoring_errors",
                        lambda self: closed.append(self))
    with pytest.raises(kind):
        train(tiny.config({"run.steps": 1}), tmp_path)
    assert bool(closed) == waited


@pytest.mark.slow
def test_losing_one_ends_the_others_and_leaves_a_good_checkpoint(tmp_path):
    run = Run(tmp_path, processes=2, devices=1, fields=LONG, impatient=True)
    run.wait_for("step 5/")  # The save of step 4 has begun, so that of step 2 has ended.
    run.processes[1].kill()
    killed = time.monotonic()
    assert run.wait(60)[0] == 1
    assert time.monotonic() - killed < 60
    assert "another process of the run was lost: this one stops" in run.log(0)
    assert "Traceback" not in run.log(0)
    done = latest_step(run.workdir)
    assert done >= 2
    state = train(small_network.config({"run.steps": done}), run.workdir)
    assert int(state.step) == done


WAITING = """
import sys, time
from dmf.runtime import heartbeats, processes
heartbeats.HEARTBEAT_SECONDS, heartbeats.LOST_SECONDS = 0.3, 3
processes.initialize(sys.argv[1], 2, int(sys.argv[2]))
print("here", flush=True)
time.sleep(float(sys.argv[3]))
"""


def waiting(seconds: Sequence[float], code: str = WAITING) -> list[subprocess.Popen]:
    """Two processes of a run that wait some seconds, for something that is no collective."""
    address = f"localhost:{tiny.free_port()}"
    processes = [subprocess.Popen(
        [sys.executable, "-c", code, address, str(i), str(wait)], env=environment(1),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) for i, wait in enumerate(seconds)]  # fmt: skip
    for process in processes:
        process.stdout.readline()
    return processes


@pytest.mark.slow
def test_losing_one_ends_the_others_outside_of_collectives():
    remaining, lost = waiting([300, 300])
    lost.kill()
    _, log = remaining.communicate(timeout=60)
    assert remaining.returncode == 1
    assert re.fullmatch(r"dmf: another process of the run was lost: this one stops; restart all "
                        r"processes .* \(no heartbeat of process 1 for 3 s\)\n", log)  # fmt: skip


FAILING = """
import sys, time
from dmf.runtime import heartbeats, processes
heartbeats.HEARTBEAT_SECONDS, heartbeats.EXIT_SECONDS = 0.5, 2
processes.initialize(sys.argv[1], 2, int(sys.argv[2]))
print("here", flush=True)
if sys.argv[2] == sys.argv[3]:
    print("dmf train: no such file", file=sys.stderr)
    heartbeats.exit_together(2)
time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_fails_alone_ends_the_others(failing):
    """Whatever they are waiting for, and whichever it is."""
    processes = waiting([failing, failing], FAILING)
    ends = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [
        2 if i == failing else 1 for i in range(2)
    ]
    assert ends[failing] == "dmf train: no such file\n"
    assert re.fullmatch(r"dmf: another process of the run was lost: this one stops; .* "
                        rf"\(process {failing} failed, see its log\)\n",
                        ends[1 - failing])  # fmt: skip


EXITING = """
import sys, time
import jax
from dmf.runtime import heartbeats, processes
heartbeats.HEARTBEAT_SECONDS = 0.1
processes.initialize(sys.argv[1], 2, int(sys.argv[2]))
print("here", flush=True)
def late(function):
    return lambda *args: (time.sleep(float(sys.argv[3])), function(*args))
jax.distributed.shutdown = late(jax.distributed.shutdown)
heartbeats.os._exit = late(heartbeats.os._exit)
heartbeats.exit_together(2)
"""


@pytest.mark.slow
def test_all_that_fail_alike_end_alike_however_slowly_one_of_them_exits():
    for process in waiting([0, 2], EXITING):
        _, log = process.communicate(timeout=60)
        assert (process.returncode, log) == (2, "")


@pytest.mark.slow
def test_a_process_that_has_ended_is_not_lost_to_the_others():
    """It waits for them, and has heartbeats until they have ended too."""
    for process in waiting([0, 3.5]):
        _, log = process.communicate(timeout=60)
        assert (process.returncode, log) == (0, "")


@pytest.mark.usefixtures("sighup_not_ignored")
@pytest.mark.parametrize(("processes", "number"), [
    (1, signal.SIGTERM),
    pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param(2, signal.SIGHUP, marks=pytest.mark.slow),
])  # fmt: skip
def test_on_sigterm_all_save_the_same_step_and_say_so(tmp_path, processes, number):
    run = Run(tmp_path, processes=processes, devices=1, fields=LONG | {"run.checkpoint_every": 0})
    run.wait_for("step 3/")
    run.processes[-1].send_signal(number)
    assert run.wait() == [75] * processes
    done = latest_step(run.workdir)
    for i in range(processes):
        assert f"dmf train: told to stop at step {done} of 100000: saved" in run.log(i)
    assert int(train(small_network.config({"run.steps": done}), run.workdir).step) == done


def test_processes_with_different_configs_all_say_so(tmp_path):
    run = Run(tmp_path, processes=2, devices=1, fields={},
              flags=[(), ["--config.optimizer.learning_rate=0.5"]])  # fmt: skip
    assert run.wait() == [2, 2]
    for i in range(2):
        assert ("config.optimizer.learning_rate: it is 0.001 on process 0 and 0.5 on process 1"
                in run.log(i))
    assert not run.workdir.exists()


def test_a_workdir_is_not_looked_for_before_it_is_made(tmp_path, monkeypatch):
    """Its client of a network file system would remember that it was not there."""
    workdir = epath.Path(tmp_path) / "run"
    looked, exists = [], type(workdir).exists

    def gather(value):
        if value == "":  # That the first process could make it.
            assert not looked
            workdir.mkdir()
        return [value]

    monkeypatch.setattr(type(workdir), "exists", lambda path: looked.append(path) or exists(path))
    monkeypatch.setattr(processes, "is_single_process", lambda: False)
    monkeypatch.setattr(processes, "is_first_process", lambda: False)
    monkeypatch.setattr(processes, "all_gather", gather)
    with pytest.raises(InputError, match="not every host sees it"):
        processes.check_shared(workdir)
    assert [path.parent for path in looked] == [workdir]


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(tmp_path):
    run = Run(tmp_path, processes=2, devices=1, fields={}, workdir="runs/mine")
    assert run.wait() == [2, 2]
    for i in range(2):
        assert "workdir=runs/mine: not every host sees it (process 1 does not)" in run.log(i)
