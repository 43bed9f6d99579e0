"""The wheel and the sdist hold what users need, and the files beside the package agree with it."""

import re
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
import tiny

import dmf

SHIPPED = sorted(path.relative_to(tiny.ROOT).as_posix()
                 for folder in ("dmf", "configs") for path in (tiny.ROOT / folder).rglob("*")
                 if path.is_file() and "__pycache__" not in path.parts)  # fmt: skip


def test_nothing_is_installed_from_an_index_that_does_not_have_it():
    """The package is on no index, where anybody could publish another one by its name."""
    texts = [*(tiny.ROOT / "dmf").rglob("*.py"), *(tiny.ROOT / "docs").glob("*.md"),
             *tiny.ROOT.glob("*.md"), *(tiny.ROOT / "launch").iterdir()]
    from_index = re.compile(r"install ['\"]?dmf|pypi\.org/project/dmf")
    assert not [path.name for path in texts if from_index.search(path.read_text())]


def test_the_citation_names_the_version():
    assert f"\nversion: {dmf.__version__}\n" in (tiny.ROOT / "CITATION.cff").read_text()


def test_every_requirement_has_a_tested_version():
    """Those of the two commands; markers choose between the versions of Python."""
    pinned = set(re.findall(r"(?m)^([a-z0-9-]+)==", (tiny.ROOT / "constraints.txt").read_text()))
    setup = (tiny.ROOT / "setup.py").read_text()
    # Of extras that no command installs.
    optional = {"gcsfs", "torch", "tensorflow", "pre-commit", "wandb", "trackio", "pyarrow"}
    names = {name.lower() for name in re.findall(r'"([A-Za-z0-9-]+)(?:\[[a-z0-9]+\])?>=', setup)}
    assert names - optional <= pinned


@pytest.mark.slow
def test_the_wheel_and_the_sdist_hold_package_and_configs(tmp_path):
    """They are built by the backend that pyproject.toml names, as `pip wheel` does."""
    requires = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-I", "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if subprocess.run([*pip, "install", *requires], capture_output=True, check=False).returncode:
        pytest.skip("the index with setuptools cannot be reached")
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                           cwd=tiny.ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    for name in filter(None, files.stdout.split("\0")):
        target = source / name
        if (tiny.ROOT / name).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((tiny.ROOT / name).read_bytes())
    code = ("import setuptools.build_meta as backend; "
            "print(backend.build_sdist('..')); print(backend.build_wheel('..'))")
    built = subprocess.run([python, "-c", code], cwd=source, capture_output=True, text=True,
                           check=False)
    assert built.returncode == 0, built.stderr
    wheel = next(tmp_path.glob("dmf_jax-*.whl"))
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {name if name.startswith("dmf/") else f"dmf/{name}" for name in SHIPPED}
    assert next(tmp_path.glob("dmf_jax-*.tar.gz")).stat().st_size < 20e6
    # Installed elsewhere, it finds its configs. Dependencies are those of this interpreter.
    subprocess.run([*pip, "install", "--no-deps", wheel], check=True)
    shown = ("import sys; sys.path += SITES; import dmf; from dmf.__main__ import main; "
             "sys.argv = ['dmf', 'config', '--config=dmf:untrained']; print(dmf.__file__); main()")
    shown = shown.replace("SITES", repr([path for path in sys.path if "site-packages" in path]))
    done = subprocess.run([python, "-I", "-c", shown], cwd=tmp_path, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "venv"))
    assert "model.conditioning = " in done.stdout
