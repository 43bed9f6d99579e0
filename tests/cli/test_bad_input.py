"""Every mistake ends in one line that names the field and the remedy, and leaves nothing behind."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import small_network
import tiny

from dmf import registry
from dmf.checkpoints import load
from dmf.checkpoints.params import latest_step
from dmf.cli import evaluate_flags
from dmf.errors import InputError
from dmf.objectives import FlowMatching
from dmf.runtime.sharding import batch_sharding
from dmf.training import build, metrics_writer
from dmf.training.loop import train


def one_line(capsys) -> str:
    """The only line that was printed, but for the progress of loading a checkpoint."""
    *progress, line = capsys.readouterr().err.strip().splitlines()
    assert all(earlier.startswith("loading ") for earlier in progress), progress
    return line


REFUSED = {
    "unknown field": (["model.depht=3"], ["--config.model.depht=3", "no such field"]),
    "unknown group": (["modell.depth=3"], ["--config.modell.depth=3", "no such field"]),
    "negative seed": (["seed=-1"], ["seed=-1", "from 0 to 2^32 - 1"]),
    "large seed": (["seed=4294967296"], ["seed=4294967296", "from 0 to 2^32 - 1"]),
    "classes": (["data.classes=n01440764"], ["data.classes=n01440764", "give whole numbers"]),
    "not a number": (["model.depth=six"], ["model.depth", "six"]),
    "not a whole number": (["model.depth=2.5"], ["model.depth", "2.5"]),
    "split without a map": (["model.split_depth=1"], ["model.split_depth=1", "decoupled"]),
    "split too deep": (
        ["model.conditioning=decoupled", "model.split_depth=3"],
        ["model.split_depth=3", "0 to model.depth=2"],
    ),
    "split below nothing": (
        ["model.conditioning=decoupled", "model.split_depth=-1"],
        ["model.split_depth=-1", "0 to model.depth=2"],
    ),
    "map without a split": (
        ["model.conditioning=decoupled"], ["model.split_depth=None", "0 to model.depth=2"],
    ),
    "batch and mesh": (["data.batch_size=12"], ["data.batch_size=12", "multiple of 8"]),
    "mesh too small": (["mesh.data=4"], ["mesh=4x1x1", "all 8 devices"]),
    "mesh too large": (["mesh.data=4", "mesh.fsdp=4"], ["mesh=4x4x1", "all 8 devices"]),
    "mesh with two rests": (["mesh.fsdp=-1"], ["mesh=-1x-1x1", "one may be -1"]),
    "no such start": (["init.checkpoint=/nowhere"], ["checkpoint=/nowhere"]),
    "nothing asked of a teacher": (
        ["teacher.checkpoint=/nowhere"],
        ["teacher.checkpoint=/nowhere", "objective.guidance.name=teacher"],
    ),
    "no such steps to trace": (["profile_steps=5"], ["profile_steps=5", "FIRST:LAST"]),
    "no such data": (["data.name=nothing_here"], ["data.name=nothing_here", "prepare"]),
    "no such split": (["data.split=test"], ["data.split=test", "has the splits train"]),
    "label count": (["model.num_classes=7"], ["model.num_classes=7", "digits has 10"]),
    "image size": (["model.input_size=16"], ["(8, 8, 1)", "model.input_size"]),
    "negative rate": (["optimizer.learning_rate=-1.0"], ["optimizer.learning_rate=-1.0"]),
    "no such interpolant": (["objective.interpolant=cubic"], ["cubic", "cosine, linear"]),
    "no steps": (["run.steps=0"], ["run.steps=0"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_be(case, tmp_path, capsys):
    fields, named = REFUSED[case]
    arguments = [f"--config.{field}" for field in fields]
    workdir = tmp_path / "run"
    code = tiny.dmf("train", f"--config={tiny.CONFIG}", f"--workdir={workdir}", *arguments)
    line = one_line(capsys)
    assert code == 2
    assert line.startswith("dmf train: ")
    assert all(part in line for part in named), line
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--workdir=DIR"], "--config: it must be given"),
        (["train", f"--config={tiny.CONFIG}"], "--workdir: it must be given"),
        (["train", "--config=nowhere.py", "--workdir=DIR"], "nowhere.py"),
        (["train", f"--config={tiny.CONFIG}", "--workdir=DIR", "--fast"], "fast"),
        (["train", f"--config={tiny.CONFIG}", "--workdir=DIR", "now"], "now: not a flag"),
        (["evaluate"], "--checkpoint or --images: give one of them"),
        (["evaluate", "--checkpoint=DIR"], "holds no config.json"),
        (["evaluate", "--checkpoint=RUN", "--steps=one", "--output=DIR"], "--steps=one"),
        (["evaluate", "--checkpoint=RUN", "--ema=slow", "--output=DIR"], "ema=slow"),
        (["evaluate", "--checkpoint=RUN", "--count=60", "--output=DIR"], "evaluation.count=60"),
        (["evaluate", "--checkpoint=RUN", "--output=DIR", "--config.evaluation.chunk_size=0"],
         "evaluation.chunk_size=0: give a whole number"),
        (["evaluate", "--checkpoint=RUN", "--output=DIR", "--config.sampling.sheft=2.0"],
         "--config.sampling.sheft=2.0: no such field"),
        (["evaluate", "--checkpoint=RUN", "--output=DIR", "--config.model.width=64"],
         "another architecture"),
        (["evaluate", "--checkpoint=RUN", "--output=RUN"],
         "it is a folder; give the path of a file"),
        (["evaluate", "--checkpoint=RUN", "--output=DIR", "--resolution=8"],
         "--resolution=8: it is for --images; leave it out"),
        (["evaluate", "--images=x.npz", "--output=DIR"],
         "--reference: it must be given with --images: a file of statistics, or a set of images"),
        (["sample", "--checkpoint=RUN", "--output=DIR.gif"], "give a .png"),
        (["sample", "--checkpoint=RUN", "--output=DIR.png", "--labels=11"], "--labels=11"),
        (["sample", "--checkpoint=RUN", "--output=DIR.png", "--labels=cat"], "--labels=cat"),
        (["sample", "--checkpoint=RUN", "--output=DIR.png", "--count=0"], "count"),
        (["sample", "--checkpoint=RUN", "--output=DIR.png", "--steps=0"], "steps=0"),
        (["sample", "--checkpoint=RUN", "--output=DIR.png", "--steps="], "--steps=: give whole"),
        (["sample", "--checkpoint=RUN", "--output=DIR.png", "--seed=3000000000"], "seed"),
        (["compile", f"--config={tiny.CONFIG}", "--output=RUN"],
         "it is a folder; give the path of a file"),
        (["export", "--checkpoint=RUN"], "--output: it must be given"),
        (["export", "--checkpoint=RUN", "--output=RUN"], "not empty; choose another"),
        (["export", "--checkpoint=RUN", "--output=DIR", "--steps=4"],
         "--steps=4: it is for --format=stablehlo; leave it out"),
        (["export", "--checkpoint=RUN", "--output=DIR", "--format=stablehlo", "--naming=sit"],
         "--naming=sit: it is for --format=safetensors; leave it out"),
    ],
)
def test_a_command_that_cannot_be(arguments, named, tmp_path, capsys):
    run, place = str(tiny.flow_run()), str(tmp_path / "made")
    arguments = [a.replace("RUN", run).replace("DIR", place) for a in arguments]
    capsys.readouterr()
    code = tiny.dmf(*arguments)
    line = one_line(capsys)
    assert code == 2
    assert named in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--count=70", "--label-sampling=random", "--rounding=down"])
@pytest.mark.parametrize("purpose", ["--output", "--make-reference"])
def test_flags_of_samples_have_no_effect_on_images(tmp_path, capsys, purpose, flag):
    output = f"{purpose}={tmp_path}/e.npz"
    assert tiny.dmf("evaluate", "--images=x.npz", output, flag) == 2
    assert f"{flag}: it is for samples of a flow map; leave it out" in one_line(capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--reference=digits", "--output=e.json", "--keep-features=True"])
def test_flags_of_comparisons_have_no_effect_on_a_reference_that_is_made(tmp_path, capsys, flag):
    made = f"--make-reference={tmp_path}/r.npz"
    assert tiny.dmf("evaluate", "--images=x.npz", made, flag) == 2
    assert f"{flag}: it has no effect on --make-reference; leave it out" in one_line(capsys)
    assert not any(tmp_path.iterdir())


def test_a_dataset_of_the_command_line_is_a_reference():
    with pytest.raises(InputError, match=r"^--reference: it must be given with --images"):
        evaluate_flags.check_reference(tiny.config(), ["--config.evaluation.chunk_size=2"])
    evaluate_flags.check_reference(tiny.config(), ["--config.data.name=digits"])
    evaluate_flags.check_reference(tiny.config({"evaluation.reference": "digits"}), [])


@pytest.mark.parametrize(("flags", "line"), [
    (["--format=bogus"], "--format=bogus: choose one of orbax, safetensors, stablehlo"),
    (["--format=safetensors", "--naming=bogus"], "naming=bogus: this network can be written as "),
    (["--format=stablehlo", "--steps=0"], "--steps=(0,): sampling needs at least 1 step"),
    (["--output=RUN"], "it exists and is not empty; choose another"),
])  # fmt: skip
def test_an_export_that_cannot_be_is_refused_before_parameters_are_loaded(
    tmp_path, capsys, monkeypatch, flags, line
):  # fmt: skip
    run = str(tiny.flow_run())
    capsys.readouterr()
    monkeypatch.setattr(load, "load_params", lambda *args, **kwargs: pytest.fail("loaded"))
    arguments = [flag.replace("RUN", run) for flag in flags]
    assert tiny.dmf("export", f"--checkpoint={run}", f"--output={tmp_path}/x", *arguments) == 2
    assert line in one_line(capsys)
    assert not any(tmp_path.iterdir())


def test_the_workdir_of_another_run_is_left_alone(tmp_path, capsys):
    run = shutil.copytree(tiny.flow_run(), tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    capsys.readouterr()
    arguments = [f"--config={tiny.CONFIG}", f"--workdir={run}", "--config.model.depth=3"]
    assert tiny.dmf("train", *arguments) == 2
    line = one_line(capsys)
    assert "model.depth is 2 and not 3; choose another workdir" in line
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_start_of_another_architecture_is_refused(tmp_path, capsys):
    run = tiny.flow_run()
    capsys.readouterr()
    code = tiny.dmf(
        "train", f"--config={tiny.CONFIG}", f"--workdir={tmp_path}/run",
        f"--config.init.checkpoint={run}", "--config.model.width=64",
    )
    line = one_line(capsys)
    assert code == 2
    assert f"model.width=64: init.checkpoint={run} has 32; give the same, or leave it out" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    with small_network.registered():
        config = small_network.config({"run.steps": 12, "run.log_every": 5})
        built = build.training(config)
    sixth = jax.device_get(built.data_loader.batch(5, batch_sharding(built.recipe.mesh)).y)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Poisoned(FlowMatching):
        """The noise of the sixth batch is NaN."""

        def draw(self, key, batch, step):
            # The labels of one step's batch tell it from the others, whatever is traced.
            draws = super().draw(key, batch, step)
            bad = jax.numpy.all(batch.y == sixth)
            return draws._replace(noise=jax.numpy.where(bad, jax.numpy.nan, draws.noise))

    with small_network.registered():
        registry.register("objective", poisoned=Poisoned)
        code = tiny.dmf(
            "train", f"--config={small_network.CONFIG}", f"--workdir={tmp_path}",
            "--config.run.steps=12", "--config.run.log_every=5", "--config.objective.name=poisoned",
        )  # fmt: skip
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1
    assert "not finite at step 6" in line
    assert "the checkpoint of step 4 is kept" in line
    assert "optimizer.learning_rate" in line
    assert latest_step(tmp_path) == 4
    for row in metrics_writer.read_metrics(tmp_path):
        assert all(np.isfinite(value) for value in row.values())

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Cured(FlowMatching):
        """The objective of the same name, without poison."""

    with small_network.registered():
        registry.register("objective", poisoned=Cured)
        config.objective.name = "poisoned"
        resumed = train(config, tmp_path)
        whole = train(config, tmp_path / "whole")
    # The poisoned program is another one, and rounds differently.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), resumed.params, whole.params
    )


def test_what_parts_of_a_step_refuse_of_each_other_is_told_before_anything_is_written(tmp_path):
    field = "objective.compute_sharing.unconditional_microbatches"
    config = tiny.flow_map({field: 3, "objective.guidance.kappa": 0.5})
    with pytest.raises(InputError, match=rf"^{field}=3: it must divide the 32"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_nothing_is_heard_of_threads_after_a_run_failed():
    """Neither what a thread raises, nor of the work that it left undone, also at the very end."""
    code = (
        "import gc, sys, threading; from dmf.cli import train\n"
        "async def undone(): pass\n"
        "def fails(*_):\n"
        "    global kept; kept = [undone()]; kept.append(kept)\n"
        "    thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()\n"
        "    raise OSError(28, 'No space left')\n"
        "train.main = fails\n"
        "from dmf.__main__ import main; sys.argv[:] = ['dmf', 'train']\n"
        "try: main()\n"
        "finally: threading.Thread(target=lambda: 1 / 0).start()\n"
    )
    done = tiny.process(code=code)
    assert (done.returncode, done.stderr) == (1, "dmf train: file: No space left\n")


@pytest.mark.slow
def test_a_learning_rate_far_too_high_is_told(tmp_path, capsys):
    with small_network.registered():
        code = tiny.dmf(
            "train", f"--config={small_network.CONFIG}", f"--workdir={tmp_path}",
            "--config.optimizer.learning_rate=1e30",
        )  # fmt: skip
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1
    assert "not finite at step" in line
    assert "no checkpoint is kept" in line


@pytest.mark.slow
def test_a_full_disk_keeps_earlier_checkpoints_and_the_run_goes_on(tmp_path):
    # The parameters take more than 32 kB.
    fields, run = {"model.hidden": 400, "run.sample_every": 4}, tmp_path / "run"
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    with small_network.registered():
        train(small_network.config(fields), run)
        before = json.loads((run / "config.json").read_text())
        # No file may grow beyond 32 kB: room for the metrics, none for a checkpoint. JAX would
        # complain of its own files, so that it writes no compiled programs.
        limited = (
            "import os, resource, sys; "
            "os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '1000'; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, 2**15)); "
            "from dmf.__main__ import main; sys.argv[0] = 'dmf'; main()"
        )
        done = tiny.process(
            "train", f"--config={small_network.CONFIG}", f"--workdir={run}",
            "--config.run.steps=12", *overrides, code=limited,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        line = done.stderr.strip().splitlines()[-1]
        assert "no space left to write" in line
        assert "run the same command again" in line
        assert "Traceback" not in done.stderr
        assert latest_step(run) == 8
        assert before["run"]["steps"] == 8

        state = train(small_network.config(fields | {"run.steps": 12}), run)
    assert int(state.step) == 12
