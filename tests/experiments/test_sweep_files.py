"""Every sweep file says how to use it, and its runs can be built with the configs it names."""

import ast
import re
import shlex
import sys

import pytest
import tiny

from configs.sweeps.objectives import OBJECTIVES

FILES = sorted((tiny.ROOT / "configs/sweeps").glob("*.py"))
ALSO = {
    "guidance": ("digits_meanflow.py", "dmf_xl2_256.py", "meanflow.py:b4"),
    "weighting": ("dmf_distilled.py:b2",),
    "seeds": ("sit_xl2.py",),
    "meanflow_ablations": ("meanflow.py:b4",),
    "split_depth": (),
    "split_depth_l2": ("dmf_l2.py:guided",),
    "objectives": (),
}
COUNTS = {"guidance": 12, "weighting": 4, "seeds": 5, "meanflow_ablations": 11, "split_depth": 5,
          "split_depth_l2": 5, "objectives": 3 * len(OBJECTIVES)}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_builds_with_the_configs_it_is_for(path, capsys, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    said = ast.get_docstring(ast.parse(path.read_text()))
    command = re.search(r"dmf sweep (.*?)(\n\n|$)", said, re.DOTALL)[1].replace("\\\n", " ")
    arguments = [a for a in shlex.split(command) if a != "--launcher=print"]
    assert f"--sweep=configs/sweeps/{path.name}" in arguments
    for name in ("", *ALSO[path.stem]):
        given = [f"--config=configs/{name}" if name and a.startswith("--config=") else a
                 for a in arguments]  # fmt: skip
        assert tiny.dmf("sweep", *given, "--launcher=print") == 0, capsys.readouterr().err
        lines = capsys.readouterr().out.splitlines()
        assert len(set(lines)) == COUNTS[path.stem]


@pytest.mark.parametrize("place", ["mine/sweeps", "mine"])
def test_a_sweep_imports_from_its_own_folder_and_that_above(place, tmp_path, monkeypatch, capsys):
    """As `dmf:sweeps/objectives` does from the configs of an installed package."""
    (tmp_path / "mine/sweeps").mkdir(parents=True)
    (tmp_path / "mine/base.py").write_text("SEEDS = 3, 4\n")
    file = tmp_path / place / "seeds.py"
    file.write_text("from mine.base import SEEDS\n\n"
                    "def get_sweep():\n    return [{'seed': seed} for seed in SEEDS]\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    arguments = [f"--config={tiny.CONFIG}", f"--sweep={file}", f"--workdir={tmp_path}/out"]
    assert tiny.dmf("sweep", *arguments, "--launcher=print") == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert re.findall(r"--config.seed=(\d)", printed) == ["3", "4"]
