"""The machine that a measurement was made on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


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
