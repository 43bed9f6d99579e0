"""The command line, from a run to numbers, pictures and an export, and what it says for help."""

import json
import os
import shlex
import subprocess

import jax
import numpy as np
import PIL.Image
import pytest
import small_network
import tiny

import dmf
from configs import default
from dmf import __main__
from dmf.checkpoints import load
from dmf.cli import train as train_verb
from dmf.errors import InputError, RunError, Stopped
from dmf.objectives import DrawnGuidance
from dmf.objectives.build import interpolant
from dmf.runtime import progress, sharding
from dmf.runtime.ownership import owned_output
from dmf.sampling.build import sampling
from dmf.sampling.generator import Generator, chunks
from dmf.training.loop import train

pytestmark = pytest.mark.usefixtures("small_network_registered")


def made(run) -> str:
    return f"--checkpoint={run}"


def start(monkeypatch, *arguments: str) -> int:
    """`dmf ARGUMENTS` in this process; the exit code."""
    monkeypatch.setattr("sys.argv", ["dmf", *arguments])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    return end.value.code


def test_help_lists_the_verbs(monkeypatch, capsys):
    assert start(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("train", "sample", "evaluate", "export", "report"))


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    assert start(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"dmf {dmf.__version__}\n"


def test_quiet_and_verbose_are_flags_of_every_verb(monkeypatch, capsys):
    """Errors are printed in spite of --quiet, and with --verbose where they were raised."""
    monkeypatch.setattr(progress, "_SCREEN", progress._Screen())
    missing = "dmf components: nothing: no such kind; choose one of "
    for flags, traceback in (([], False), (["--quiet"], False), (["--verbose"], True)):
        assert start(monkeypatch, "components", "nothing", *flags) == 2
        told = capsys.readouterr().err
        assert told.splitlines()[-1].startswith(missing)
        assert told.startswith("Traceback") == traceback
    assert start(monkeypatch, "report", "--quiet", "--verbose") == 2
    assert "dmf report: --quiet, --verbose: give one of them" in capsys.readouterr().err


NEXT = ("dmf sample --checkpoint={0} --plugins=own.py --steps=1,2 --output={0}/samples.png",
        "dmf evaluate --checkpoint={0} --plugins=own.py")


@pytest.mark.parametrize(("fields", "plugins", "expected"), [
    ({}, ["own.py"], NEXT),
    ({}, [], [command.replace(" --plugins=own.py", "") for command in NEXT]),
    ({"sampling.ema": ""}, ["own.py"], [NEXT[0].replace(" --steps", " --ema= --steps"), NEXT[1]]),
    ({"model.channels": 4}, ["own.py"], NEXT[1:]),
])  # fmt: skip
def test_training_ends_with_the_commands_that_come_next(fields, plugins, expected):
    commands = list(train_verb.next_commands(tiny.config(fields), "runs/a", plugins))
    assert commands == [command.format("runs/a") for command in expected]
    *_, evaluate = train_verb.next_commands(tiny.config(fields), "my runs/a", plugins)
    assert shlex.split(evaluate)[2] == "--checkpoint=my runs/a"


MAIN_FLAGS = {
    **dict.fromkeys(("train", "sweep"), "--workdir"),
    **dict.fromkeys(("report", "convert", "prepare"), "--output"),
    "compile": "--topology", "config": "--config", "components": "--plugins",
    "completion": "bash",
}  # fmt: skip


@pytest.mark.parametrize("verb", __main__.VERBS)
def test_every_verb_explains_its_flags(monkeypatch, capsys, verb):
    assert start(monkeypatch, verb, "--help") == 0
    text = capsys.readouterr().out
    assert f"dmf {verb} " in text
    assert text.count(MAIN_FLAGS.get(verb, "--checkpoint")) >= 2


@pytest.mark.parametrize("arguments", [[], ["dance"], ["dance", "--help"]])
def test_an_unknown_verb_ends_with_2(monkeypatch, capsys, arguments):
    assert start(monkeypatch, *arguments) == 2
    printed = "".join(capsys.readouterr())
    assert "train" in printed
    assert "sample" in printed


def test_a_defect_is_told_whole_and_ends_with_1(monkeypatch, capsys):
    def fails(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("dmf.cli.report.main", fails)
    assert start(monkeypatch, "report") == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert told.endswith("ZeroDivisionError: a defect\n")


@pytest.mark.parametrize(("error", "code", "line"), [
    (InputError("seed", -1, "give 0 or more"), 2, "seed=-1: give 0 or more"),
    (RunError("the loss is not finite"), 1, "the loss is not finite"),
    (FileNotFoundError(2, "No such file", "a.npz"), 1, "a.npz: No such file"),
    (Stopped("told to stop at step 3"), 75, "told to stop at step 3"),
    (KeyboardInterrupt(), 130, "interrupted; the same command resumes from the last checkpoint"),
], ids=lambda value: type(value).__name__)
def test_every_other_error_is_one_line_and_has_an_exit_code(monkeypatch, capsys, error, code, line):
    def fails(*_):
        raise error

    monkeypatch.setattr("dmf.cli.report.main", fails)
    assert start(monkeypatch, "report") == code
    assert capsys.readouterr().err == f"dmf report: {line}\n"


def test_a_run_and_its_flow_map_from_the_command_line(tmp_path, capsys):
    workdir = tmp_path / "run"
    overrides = ["--config.run.steps=2", "--config.sampling.steps=(1,)", "--config.seed=5"]
    train = ["train", f"--config={tiny.CONFIG}", f"--workdir={workdir}", *overrides]
    assert tiny.dmf(*train) == 0
    progress = capsys.readouterr().err
    assert "step 2/2  loss" in progress
    assert "steps/s" in progress
    assert "left" in progress
    config = load.read_config(workdir)
    assert (config.run.steps, config.sampling.steps, config.seed) == (2, [1], 5)


@pytest.mark.slow
def test_directories_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ["train", f"--config={small_network.CONFIG}", "--config.run.steps=2"]
    assert tiny.dmf(*train, "--workdir=runs/first") == 0
    assert tiny.dmf(*train, "--workdir=runs/next", "--config.init.checkpoint=runs/first") == 0
    assert tiny.dmf("export", "--checkpoint=runs/next", "--output=runs/export") == 0
    assert tiny.dmf("sample", "--checkpoint=runs/export", "--output=grid.png") == 0


@pytest.mark.slow
def test_evaluate_writes_its_numbers_and_settings(tmp_path, capsys):
    output = tmp_path / "deep/numbers.json"
    arguments = [made(small_network.run()), "--steps=1,3", "--count=80", f"--output={output}"]
    assert tiny.dmf("evaluate", *arguments) == 0
    assert capsys.readouterr().out.strip() == str(output)
    found = json.loads(output.read_text())
    assert [row["steps"] for row in found["results"]] == [1, 3]
    for row in found["results"]:
        assert row["fd_pixels"] > 0
        assert 0 <= row["label_agreement"] <= 1
        assert (row["protocol"], row["count"], row["ema"]) == ("pixels", 80, "main")
    assert found["reference"]["name"] == "digits"
    assert 0.2 < found["reference"]["halves_distance"] < 0.4
    assert found["settings"] == {"chunk_size": 3, "part_size": 24}
    assert (found["seed"], found["step"]) == (0, 8)


@pytest.mark.parametrize("verb", ["sample", "evaluate", "export", "report"])
def test_an_output_that_another_command_is_writing_is_refused(tmp_path, capsys, verb):
    output = tmp_path / ("grid.png" if verb == "sample" else "output")
    what = tiny.flow_run() if verb == "report" else made(tiny.flow_run())
    with owned_output("--output", output):
        assert tiny.dmf(verb, what, f"--output={output}") == 2
        assert f"output={output}: another command is writing there" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_evaluate_takes_its_numbers_of_steps_from_the_config(tmp_path):
    arguments = [made(small_network.run()), f"--output={tmp_path}/numbers.json"]
    assert tiny.dmf("evaluate", *arguments) == 0
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert [row["steps"] for row in found["results"]] == [1, 2]


def test_evaluate_measures_the_parameters_that_it_names(tmp_path):
    """The EMA, and the raw parameters, which are others after eight steps."""
    arguments = [made(small_network.run()), "--steps=1", "--ema=main,",
                 f"--output={tmp_path}/n.json"]  # fmt: skip
    assert tiny.dmf("evaluate", *arguments) == 0
    main, raw = json.loads((tmp_path / "n.json").read_text())["results"]
    assert (main["ema"], raw["ema"]) == ("main", "")
    assert main["fd_pixels"] != raw["fd_pixels"]


@pytest.mark.slow
def test_a_flow_model_is_measured_as_a_flow_map(tmp_path):
    overrides = ["--config.model.conditioning=decoupled", "--config.model.split_depth=1"]
    distances = {}
    for name, others in (("flow", []), ("map", overrides)):
        output = tmp_path / f"{name}.json"
        arguments = [made(tiny.flow_run()), "--steps=2", f"--output={output}", *others]
        assert tiny.dmf("evaluate", *arguments) == 0
        distances[name] = json.loads(output.read_text())["results"][0]["fd_pixels"]
    assert distances["flow"] != distances["map"]


def test_a_grid_of_samples_is_a_picture(tmp_path):
    arguments = [made(small_network.run()), f"--output={tmp_path}/grid.png", "--count=20"]
    assert tiny.dmf("sample", *arguments, "--steps=1") == 0
    width, height = PIL.Image.open(tmp_path / "grid.png").size
    assert width > 6 * 91 and height == 20 + 6 * 19  # Captions of steps and of classes.


def test_samples_are_arrays_with_the_labels_asked_for(tmp_path):
    common = [made(small_network.run()), "--steps=1", "--count=7"]
    for name, more in (("some", ["--labels=3,10"]), ("all", []), ("other", ["--seed=1"])):
        assert tiny.dmf("sample", *common, f"--output={tmp_path}/{name}.npz", *more) == 0
    some, everything, other = (
        np.load(tmp_path / f"{name}.npz") for name in ("some", "all", "other")
    )
    assert some["arr_0"].shape == (7, 8, 8, 1)
    assert some["arr_0"].dtype == np.uint8
    assert some["labels"].tolist() == [3, 10, 3, 10, 3, 10, 3]
    assert everything["labels"].tolist() == list(range(7))
    assert (everything["arr_0"] != other["arr_0"]).mean() > 0.5


def test_guidance_of_the_command_line_reaches_the_samples(tmp_path):
    common = [made(small_network.run()), "--steps=1", "--count=8"]
    scale = "--config.sampling.guidance.scale=9.0"
    for name, more in (("plain", []), ("guided", [scale])):
        assert tiny.dmf("sample", *common, f"--output={tmp_path}/{name}.npz", *more) == 0
    plain, guided = (np.load(tmp_path / f"{n}.npz")["arr_0"] for n in ("plain", "guided"))
    assert (plain != guided).any()


@pytest.mark.slow
def test_guidance_is_drawn_in_training_and_chosen_at_sampling(tmp_path):
    """A flow model that knew of none is given it; what it is asked for changes what it makes."""
    fields = {"model.guidance_input": True, "run.steps": 2, "optimizer.learning_rate": 0.03,
              "init.checkpoint": str(tiny.flow_run())}  # fmt: skip
    config = tiny.flow_map(fields)
    config.objective.guidance = default.component(DrawnGuidance(kappa=0.3))
    train(config, tmp_path / "run")
    found = {}
    for scale in (1.0, 4.0):
        output = tmp_path / f"{scale}.npz"
        asked = [f"--config.sampling.guidance.scale={scale}", f"--output={output}"]
        assert tiny.dmf("sample", made(tmp_path / "run"), "--steps=2", "--count=8", *asked) == 0
        found[scale] = np.load(output)["arr_0"]
    assert (found[1.0] != found[4.0]).any()


def test_drawn_guidance_wants_a_network_that_takes_it(tmp_path):
    config = tiny.flow_map()
    config.objective.guidance = default.component(DrawnGuidance())
    with pytest.raises(InputError, match="model.guidance_input=False: .* set it to True"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("sampler", ["euler", pytest.param("ctm", marks=pytest.mark.slow)])
def test_samples_depend_on_seed_and_index_alone(sampler):
    network, config, params = load.load_network(small_network.run())
    config.sampling.sampler = {"name": sampler}
    settings = sampling(config.sampling, interpolant(config.objective))
    labels = np.arange(24) % 10
    generators = [Generator(network, settings, None, mesh=sharding.make_mesh(devices=devices))
                  for devices in (jax.devices(), jax.devices()[:1])]

    def samples(generator: Generator, size: int, seed: int = 0) -> np.ndarray:
        generate = generator(params, steps=2, seed=seed)
        parts = [generate(i, labels[i]).images for i in chunks(24, size)]
        return np.concatenate(parts)

    eight, one = generators
    np.testing.assert_array_equal(samples(eight, 24), samples(one, 3))
    np.testing.assert_allclose(samples(one, 24).astype(int), samples(one, 3), atol=1)
    assert (samples(one, 24, seed=1) != samples(one, 24)).mean() > 0.5


def test_an_export_evaluates_samples_and_loads_as_its_run(tmp_path):
    assert tiny.dmf("export", made(small_network.flow_map_run()), f"--output={tmp_path}/out") == 0
    for name, where in (("run", small_network.flow_map_run()), ("export", tmp_path / "out")):
        output = f"--output={tmp_path}/{name}.npz"
        assert tiny.dmf("sample", made(where), "--steps=1", "--count=8", output) == 0
    run, export = (np.load(tmp_path / f"{n}.npz")["arr_0"] for n in ("run", "export"))
    np.testing.assert_array_equal(run, export)
    assert tiny.dmf("evaluate", made(tmp_path / "out"), "--steps=1") == 0
    assert (tmp_path / "out/evaluation.json").exists()
    flow_map, _ = dmf.load(tmp_path / "out")
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    ones = jax.numpy.ones(8)
    of_run = dmf.load(small_network.flow_map_run())[0](x, ones, 0 * ones, jax.numpy.arange(8))
    np.testing.assert_array_equal(flow_map(x, ones, 0 * ones, jax.numpy.arange(8)), of_run)


@pytest.mark.slow
def test_compiled_programs_are_kept(tmp_path):
    """The second process finds what the first one compiled, and writes nothing new."""
    unset = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    environment |= {"XDG_CACHE_HOME": str(tmp_path),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    kept = tmp_path / "dmf" / "compiled"
    found = []
    for _ in range(2):
        subprocess.run(tiny.command("compile", f"--config={tiny.CONFIG}"), check=True,
                       env=environment, cwd=tiny.ROOT)  # fmt: skip
        found.append({p.name for p in kept.iterdir() if p.name.endswith("-cache")})
    assert any("step" in name for name in found[0])
    assert found[1] == found[0]
