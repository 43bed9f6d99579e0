"""The config of a checkpoint may come from anybody: every fault in it is one line, and the paths in
it are followed only where the run itself wrote them."""

import json
import os
import subprocess

import hostile_configs
import pytest
import tiny
from etils import epath

from dmf.checkpoints import load, stored_config
from dmf.errors import InputError, RunError

FIELDS = {"model.depth": 1, "model.width": 8, "model.heads": 1}


@pytest.fixture
def stranger(tmp_path):
    """An export, and what its config.json holds."""
    folder = tmp_path / "stranger"
    return folder, hostile_configs.write_export(folder, tiny.config(FIELDS))


def refusal(folder, config):
    """What is said of an export with another config."""
    hostile_configs.write_config(folder, config)
    with pytest.raises((InputError, RunError)) as error:
        load.read_config(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        ("model", None, "model=None: give a dictionary"),
        ("model", {"name": ["dit"]}, r"model.name=['dit']: choose one of"),
        ("latents", [], "latents=[]: give a dictionary"),
        ("sampling", {"sampler": {"name": None}}, "sampling.sampler.name=None: choose one of"),
        ("data", {"mixture": {"more": 3}}, "data.mixture.more=3: give a dictionary"),
        ("objective", {}, "objective.name=None: choose one of"),
        ("seed", hostile_configs.nested(20), "nested deeper than any config"),
        ("seed", "\ud800", "is no text"),
        ("seed", "a\0b", "is no text"),
        ("origin", ["a"], "its origin is no text"),
        ("emas", {"a.b": 1}, "no field has the name 'a.b'"),
        ("emas", {"__class__": 1}, "no field has the name '__class__'"),
        ("seed", "a" * 2**20, "larger than any config"),
    ],
)
def test_a_config_that_cannot_be(stranger, section, value, said):
    folder, stored = stranger
    assert said in refusal(folder, stored | {section: value})


@pytest.mark.parametrize("section", ["model", "data", "latents", "objective", "sampling"])
def test_a_config_without_a_section(stranger, section):
    folder, stored = stranger
    stored.pop(section)
    assert f"checkpoint={folder}: {section}: the config lacks this section" in refusal(
        folder, stored
    )


@pytest.mark.parametrize("text", [b"[]", b"3", b"{", b"\xff", b"[" * 100_000, b""])
def test_a_file_that_is_no_config(stranger, text):
    folder, _ = stranger
    (folder / "config.json").write_bytes(text)
    with pytest.raises(RunError, match=r"config.json: it is damaged"):
        load.read_config(folder)


@pytest.mark.parametrize("value", [{}, [], "dinov2", {"name": 3}])
def test_a_frozen_network_without_a_name(stranger, value):
    folder, _ = stranger
    said = refusal(folder, {"format": 2, "encoder": value})
    assert "its config is of no network that is known" in said
    with pytest.raises(InputError, match="its config is of no network that is known"):
        load.load_encoder(folder, "dinov2")


PATHS = {
    "init": "checkpoint", "teacher": "checkpoint", "alignment": "encoder", "data": "directory",
    "latents": "autoencoder", "run": "preview_autoencoder",
}  # fmt: skip


def test_paths_in_an_export_are_not_followed(stranger, tmp_path, capsys):
    folder, stored = stranger
    for section, name in PATHS.items():
        stored[section][name] = str(tmp_path / "elsewhere")
    for name in ("reference", "inception", "dinov2"):
        stored["evaluation"][name] = str(tmp_path / "elsewhere")
    stored["data"]["mixture"] = {"more": {"name": "digits", "directory": str(folder / "data")}}
    hostile_configs.write_config(folder, stored)
    config = load.read_config(folder)
    assert list(stored_config.named_paths(load.config_to_json(config))) == []
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.count(str(tmp_path / "elsewhere")) == 9
    assert f"data.mixture.more.directory='{folder / 'data'}'" in said


def test_a_dataset_in_an_export_is_not_opened(stranger, tmp_path, capsys):
    """`dmf evaluate` looks for the dataset where it would without the path."""
    folder, stored = stranger
    stored["data"] |= {"name": "mine", "directory": str(folder / "data")}
    (folder / "data").mkdir()
    (folder / "data/dataset_info.json").write_text("{}")
    (folder / "data/features.json").write_text("{}")
    hostile_configs.write_config(folder, stored)
    assert tiny.dmf("evaluate", f"--checkpoint={folder}", "--ema=") == 2
    *_, said, last = capsys.readouterr().err.splitlines()
    assert f"data.directory='{folder / 'data'}'" in said and "not followed" in said
    assert "data.name=mine: no such dataset in" in last and str(folder) not in last


def test_a_path_on_the_command_line_is_followed(stranger, tmp_path, capsys):
    folder, _ = stranger
    there = f"--config.data.directory={tmp_path}/nowhere"
    assert tiny.dmf("evaluate", f"--checkpoint={folder}", "--ema=", there) == 2
    assert f"data.directory={tmp_path}/nowhere: there is no such" in capsys.readouterr().err


@pytest.mark.parametrize(("path", "expected"), [
    ("{}/data", True), ("{}/run/data", False), ("~/data", True), ("~/run/data", False),
])
def test_a_run_keeps_the_paths_that_it_wrote(tmp_path, monkeypatch, path, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    run, path = epath.Path(tmp_path) / "run", path.format(tmp_path)
    config = {"data": {"directory": path}}
    followed, left_out = stored_config.without_foreign_paths(config, run, exported=False)
    assert (followed == config) is expected
    assert left_out == ([] if expected else [f"data.directory={path!r}"])


@pytest.mark.parametrize(("directory", "section", "name", "path", "kept"), [
    (".", "latents", "autoencoder", "hf:me/vae", True),
    (".", "latents", "autoencoder", "gs://bucket/vae", True),
    (".", "latents", "autoencoder", "~/vae", True),
    (".", "latents", "autoencoder", "vae", False),
    (".", "data", "directory", "hf:me/vae", False),
    (".", "data", "directory", "a://b", False),
    ("gs://bucket/run", "data", "directory", "gs://bucket/run/data", False),
    ("gs://bucket/run", "data", "directory", "gs://bucket/data", True),
    ("gs://bucket/run", "data", "directory", "data", True),
])
def test_a_path_is_followed_from_within_the_run_where_it_leads_elsewhere(
    tmp_path, monkeypatch, directory, section, name, path, kept
):
    monkeypatch.chdir(tmp_path)
    config = {section: {name: path}}
    _, left_out = stored_config.without_foreign_paths(
        config, epath.Path(directory), exported=False
    )
    assert left_out == ([] if kept else [f"{section}.{name}={path!r}"])


@pytest.fixture
def precious(tmp_path):
    """A folder with a file; links in an export lead to them, and nothing changes them."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "work.json").write_text("precious")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["work.json"]
    assert (folder / "work.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "flags"),
    [(".evaluation.json.parts", []), ("evaluation_features", ["--keep-features"])],
)
def test_a_link_in_an_export_to_a_folder_is_refused(stranger, precious, capsys, name, flags):
    """`dmf evaluate` writes into folders of these names by default."""
    folder, _ = stranger
    (folder / name).symlink_to(precious)
    assert tiny.dmf("evaluate", f"--checkpoint={folder}", "--ema=", *flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"output={folder / name}: it is a symbolic link to {precious}" in last


@pytest.mark.slow
def test_a_link_in_an_export_to_a_file_is_not_followed(stranger, precious):
    folder, _ = stranger
    for name in (".evaluation.json.partial", "evaluation.json"):
        (folder / name).symlink_to(precious / "work.json")
    arguments = f"--checkpoint={folder}", "--ema=", "--steps=1", "--metrics=label_agreement"
    assert tiny.dmf("evaluate", *arguments) == 0
    assert not (folder / "evaluation.json").is_symlink()
    assert json.loads((folder / "evaluation.json").read_text())["results"]


# Mutations of a config that each command reads.
COUNT = 200


@pytest.mark.slow
def test_every_mutation_of_a_config_is_one_line(tmp_path):
    """In a process of its own, where no types are checked but those that dmf checks."""
    code = f"import hostile_configs; hostile_configs.try_mutations({str(tmp_path)!r}, {COUNT})"
    environment = tiny.environment()
    environment["PYTHONPATH"] += os.pathsep + str(tiny.ROOT / "tests")
    ended = subprocess.run(
        tiny.command(code=code), env=environment, capture_output=True, text=True, timeout=600,
        check=True,
    )  # fmt: skip
    print(ended.stdout)
    counts, tracebacks = json.loads(ended.stdout)
    assert not tracebacks
    for name in hostile_configs.VERBS:
        assert counts[f"{name} accepted"] > 10
    assert sum(counts.values()) == COUNT * len(hostile_configs.VERBS)
