"""How tests run: on eight CPU devices, with no silent broadcasting, and with the annotated shapes
and types of `dmf` checked at every call."""

import gc
import os
import pathlib
import shutil
import sys
import tempfile
from importlib.metadata import version

# Tests compile much and compute little. The last of two equal flags counts, so that flags that
# are already set win. One that halves the time of compilation is known to old versions alone.
OLD = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
FLAGS = (
    *(("--xla_cpu_use_fusion_emitters=false",) if OLD else ()),
    "--xla_force_host_platform_device_count=8",
    # A machine that stands still for a while is no deadlock.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # Each core has a test process of its own.
    "--xla_cpu_parallel_codegen_split_count=1",
    os.environ.get("XLA_FLAGS", ""),
)
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Two processes of a test session may compile for TPUs at once.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# What one test compiled, the next one, its other processes and the next run find.
ROOT = pathlib.Path(__file__).resolve().parent.parent
# A test file may import the helpers of another room.
sys.path.extend(str(room) for room in sorted((ROOT / "tests").rglob("*")) if room.is_dir())
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import jaxtyping
import pytest

# Programs live as long as a test session. Looking through them for garbage takes a twentieth of it.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("dmf", "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ["DMF_TESTS_SHARED"] = tempfile.mkdtemp(prefix="dmf-tests-shared-")
    config.addinivalue_line("markers", "slow: takes a minute or more; runs only with --slow")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["DMF_TESTS_SHARED"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: give --slow to run it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
