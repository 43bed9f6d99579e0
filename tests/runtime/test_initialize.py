"""How a process finds the others, and what it raises when they or its devices fail."""

import socket

import jax
import pytest
from etils import epath

from dmf.errors import InputError, Lost, RunError
from dmf.runtime import files, processes

FROM_RUNTIME = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(("flags", "message"), [
    (("localhost:1", 2, -1), "--coordinator, --processes, --process: give all three"),
    (("", 2, 1), "give all three"),
    (("localhost:1", 2, 2), "--process=2: with --processes=2 it is between 0 and 1"),
    (("localhost", 2, 0), "--coordinator=localhost: give host:port"),
    (("localhost:²", 2, 0), "--coordinator=localhost:²: give host:port"),
])  # fmt: skip
def test_invalid_flags_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        processes.initialize(*flags)


def test_a_port_in_use_is_refused():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be used .*choose another"):
            processes.initialize(f"localhost:{port}", 2, 0)
    with pytest.raises(InputError, match="port 70000 cannot be used"):
        processes.initialize("localhost:70000", 2, 0)


@pytest.mark.parametrize(("count", "raised", "kind", "message"), [
    (2, FROM_RUNTIME("UNKNOWN: Gloo AllGather failed"), Lost, "another process .* was lost"),
    (2, ValueError("UNKNOWN: Gloo AllGather failed"), Lost, "another process .* was lost"),
    (1, ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), RunError,
     "out of device memory"),
    (1, OSError(116, "Stale file handle", "/data/rows"), RunError, "^/data/rows: Stale file"),
    (1, FROM_RUNTIME("RESOURCE_EXHAUSTED: out of memory"), RunError, "^out of device .*gradient_"),
    (2, FROM_RUNTIME("RESOURCE_EXHAUSTED: out of memory"), RunError, "^out of device .*gradient_"),
    (1, FROM_RUNTIME("INTERNAL: Gloo"), FROM_RUNTIME, "^INTERNAL: Gloo$"),
    (2, FROM_RUNTIME("INTERNAL: a bug"), FROM_RUNTIME, "^INTERNAL: a bug$"),
    (2, ValueError("shapes of a task differ"), ValueError, "^shapes of a task differ$"),
])  # fmt: skip
def test_errors_of_the_runtime_become_one_line(
    count, raised, kind, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(processes, "is_single_process", lambda: count == 1)
    with pytest.raises(kind, match=message) as caught:
        with processes.runtime_errors(), files.disk_errors(epath.Path(tmp_path)):
            raise raised
    assert type(caught.value) is kind


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_that_cannot_connect_are_refused(name, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **flags: None)
    monkeypatch.setenv(name, "4")
    with pytest.raises(InputError, match=f"^{name}=4: .* --coordinator, --processes and"):
        processes.initialize()
    monkeypatch.setenv(name, "1")
    processes.initialize()


def test_without_flags_a_process_is_alone():
    processes.initialize()
    assert processes.is_single_process()
    assert processes.is_first_process()
    assert processes.all_gather({"a": 1}) == [{"a": 1}]


def test_a_program_that_has_used_jax_cannot_connect():
    jax.devices()
    with pytest.raises(RunError, match="could not connect to the others at localhost:1"):
        processes.initialize("localhost:1", 2, 1)
