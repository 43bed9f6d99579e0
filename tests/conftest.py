"""How tests run: on eight CPU devices, with no silent broadcasting, and with the annotated types of
`dmf`, and the shapes of its arrays, checked at every call."""

import collections
import gc
import os
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

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
# Threads of linear algebra wait for work by turning round, at the cost of the other test process.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Two processes of a test session may compile for TPUs at once.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# What one test compiled, the next one, its other processes and the next run find.
ROOT = pathlib.Path(__file__).resolve().parent.parent
# A test file may import the helpers of another room.
sys.path.extend(str(room) for room in sorted((ROOT / "tests").rglob("*")) if room.is_dir())
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Where the longest tests are.
LONGEST = ("tests/runtime/test_processes", "tests/experiments/test_sweep", "tests/training/")

import jax
import numpy as np
import pytest
import type_checks

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Programs live as long as a test session. Looking through them for garbage takes a twentieth of it.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_numpy_rank_promotion", "raise")
type_checks.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ["DMF_TESTS_SHARED"] = tempfile.mkdtemp(prefix="dmf-tests-shared-")
    config.pluginmanager.register(CpuSeconds(), "cpu-seconds")
    config.addinivalue_line("markers", "slow: runs only with --slow")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["DMF_TESTS_SHARED"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest tests come first, so that no process of the session ends long before the other.
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: give --slow to run it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


_FIRST_STATES: dict[int, Mapping[str, Any]] = {}


@pytest.fixture(autouse=True)
def random_numbers_begin_anew(request: pytest.FixtureRequest) -> None:
    """The generators of a test file give every test the numbers that they give the first one, so
    that none depends on which tests ran before it in this process."""
    for value in vars(request.module).values() if request.module else ():
        generator = getattr(value, "__self__", value)
        if isinstance(generator, np.random.Generator):
            bits = generator.bit_generator
            bits.state = _FIRST_STATES.setdefault(id(bits), bits.state)


@pytest.fixture
def sighup_not_ignored() -> Iterator[None]:
    """SIGHUP does what it does by default, also where nohup has the tests ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def small_network_registered() -> Iterator[None]:
    """Configs may name the network of `small_network`."""
    import small_network

    with small_network.registered():
        yield


class CpuSeconds:
    """What each room of the tests costs: CPU seconds of its tests and of the processes they start.

    Wall clocks say little on a busy machine. A worker of pytest-xdist measures and its reports
    carry the numbers to the process that prints them.
    """

    def __init__(self) -> None:
        self.last = 0.0
        self.starting = 0.0
        self.by_room: collections.Counter[str] = collections.Counter()

    def pytest_collection_finish(self) -> None:
        self.last = self.starting = _cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report = yield
        now = _cpu_seconds()
        report.cpu_seconds, self.last = now - self.last, now
        # Imports and collection, once a process.
        report.starting_seconds, self.starting = self.starting, 0.0
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path = report.nodeid.partition("::")[0]
        room, *rest = path.removeprefix("tests/").split("/")
        self.by_room[room if rest else "(top level)"] += getattr(report, "cpu_seconds", 0.0)
        self.by_room["(imports and collection)"] += getattr(report, "starting_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("CPU seconds by room")
        for room, seconds in self.by_room.most_common():
            terminalreporter.line(f"{seconds:8.1f}  {room}")
        terminalreporter.line(f"{sum(self.by_room.values()):8.1f}  all")


def _cpu_seconds() -> float:
    """User and system time of this process and of those it waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
