"""dmf sweep: all is checked before anything starts, and what was killed goes on to its end."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import small_network
import tiny

from dmf import registry
from dmf.checkpoints import load
from dmf.checkpoints.params import FORMAT, latest_step
from dmf.experiments import local_launcher, slurm_launcher
from dmf.experiments.runs import is_complete

SHORT = ("--config.run.steps=4", "--config.run.checkpoint_every=2")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Processes that these tests start compile for one device, which is soonest done."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    monkeypatch.setenv("XLA_FLAGS", flags)


def sweep_file(tmp_path, *overrides) -> str:
    path = tmp_path / "sweep.py"
    path.write_text(f"def get_sweep():\n    return {list(overrides)!r}\n")
    return f"--sweep={path}"


def sweep(tmp_path, *arguments, overrides=({"seed": 0}, {"seed": 1}), config=tiny.CONFIG) -> int:
    return tiny.dmf("sweep", f"--config={config}", sweep_file(tmp_path, *overrides),
                    f"--workdir={tmp_path}/out", *arguments)  # fmt: skip


def seeds(count):
    return [{"seed": seed} for seed in range(count)]


def processes(workdir) -> list[int]:
    """The runs of a sweep that go on, by the workdir in their command line."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                line = file.read()
        except OSError:
            continue
        if f"--workdir={workdir}/".encode() in line:
            found.append(int(entry))
    return found


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_leaves_alone_what_is_complete(tmp_path):
    workdir = tmp_path / "out"
    arguments = ["sweep", f"--config={small_network.CONFIG}", sweep_file(tmp_path, *seeds(2)),
                 f"--workdir={workdir}", *SHORT]  # fmt: skip
    start = subprocess.Popen(tiny.command(*arguments), env=tiny.environment(), cwd=tiny.ROOT,
                             stderr=subprocess.DEVNULL)  # fmt: skip
    first, second = workdir / "seed=0", workdir / "seed=1"
    until = time.monotonic() + 120
    while not (second / "config.json").exists():
        assert time.monotonic() < until and start.poll() is None
        time.sleep(0.02)
    start.kill()
    start.wait()
    for process in processes(workdir):
        os.kill(process, signal.SIGKILL)
    assert is_complete(first, 4, evaluates=False) and not is_complete(second, 4, evaluates=False)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    again = tiny.process(*arguments)
    assert again.returncode == 0, again.stderr
    assert "2 runs in" in again.stderr and "1 of them complete" in again.stderr
    assert "seed=0" not in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    for seed in range(2):
        directory = workdir / f"seed={seed}"
        assert is_complete(directory, 4, evaluates=False)
        config = json.loads((directory / "config.json").read_text())
        assert (config["seed"], config["run"]["steps"]) == (seed, 4)


def test_the_commands_are_printed_as_a_shell_takes_them(tmp_path, capsys):
    overrides = {"data.name": "two words"}, {"sampling.steps": [1, 2], "init.checkpoint": "/none"}
    assert sweep(tmp_path, "--launcher=print", "--config.run.steps=7", overrides=overrides) == 0
    lines = capsys.readouterr().out.splitlines()
    common = ["dmf", "train", f"--config={tiny.CONFIG}", "--config.run.steps=7"]
    words = [shlex.split(line) for line in lines]
    assert [line[:4] for line in words] == [common, common]
    assert words[0][4] == "--config.data.name=two words"
    assert words[1][4:6] == ["--config.init.checkpoint=/none", "--config.sampling.steps=(1, 2)"]
    name = "init.checkpoint=-none,sampling.steps=1+2-"
    assert words[1][-1].startswith(f"--workdir={tmp_path}/out/{name}")
    assert not (tmp_path / "out").exists()


PLUGIN = """
from dmf import registry
from dmf.objectives.loss_weighting import UniformWeighting

assert "of_a_plugin" not in registry.components("weighting"), "it is run once"
registry.register("weighting", of_a_plugin=UniformWeighting)
"""


@pytest.mark.parametrize("launcher", ["print", "local", "slurm"])
@pytest.mark.parametrize("words", [False, True], ids=["one word", "two words"])
def test_runs_are_given_the_plugins(tmp_path, capsys, monkeypatch, launcher, words):
    given = []
    monkeypatch.setitem(registry._COMPONENTS, "weighting", {**registry._COMPONENTS["weighting"]})
    monkeypatch.setattr(local_launcher.JobPool, "run", lambda pool: given.extend(pool._waiting))
    monkeypatch.setattr(slurm_launcher, "submit", lambda jobs, *rest: given.extend(jobs) or {})
    monkeypatch.setattr(slurm_launcher, "check_installed", lambda: None)
    file = tmp_path / "own.py"
    file.write_text(PLUGIN)
    overrides = [{"objective.weighting.name": "of_a_plugin", "seed": seed} for seed in (0, 1)]
    flag = ["--plugins", file] if words else [f"--plugins={file}"]
    code = sweep(tmp_path, f"--launcher={launcher}", *flag, overrides=overrides)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    lines = printed.out.splitlines() if launcher == "print" else [job.command for job in given]
    assert len(lines) == 2 and all(f"--plugins={file}" in line for line in lines)


@pytest.mark.parametrize("place", ["a TPU", "two GPUs"])
def test_the_mesh_of_devices_that_are_not_this_process_s_is_left_to_runs(
    tmp_path, monkeypatch, place
):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1" if place == "two GPUs" else "")
    devices = [str(tmp_path / "sweep.py")] * (place == "a TPU")
    monkeypatch.setattr(local_launcher, "TPU_DEVICE_FILES", devices)
    started = []
    monkeypatch.setattr(local_launcher.JobPool, "run", lambda pool: started.extend(pool._waiting))
    assert sweep(tmp_path, overrides=[{"mesh.data": 3}]) == 0
    assert [job.name for job in started] == ["mesh.data=3"]


REFUSED = {
    "unknown field": ([{"seed": 0}, {"model.splt_depth": 3}], [],
                      "--config.model.splt_depth=3: no such field; did you mean"),
    "wrong type": ([{"model.depth": "six"}], [], "six"),
    "twice": ([{"seed": 1}, {"seed": 1}], [], "seed=1 and seed=1: the sweep has the same run"),
    "equal configs": ([{"seed": 0}, {"model.depth": 2}], [],
                      "seed=0 and model.depth=2: the sweep has the same run twice"),
    "set twice": ([{"seed": 1}], ["--config.seed=2"], "--config.seed=2: the sweep sets seed too"),
    "cannot be": ([{"seed": 1}, {"model.split_depth": 1}], [], "split_depth=1: model.split_depth"),
    "batch": ([{"gradient_accumulation": 3}], [],
              "gradient_accumulation=3: data.batch_size=16: it must be"),
    "no data": ([{"data.name": "nothing_here"}], [], "name=nothing_here: data.name=nothing_here"),
    "no start": ([{"init.checkpoint": "/none"}], [], "init.checkpoint=/none: it holds no config"),
    "no teacher": ([{"teacher.checkpoint": "/none"}], [],
                   ": teacher.checkpoint=/none: the objective asks for no teacher"),
    "mesh": ([{"mesh.data": 3}], [], "data=3: mesh=3x1x1"),
    "place": ([{}], ["--launcher=moon"], "--launcher=moon: choose one of local, slurm, print"),
    "parallel": ([{}], ["--parallel=-1"], "--parallel=-1: give a number"),
    "slurm here": ([{}], ["--slurm=nodes=1"], "--slurm=nodes=1: it goes with --launcher=slurm"),
    "bucket": ([{}], ["--workdir=gs://b/out"], "--workdir=gs://b/out: the logs of a sweep"),
    "flag": ([{}], ["--fast"], "fast"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_sweep_that_cannot_be_is_one_line_before_anything_starts(tmp_path, capsys, case):
    overrides, arguments, named = REFUSED[case]
    assert sweep(tmp_path, *arguments, overrides=overrides) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dmf sweep: ") and named in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("gpus", "arguments", "named"),
    [
        ("0,1", ["--parallel=3"], "--parallel=3: there are 2 GPUs here"),
        ("", ["--parallel=2"], "--parallel=2: one process takes all TPU chips of this host"),
        ("", ["--launcher=slurm", "--slurm=partition"], "--slurm=partition: give NAME=VALUE"),
        ("", ["--launcher=slurm"], "--launcher=slurm: it needs submitit"),
    ],
)  # fmt: skip
def test_what_a_launcher_cannot_do_is_refused_before_the_files_are_read(
    tmp_path, capsys, monkeypatch, gpus, arguments, named
):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(local_launcher, "TPU_DEVICE_FILES", [str(tmp_path)])
    if "submitit" in named:
        monkeypatch.setitem(sys.modules, "submitit", None)
    else:
        monkeypatch.setattr(slurm_launcher, "check_installed", lambda: None)
    assert sweep(tmp_path, *arguments, config="nowhere.py") == 2
    assert capsys.readouterr().err.startswith(f"dmf sweep: {named}")


def test_a_workdir_of_another_sweep_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(local_launcher.JobPool, "run", lambda pool: None)
    run = tmp_path / "out/seed=0"
    run.mkdir(parents=True)
    config = {"format": FORMAT, **load.config_to_json(tiny.get_config())}
    (run / "config.json").write_text(json.dumps(config | {"gradient_accumulation": 4}))
    assert sweep(tmp_path) == 0
    config["optimizer"]["learning_rate"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert sweep(tmp_path) == 2
    line = capsys.readouterr().err
    assert "seed=0: it holds another run, whose optimizer.learning_rate is 0.5" in line


@pytest.mark.slow
def test_failed_runs_are_listed_and_the_exit_code_is_1(tmp_path, capsys):
    fields = {"optimizer.learning_rate": 1e30}, {"optimizer.learning_rate": 1e-3, "seed": 7}
    with small_network.registered():
        code = sweep(tmp_path, *SHORT[:2], "--parallel=2", overrides=fields,
                     config=small_network.CONFIG)  # fmt: skip
    said, name = capsys.readouterr().err.strip().splitlines(), "optimizer.learning_rate=1e+30"
    assert code == 1
    assert said[-1] == f"dmf sweep: 1 of 2 runs failed: {name}; the same command starts them again"
    assert said[-2].startswith(f"{name}: dmf train: the loss is not finite at step")
    assert latest_step(tmp_path / "out/optimizer.learning_rate=0.001,seed=7") == 4
