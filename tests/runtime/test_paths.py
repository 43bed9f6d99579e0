"""A leading ~ is the home directory in every path, and never the name of a folder."""

import os
import pathlib
import pwd

import numpy as np
import pytest
import small_network
import tiny
from etils import epath

from dmf import __main__
from dmf.checkpoints import export, load
from dmf.checkpoints.params import latest_step
from dmf.cli import config_flag, flags
from dmf.cli.config_flag import configured
from dmf.data.build import Data, dataset
from dmf.data.datasets import open_dataset
from dmf.data.image_files import open_images
from dmf.data.image_sets import open_image_set
from dmf.errors import InputError
from dmf.evaluation.reference_statistics import read_reference
from dmf.experiments import html_report, runs, sweeps
from dmf.runtime.files import new_directory
from dmf.runtime.paths import user_path
from dmf.training.loop import train

pytestmark = pytest.mark.usefixtures("small_network_registered")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory with a run; the current directory is empty."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/run").symlink_to(small_network.run())
    (tmp_path / "home/sweep.py").write_text("def get_sweep(): return [{'seed': 1}]\n")
    (tmp_path / "home/config.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': 1})\n")
    (tmp_path / "home/latents").mkdir()
    np.save(tmp_path / "home/latents/0.npy", np.zeros((8, 4, 4), np.float32))
    np.savez(tmp_path / "home/images.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    return tmp_path / "home"


def homeless(monkeypatch):
    """There is no HOME, and the user is in no list of users, as in some containers."""
    def unknown(_):
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def write_empty(path):
    with new_directory(path):
        pass


READ = {
    "checkpoint": lambda: load.read_config("~/run"),
    "step": lambda: latest_step("~/run"),
    "images": lambda: open_image_set("~/images.npz"),
    "dataset": lambda: configured(small_network.config(), [
        "--config.data.directory=~/latents"])[0].data.name == "cache",
    "sweep": lambda: sweeps.read_sweep("~/sweep.py"),
    "config": lambda: config_flag.load_config("~/config.py"),
    "plugin": lambda: flags.run_plugin(pathlib.Path("~/config.py")),
    "runs": lambda: runs.find_runs(["~/run"]),
}
# And what each of them makes in the home directory.
WRITE = {
    "workdir": (lambda: train(small_network.config({"run.steps": 1}), "~/new"), "new/config.json"),
    "export": (lambda: export.convert("~/run", "~/export", fields={}), "export/config.json"),
    "directory": (lambda: write_empty("~/empty"), "empty"),
    "report": (lambda: html_report.write_report("~/report", runs.find_runs(["~/run"])),
               "report/report.html"),
}  # fmt: skip
REFUSED = {
    "labels": lambda: open_images("~/run", labels="~/none"),
    "reference": lambda: read_reference("~/none.npz"),
    "digits": lambda: open_dataset("digits", directory="~/none"),
    "data.directory": lambda: dataset(Data(directory="~/none"), small_network.NETWORK),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_found_in_the_home_directory(home, name):
    assert READ[name]() is not False


@pytest.mark.parametrize("name", WRITE)
def test_what_is_written_lies_in_the_home_directory(home, name):
    act, made = WRITE[name]
    act()
    assert (home / made).exists()
    assert not any(pathlib.Path.cwd().iterdir())


@pytest.mark.parametrize("name", [*READ, *WRITE, *REFUSED])
def test_without_a_home_directory_a_path_is_refused(home, monkeypatch, name):
    homeless(monkeypatch)
    act = REFUSED.get(name) or READ.get(name) or WRITE[name][0]
    with pytest.raises(InputError, match="there is no such home directory; set HOME"):
        act()
    assert not any(pathlib.Path.cwd().iterdir())


@pytest.mark.parametrize("arguments", [
    ["sample", "--checkpoint=a://b", "--output=x.png"], ["evaluate", "--checkpoint=a://b"],
    ["report", "--output=x", "a://b"], ["train", f"--config={tiny.CONFIG}", "--workdir=a://b"],
], ids=lambda arguments: arguments[0])  # fmt: skip
def test_a_bucket_of_an_unknown_kind_is_one_line(home, capsys, arguments):
    assert tiny.dmf(*arguments) == 2
    assert capsys.readouterr().err == (
        f"dmf {arguments[0]}: a://b: nothing is known of a://; give a path, or a bucket as gs://, "
        "s3:// or az://\n"
    )


def test_a_home_directory_of_another_user(monkeypatch):
    monkeypatch.setattr(pwd, "getpwnam", lambda name: pwd.struct_passwd((name, *"xxxx", "/h", "")))
    assert user_path("~someone/x") == epath.Path("/h/x")
    assert user_path("a/~") == epath.Path("a/~")


@pytest.mark.parametrize(("given", "directory"), [
    (None, "{home}/.cache/dmf/compiled"), ("~/c", "{home}/c"), ("", ""), ("/c", "/c"),
])  # fmt: skip
def test_compiled_programs_are_kept_in_the_home_directory(home, monkeypatch, given, directory):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(__main__.CACHE_VARIABLE)
    if given is not None:
        monkeypatch.setenv(__main__.CACHE_VARIABLE, given)
    __main__.set_compilation_cache()
    assert os.environ[__main__.CACHE_VARIABLE] == directory.format(home=home)


def test_without_a_home_directory_no_compiled_programs_are_kept(home, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(__main__.CACHE_VARIABLE, "~/c")
    homeless(monkeypatch)
    __main__.set_compilation_cache()
    assert os.environ[__main__.CACHE_VARIABLE] == ""
