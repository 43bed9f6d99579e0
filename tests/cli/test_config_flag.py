"""The config of a command line: its file, and the overrides of its fields."""

import dataclasses
import os
import pathlib
import sys

import plugin_files
import pytest
import tiny
from ml_collections import ConfigDict

from configs import default, digits_dmf, digits_meanflow
from dmf import registry
from dmf.cli import config_flag, flags
from dmf.cli.config_flag import complete, load_config, overridden, split_overrides
from dmf.errors import InputError


def override(*fields: str, config: ConfigDict | None = None) -> ConfigDict:
    """The default config with --config.FIELD for each of some fields."""
    return overridden(config or default.get_config(), [f"--config.{field}" for field in fields])


def refusal(*fields: str, config: ConfigDict | None = None) -> str:
    """The message that refuses an override."""
    with pytest.raises(InputError) as error:
        override(*fields, config=config)
    return str(error.value)


def component(config: ConfigDict, place: str) -> dict:
    """A part of a config as a dictionary."""
    for name in place.split("."):
        config = config[name]
    return config.to_dict() if isinstance(config, ConfigDict) else config


CTM = {"name": "ctm", "gamma": 0.3}
COMPONENTS = {
    "a field after its component": (
        ["sampling.sampler.name=ctm", "sampling.sampler.gamma=0.3"], "sampling.sampler", CTM,
    ),
    "a field before its component": (
        ["sampling.sampler.gamma=0.3", "sampling.sampler.name=ctm"], "sampling.sampler", CTM,
    ),
    "a component without its fields": (
        ["sampling.sampler.name=ctm"], "sampling.sampler", {"name": "ctm", "gamma": 0.5},
    ),
    "a component by its place": (
        ["sampling.sampler=ctm"], "sampling.sampler", {"name": "ctm", "gamma": 0.5},
    ),
    "the last of two": (
        ["sampling.sampler.name=ctm", "sampling.sampler.name=heun"], "sampling.sampler",
        {"name": "heun"},
    ),
    "one of a dictionary": (
        ["emas.main.name=half_life", "emas.main.images=1000"], "emas.main",
        {"name": "half_life", "images": 1000.0, "ramp": 0.05},
    ),
    "a new one of a dictionary": (
        ["emas.slow.decay=0.5", "emas.slow.name=constant"], "emas",
        {"main": {"name": "constant", "decay": 0.9999}, "slow": {"name": "constant", "decay": 0.5}},
    ),
    "a new group of a dictionary": (
        ["data.mixture.faces.weight=2", "data.mixture.faces.name=celeb"], "data.mixture",
        {"faces": {"name": "celeb", "split": "train", "directory": "", "weight": 2.0}},
    ),
    "one without fields": (["objective.interpolant=cosine"], "objective.interpolant", "cosine"),
    "one without fields by name": (
        ["objective.interpolant.name=cosine"], "objective.interpolant", "cosine",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPONENTS)
def test_another_component_has_its_own_fields(case):
    fields, place, expected = COMPONENTS[case]
    assert component(override(*fields), place) == expected


def test_a_component_within_another_one_is_chosen_after_it():
    config = override(
        "objective.guidance.max_scale=4", "objective.guidance.name=drawn",
        "objective.name=mean_flow", "objective.time_pair.first.name=uniform",
        config=digits_dmf.get_config(),
    )  # fmt: skip
    assert config.objective.name == "mean_flow"
    assert config.objective.time_pair.equal_probability == 0.75
    assert config.objective.time_pair.first.to_dict() == {"name": "uniform", "shift": 1.0}
    assert config.objective.guidance.name == "drawn"
    assert config.objective.guidance.max_scale == 4.0
    assert "omega" not in config.objective.guidance


def test_a_weighting_without_fields_replaces_one_with_fields():
    meanflow = digits_meanflow.get_config()
    config = override("objective.weighting.name=uniform", config=meanflow)
    assert config.objective.weighting.to_dict() == {"name": "uniform"}
    assert meanflow.objective.weighting.name == "adaptive"


def test_naming_the_component_that_is_there_keeps_its_fields():
    meanflow = digits_meanflow.get_config()
    meanflow.objective.weighting.power = 0.5
    config = override("objective.weighting.name=adaptive", config=meanflow)
    assert config.objective.weighting.power == 0.5


VALUES = {
    "model.depth=8": 8, "run.steps=1e3": 1000, "run.steps=2.0": 2, "run.steps=1_000": 1000,
    "mesh.data=-1": -1, "seed=4294967295": 4294967295,
    "optimizer.learning_rate=1e-4": 1e-4, "optimizer.learning_rate=1": 1.0,
    "optimizer.clip_norm=inf": float("inf"),
    "model.split_depth=3": 3, "model.split_depth=None": None, "model.split_depth=none": None,
    "model.scan=true": True, "model.scan=True": True, "model.scan=1": True, "model.scan=yes": True,
    "model.scan=t": True, "model.scan": True,
    "model.scan=false": False, "model.scan=False": False, "model.scan=0": False,
    "model.scan=no": False, "model.scan=f": False,
    "data.classes=(1,2)": (1, 2), "data.classes=1,2": (1, 2), "data.classes=[1]": (1,),
    "data.classes=(1,)": (1,), "data.classes=1": (1,), "data.classes=()": (), "data.classes=": (),
    "sampling.guidance.interval=(0,0.7)": (0.0, 0.7), "sampling.guidance.interval=0.1, 1": (0.1, 1),
    "sampling.guidance.interval=0.1:0.8": (0.1, 0.8),
    "evaluation.guidance_intervals=0.4:0.65,0.3:0.7": ((0.4, 0.65), (0.3, 0.7)),
    "evaluation.guidance_intervals=((0.4, 0.65), [0, 1])": ((0.4, 0.65), (0.0, 1.0)),
    "freeze=encoder,blocks/0/.*": ("encoder", "blocks/0/.*"), "freeze=(encoder)": ("encoder",),
    "freeze=('encoder', 'blocks/(0|1)/.*')": ("encoder", "blocks/(0|1)/.*"),
    "freeze=(blocks|embedding)/.*": ("(blocks|embedding)/.*",),
    "model.dtype=bfloat16": "bfloat16", "data.name=a=b": "a=b", "data.directory=": "",
    "optimizer.groups=(('.*/bias', 1, 0), ('blocks/(0|1)/.*', 0.5, 1))":
        ((".*/bias", 1.0, 0.0), ("blocks/(0|1)/.*", 0.5, 1.0)),
    "optimizer.groups=": (),
    "evaluation.emas=main,": ("main",), "model.embedded_times=t,r": ("t", "r"),
}  # fmt: skip


@pytest.mark.parametrize("field", VALUES)
def test_a_value_has_the_type_of_its_field(field):
    value = component(override(field), field.partition("=")[0])
    assert value == VALUES[field]
    assert type(value) is type(VALUES[field])


def test_a_boolean_may_be_a_switch():
    config = default.get_config()
    assert overridden(config, ["--noconfig.model.scan"]).model.scan is False
    assert overridden(config, ["--config.model.qk_norm"]).model.qk_norm is True


REFUSED = {
    "model.depth=2.5": "--config.model.depth=2.5: give a whole number",
    "model.depth=six": "--config.model.depth=six: give a whole number",
    "model.depth=nan": "give a whole number",
    "model.depth=inf": "give a whole number",
    "model.depth=": "give a whole number",
    "model.depth": "--config.model.depth: give a whole number",
    "model.split_depth=x": "give a whole number or None",
    "optimizer.learning_rate=fast": "give a number",
    "optimizer.groups=.*/bias": "give tuples of text, a number, a number, for example (('a', 0.5",
    "optimizer.groups=(('a', 'b', 1),)": "give tuples of text",
    "optimizer.groups=(('a', 1),)": "give tuples of text",
    "model.scan=maybe": "give True or False",
    "model.scan=2": "give True or False",
    "data.classes=n01440764": "give whole numbers, for example (1, 2)",
    "data.classes=(1,2.5)": "give whole numbers",
    "sampling.steps=1e1": "give whole numbers", "sampling.steps=1,2.0": "give whole numbers",
    "sampling.guidance.interval=0.5": "give 2 numbers, for example (0.5, 1.5)",
    "sampling.guidance.interval=(0,1,2)": "give 2 numbers",
    "sampling.guidance.interval=0:1:2": "give 2 numbers",
    "evaluation.guidance_intervals=0.4": "give pairs of numbers, for example ((0.2, 0.8), (0.4",
    "evaluation.guidance_intervals=(0.4,0.65)": "give pairs of numbers",
    "model.depht=3": "--config.model.depht=3: no such field; did you mean depth?",
    "modell.depth=3": "did you mean model?",
    "sampling.sheft=2": "did you mean shift?",
    "model.banana=3": "no such field; there are alignment_depth, ",
    "run.steps.more=3": "no such field; steps is one value",
    "=3": "no such field",
    "sampling.sampler.gamma=0.3": "euler has no such field; choose a sampler that has, by its "
                                  "name: ctm",
    "sampling.sampler.name=eular": "--config.sampling.sampler.name=eular: choose one of ",
    "sampling.sampler=eular": "choose one of adams_bashforth, ctm, euler",
    "sampling.sampler": "choose one of",
    "objective.interpolant=cubic": "--config.objective.interpolant=cubic: choose one of cosine, ",
    "objective.interpolant.power=2": "no such field; there are none",
    "sampling=fast": "set its fields one by one: decode_batch, ",
    "sampling.guidance=2": "set its fields one by one: channels, interval, scale",
    "emas=main": "--config.emas=main: name one of its parts, for example --config.emas.NAME.name; "
                 "there are main",
    "emas.slow.decay=0.5": "there is no emas.slow; there are main; --config.emas.slow.name=... "
                           "makes a new one",
    "emas.slow.name=slow": "choose one of constant, half_life",
    "data.mixture=x": "there are none yet",
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_a_refusal_says_what_could_be(field):
    assert REFUSED[field] in refusal(field)


def test_only_booleans_are_switched_off():
    with pytest.raises(InputError, match=r"^--config.run.steps: give a whole number$"):
        overridden(default.get_config(), ["--noconfig.run.steps"])
    with pytest.raises(InputError, match="takes no value"):
        overridden(default.get_config(), ["--noconfig.model.scan=True"])


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan"),
        ("sampling.shift=nan", "sampling.shift=nan"),
        ("data.weight=nan", "data.weight=nan"),
    ],
)
def test_what_is_no_number_is_refused_by_its_component(field, named):
    from dmf.training.build import training

    with pytest.raises(InputError) as error:
        training(override(field, config=tiny.config()))
    assert named in str(error.value)


def test_overrides_leave_the_config_alone():
    config = default.get_config()
    before = config.to_dict()
    override("sampling.sampler.name=ctm", "emas.slow.name=constant", config=config)
    assert config.to_dict() == before


def test_a_stored_config_has_the_defaults_of_new_fields():
    stored = default.get_config()
    del stored.sampling["shift"]
    stored.data.classes = [1, 2]
    config = config_flag.overridden_stored(stored, ["--config.sampling.steps=3"])
    assert (config.sampling.shift, config.sampling.steps) == (1.0, (3,))


def test_a_flag_and_its_value_may_stand_apart():
    arguments = ["--workdir", "w", "--config.run.steps", "5", "--config.mesh.data", "-1",
                 "--config.model.scan", "--config.seed=3", "--noconfig.model.qk_norm", "--config",
                 "file.py"]  # fmt: skip
    assert split_overrides(arguments) == (
        ["--config.run.steps=5", "--config.mesh.data=-1", "--config.model.scan", "--config.seed=3",
         "--noconfig.model.qk_norm"],
        ["--workdir", "w", "--config", "file.py"],
    )  # fmt: skip


@pytest.mark.slow
def test_flags_may_stand_apart_on_the_command_line(tmp_path):
    config, workdir = ("--config", tiny.CONFIG), tmp_path / "run"
    fields = ("--config.run.steps", 2, "--config.run.checkpoint_every", 1)
    assert tiny.dmf("train", *config, "--workdir", workdir, *fields) == 0
    output = tmp_path / "samples.npz"
    sample = ("--checkpoint", workdir, "--output", output, "--count", 2, "--steps", 1)
    assert tiny.dmf("sample", *sample, "--config.sampling.guidance.scale", 2) == 0
    assert output.exists()
    assert tiny.dmf("convert", workdir, "--output", tmp_path / "out") == 0
    assert (tmp_path / "out/config.json").exists()


def test_the_home_directory_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    arguments = ["--workdir=~/runs", "--checkpoint", "~/x", "--config.data.directory=~/d", "a~b"]
    assert flags.expand_home(arguments) == [
        "--workdir=/home/someone/runs", "--checkpoint", "/home/someone/x",
        "--config.data.directory=/home/someone/d", "a~b",
    ]  # fmt: skip


def written(folder: pathlib.Path, body: str) -> str:
    """A config file, which may name ConfigDict."""
    path = folder / "mine.py"
    path.write_text(f"{body}\nfrom ml_collections import ConfigDict\n")
    return str(path)


def test_a_file_gives_the_fields_that_it_changes(tmp_path):
    file = written(tmp_path, "def get_config(width='8'):\n    return ConfigDict({'model': {'name': "
                             "'dit', 'input_size': 8, 'channels': 1, 'depth': 1, 'heads': 1, "
                             "'width': int(width), 'num_classes': 10}})\n")  # fmt: skip
    config = load_config(file)
    assert (config.model.width, config.model.patch_size, config.run.steps) == (8, 2, 1000)
    assert load_config(f"{file}:16").model.width == 16


def test_a_file_that_was_changed_at_once_is_run_as_it_is(tmp_path, monkeypatch):
    """Also if its size and time of change are those of the compiled file before it."""
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    seeds = []
    for seed in (1, 2):
        file = written(tmp_path, f"def get_config():\n    return ConfigDict({{'seed': {seed}}})")
        os.utime(file, (1, 1))
        seeds.append(load_config(file).seed)
    assert seeds == [1, 2]


@pytest.mark.parametrize("neighbour", ["namespace", "package"])
def test_a_file_imports_from_its_own_folder(neighbour, tmp_path, monkeypatch):
    """And not from a folder of the same name in the working directory, where -m looks first."""
    for place in ("mine", "other"):
        (tmp_path / place / "recipes").mkdir(parents=True)
        (tmp_path / place / "recipes" / "base.py").write_text(f"WHERE = {place!r}\n")
    if neighbour == "package":
        (tmp_path / "other/recipes/__init__.py").write_text("")
    file = tmp_path / "mine/recipes/run.py"
    file.write_text("from ml_collections import ConfigDict\nfrom recipes import base\n\n"
                    "def get_config():\n"
                    "    return ConfigDict({'data': {'name': base.WHERE}})\n")  # fmt: skip
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "other"), *sys.path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    assert load_config(str(file)).data.name == "mine"


FILES = {
    "x = 1": "it has no function get_config()",
    "def get_config():\n    return 3": "it returned int",
    "def get_config():\n    return {'seed': 1}": "must return an ml_collections.ConfigDict",
    "def get_config():\n    return ConfigDict({'accumulaton': 4})":
        "accumulaton=4: Config has no such field",
    "def get_config():\n    return ConfigDict({'run': {'stpes': 4}})":
        "run.stpes=4: Run has no such field; did you mean steps?",
    "def get_config():\n    return ConfigDict({'run': 4})": "run=4",
    "def get_config():\n    return ConfigDict({'run': {'steps': '4'}})":
        "run.steps='4': give a whole number",
    "def get_config():\n    return ConfigDict({'seed': None})": "seed=None: give a whole number",
    "def get_config():\n    x = 1\n    return x / 0": "ZeroDivisionError: division by zero (line 3",
    "def get_config(:\n": "SyntaxError",
    "import nothing_here\n": "ModuleNotFoundError: No module named 'nothing_here' (line 1)",
}  # fmt: skip


@pytest.mark.parametrize("body", FILES)
def test_a_file_that_gives_no_config_is_told_in_one_line(body, tmp_path):
    with pytest.raises(InputError) as error:
        load_config(written(tmp_path, body))
    assert f"--config={tmp_path}/mine.py: " in str(error.value)
    assert FILES[body] in str(error.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registered:
    """A component of a plugin."""

    power: float = 1.0


MISSPELT = [
    "gradient_accumulaton = 4", "run.stpes = 5", "data.clases = (1,)", "sampling.shfit = 2.0",
    "sampling.guidance.omega = 2.0", "evaluation.cuont = 5", "mesh.fspd = 2",
    "init.checkpont = '/nowhere'", "teacher.chekpoint = '/x'", "latents.scaling = 0.18",
    "alignment.encodr = 'x'", "frezee = ('encoder',)", "profil = '1:2'", "data.mirrored = True",
    "optimizer.lr = 1e-3", "objective.label_droput = 0.5",
    "emas.main.decya = 0.9", "objective.time_sampler.maen = 0.4",
]  # fmt: skip
# Fields of whole components, by the message that names them.
MISSPELT_WITHIN = {
    "data.mixture = {'more': {'name': 'digits', 'wieght': 2.0}}":
        "data.mixture.more.wieght=2.0: MixturePart has no such field; did you mean weight?",
    "emas.slow = {'name': 'half_life', 'imges': 1e6}":
        "emas.slow.imges=1000000.0: half_life has no such field; did you mean images?",
    "sampling.sampler = {'name': 'ctm', 'gama': 0.3}":
        "sampling.sampler.gama=0.3: ctm has no such field; did you mean gamma?",
    "objective.time_sampler = {'name': 'narow'}":
        "objective.time_sampler.name=narow: choose one of ",
    "objective.time_sampler = {'name': 'registered', 'pwoer': 2.0}":
        "objective.time_sampler.pwoer=2.0: registered has no such field; did you mean power?",
}


def refusal_of_file(line: str, folder: pathlib.Path) -> str:
    """The message that refuses a config file with a line like "run.steps = 3"."""
    body = f"def get_config():\n    c = g()\n    c.{line}\n    return c\n"
    file = written(folder, f"from dmf.default_config import get_config as g\n{body}")
    with plugin_files.registered_components(), pytest.raises(InputError) as error:
        registry.register("time_sampler", registered=Registered)
        load_config(file)
    return str(error.value)


def test_a_misspelt_field_of_a_file_is_named(tmp_path):
    for line in MISSPELT:
        assert line.partition(" =")[0] in refusal_of_file(line, tmp_path)


def test_a_misspelt_field_within_a_component_of_a_file_is_named(tmp_path):
    for line, message in MISSPELT_WITHIN.items():
        assert message in refusal_of_file(line, tmp_path)


def test_a_whole_config_is_complete():
    assert complete(ConfigDict()).to_dict() == default.get_config().to_dict()
