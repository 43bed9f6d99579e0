"""The memory that a program may take on a device."""

from unittest import mock

import jax
import pytest

from dmf.errors import InputError
from dmf.runtime.device_specs import DEVICE_SPECS, device_memory, program_memory

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def without_variables(monkeypatch):
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(variable, raising=False)


def test_jax_leaves_a_program_three_quarters_of_a_gpu():
    assert program_memory(H100) == 0.75 * DEVICE_SPECS[H100].memory
    assert program_memory("TPU v4") == DEVICE_SPECS["TPU v4"].memory
    assert program_memory("cpu") is None


def test_a_run_is_compared_with_what_a_program_may_take():
    gpu = mock.NonCallableMock(spec=jax.Device, platform="gpu", device_kind=H100)
    assert device_memory(gpu) == program_memory(H100)


@pytest.mark.parametrize("variable", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_variable_of_jax_changes_the_share(monkeypatch, variable):
    monkeypatch.setenv(variable, ".9")
    assert program_memory(H100) == 0.9 * DEVICE_SPECS[H100].memory
    assert program_memory("TPU v4") == DEVICE_SPECS["TPU v4"].memory


@pytest.mark.parametrize("value", ["most", "0", "-0.5", "nan", "inf"])
def test_a_share_that_cannot_be_is_refused(monkeypatch, value):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", value)
    with pytest.raises(InputError, match=f"^XLA_CLIENT_MEM_FRACTION={value}: give a share of the"):
        program_memory(H100)
