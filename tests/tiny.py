"""A run small enough for a test: its config, and the command line around it."""

import atexit
import contextlib
import fcntl
import functools
import importlib
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import default
from dmf.objectives import DecoupledMeanFlow

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = pathlib.Path(__file__)
SCRATCH = pathlib.Path(tempfile.mkdtemp(prefix="dmf-tests-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
# Runs that all processes of a test session share; conftest.py makes and removes the folder.
SHARED = pathlib.Path(os.environ.get("DMF_TESTS_SHARED", SCRATCH))


def get_config() -> ConfigDict:
    """Eight steps of two blocks of width 32, of which some kernels are large enough to split."""
    config = default.get_config()
    config.model.depth = 2
    config.model.width = 32
    config.model.heads = 2
    config.data.batch_size = 16
    config.optimizer.learning_rate = 1e-3
    config.emas.main.decay = 0.5
    config.run.steps = 8
    config.run.log_every = 2
    config.run.sample_every = 0
    config.run.checkpoint_every = 4
    config.sampling.steps = (1, 2)
    config.evaluation.count = 72
    config.evaluation.chunk_size = 3  # A part is one chunk of each of eight devices.
    config.evaluation.part_size = 24
    return config


def config(overrides: dict[str, Any] | None = None, **components: ConfigDict) -> ConfigDict:
    """The config with fields replaced by dotted name, and whole components by name."""
    made = get_config()
    for name, component in components.items():
        made[name] = component
    made.update_from_flattened_dict(overrides or {})
    return made


def flow_map(overrides: dict[str, Any] | None = None) -> ConfigDict:
    """The config of a Decoupled MeanFlow run, split in the middle."""
    fields = {
        "model.conditioning": "decoupled",
        "model.split_depth": 1,
        "model.learned_variance": True,
    }
    return config(fields | (overrides or {}), objective=default.component(DecoupledMeanFlow()))


def free_port() -> int:
    """A port that no process is given by itself before somebody takes it."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port


def dmf(verb: str, *arguments: Any) -> int:
    """Runs a verb of the command line in this process; returns its exit code."""
    from dmf.cli.exit_codes import run

    main = importlib.import_module(f"dmf.cli.{verb}").main
    return run(main, verb, [str(argument) for argument in arguments])


def command(*arguments: Any, code: str | None = None) -> list[str]:
    """The command line of another process: `dmf ARGUMENTS`, or Python code."""
    start = ["-m", "dmf"] if code is None else ["-c", code]
    return [sys.executable, *start, *map(str, arguments)]


def environment() -> dict[str, str]:
    """The environment of another process, which finds this checkout."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def process(*arguments: Any, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs another process to its end."""
    return subprocess.run(
        command(*arguments, code=code),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def script(file: str, *arguments: Any, timeout: float) -> str:
    """The output of a file of the tests that runs by itself: without the checks of types that
    tests have, as users run the package."""
    rooms = [ROOT, ROOT / "tests", *filter(pathlib.Path.is_dir, (ROOT / "tests").iterdir())]
    done = subprocess.run(
        [sys.executable, file, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, rooms))},
        cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@functools.cache
def shared_run(name: str, make: Callable[[], ConfigDict]) -> pathlib.Path:
    """The workdir of a finished run, trained by the first process that asks for it."""
    from dmf.training.loop import train

    workdir = SHARED / name
    with open(SHARED / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not workdir.exists():
            partial = SHARED / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            train(make(), partial)
            partial.rename(workdir)
    return workdir


def flow_run() -> pathlib.Path:
    """A run of a flow model; copy it to change it."""
    return shared_run("flow", _flow_config)


def _flow_config() -> ConfigDict:
    return config({"run.sample_every": 4})
