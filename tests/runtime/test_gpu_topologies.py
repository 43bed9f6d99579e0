"""GPUs that are not attached: their names, the descriptions of chips, and their nodes."""

import importlib.util
import re
import types
from unittest import mock

import jax
import pytest
import tiny

from dmf.errors import InputError
from dmf.runtime import gpu_topologies
from dmf.runtime.device_specs import DEVICE_SPECS
from dmf.runtime.sharding import count_slices

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the extra cuda is not installed"
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h100:8", ("h100", 1, 8)),
        ("h200:1", ("h200", 1, 1)),
        ("a100:4x8", ("a100", 4, 8)),
        ("a100-40gb:2x4", ("a100-40gb", 2, 4)),
    ],
)
def test_a_name_is_read(name, expected):
    assert gpu_topologies.parse(name) == expected


@pytest.mark.parametrize(
    "name",
    ["", "h100", "h100:", "h100:0", "h100:0x8", "h100:4x0", "h100:x8", "h100:4x8x2", "h100:-8",
     "h100:100", "h100:10000x8", "b200:8", "H100:8", "h100:8 ", "h100:8\n", ":8"],
)  # fmt: skip
def test_a_name_that_cannot_be_is_refused(name):
    with pytest.raises(InputError) as error:
        gpu_topologies.parse(name)
    assert (error.value.field, error.value.value) == ("topology", name)
    assert "as h100:8, or h100:4x8 for 4 nodes of 8" in error.value.remedy
    assert "a100, a100-40gb, h100, h200" in error.value.remedy


@pytest.mark.parametrize(
    ("chip", "figures"),
    [
        ("a100", ("NVIDIA A100-SXM4-80GB", 8, 108, 167936, 166912, 41943040, 2039000000000)),
        ("a100-40gb", ("NVIDIA A100-SXM4-40GB", 8, 108, 167936, 166912, 41943040, 1555000000000)),
        ("h100", ("NVIDIA H100 80GB HBM3", 9, 132, 233472, 232448, 52428800, 3352000000000)),
        ("h200", ("NVIDIA H200", 9, 132, 233472, 232448, 52428800, 4800000000000)),
    ],
)
def test_the_description_of_a_chip(chip, figures):
    text = gpu_topologies.description(chip)
    fields = dict(re.findall(r'(\w+): "?([^"}\n]+?)"?(?= feature| }|\n)', text))
    kind, capability, *numbers = figures
    assert fields["device_description_str"] == kind
    assert float(fields["device_memory_size"]) == pytest.approx(DEVICE_SPECS[kind].memory, abs=1)
    assert f"cuda_compute_capability {{ major: {capability} feature_extension: " in text
    names = ("core_count", "shared_memory_per_core", "shared_memory_per_block_optin",
             "l2_cache_size", "memory_bandwidth")  # fmt: skip
    assert [int(fields[name]) for name in names] == numbers


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
    def absent(*args, **kwargs):
        raise NotImplementedError("topology not implemented\nfor cuda")

    monkeypatch.setattr(gpu_topologies.topologies, "get_topology_desc", absent)
    with pytest.raises(InputError) as error:
        gpu_topologies.gpu_devices("h100:8")
    assert str(error.value) == (
        "topology=h100:8: this needs JAX for CUDA, but neither a GPU nor a driver: pip install "
        "'jax[cuda13]' (topology not implemented for cuda)"
    )


@pytest.mark.parametrize(("runtime", "nodes"), [("compile_only_runtime", 4), ("pjrt_ifrt", 2)])
def test_the_nodes_of_gpus(runtime, nodes):
    """Attached ones tell their node, in which each of them may have a process of its own."""
    client = types.SimpleNamespace(runtime_type=runtime)
    devices = [mock.NonCallableMock(spec=jax.Device, platform="gpu", client=client,
                                    process_index=i // 2, slice_index=i // 4) for i in range(8)]
    assert count_slices(devices) == nodes


TOPOLOGIES = """
from dmf.runtime import gpu_topologies
from dmf.runtime.sharding import count_slices

for chip in gpu_topologies.GPU_CHIPS:
    devices = gpu_topologies.gpu_devices(f"{chip}:3x4")
    print(devices[0].device_kind, devices[0].compute_capability, len(devices),
          count_slices(devices), sep="; ")
"""


@needs_cuda
@pytest.mark.slow
def test_the_plugin_takes_the_descriptions(monkeypatch):
    """Without a GPU, and although JAX may use one."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    ended = tiny.process(code=TOPOLOGIES)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "NVIDIA A100-SXM4-80GB; 8.0; 12; 3", "NVIDIA A100-SXM4-40GB; 8.0; 12; 3",
        "NVIDIA H100 80GB HBM3; 9.0; 12; 3", "NVIDIA H200; 9.0; 12; 3",
    ]  # fmt: skip
