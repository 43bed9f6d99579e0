"""How a benchmark starts, and the machine that it measures."""

import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from absl import app

from dmf.errors import InputError, RunError


def start(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags and runs `main`; what `dmf` refuses is one line and exit code 1."""
    def told(arguments: Sequence[str]) -> None:
        try:
            main(arguments)
        except (InputError, RunError) as error:
            sys.exit(f"{Path(sys.argv[0]).stem}: {error}")

    app.run(told)


def machine() -> str:
    """Processor, cores, devices and versions, in one line."""
    import jax

    cores = len(os.sched_getaffinity(0))
    device = jax.devices()[0]
    kind = _processor() if device.platform == "cpu" else device.device_kind
    return (f"{kind}, {cores} cores, {jax.device_count()} {device.platform} device(s), "
            f"Python {platform.python_version()}, jax {jax.__version__}, flax {version('flax')}")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
