"""Kernels compiled for TPU topologies, and lowered for NVIDIA GPUs."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import test_forward_mode as forward_mode
import tiny
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dmf.models.attention import flash_backends
from dmf.models.attention.forward_mode import with_forward_mode
from dmf.models.attention.jvp_kernel import attention_jvp

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs libtpu (pip install libtpu)",
)

# Gradient of a tangent, of bfloat16 heads 72 wide, on a mesh that splits samples and heads.
COMPILE = """
import json, re, sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from dmf.models.attention.attention import attention
from dmf.runtime.sharding import make_mesh

devices = topologies.get_topology_desc(sys.argv[1], platform="tpu").devices
mesh = make_mesh(-1, 1, int(sys.argv[2]), devices=devices)
place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))

def loss(x, dx):
    o, do = jax.jvp(lambda *x: attention(*x, "auto"), x, dx)
    return jnp.sum((o - jax.lax.stop_gradient(do)).astype(jnp.float32) ** 2)

for length in map(int, sys.argv[3:]):
    shape = (2 * len(devices), length, 16, 72)
    x = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)] * 3
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(x, x).compile()
    kernels = len(re.findall(r'custom_call_target="tpu_custom_call"', compiled.as_text()))
    memory = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps([length, kernels, memory / (shape[0] * 16 * 72 * 2 * length / len(devices))]))
"""
SHORT, IN_CONTEXT, LONG = ("256",), ("276",), ("1024", "4096")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "tensor", "lengths"),
    [
        ("v5e:4x4", 4, SHORT),
        ("v5e:4x4", 4, IN_CONTEXT + LONG),
        ("v5p:2x2x1", 2, SHORT + IN_CONTEXT + LONG),
        ("v6e:4x4", 4, SHORT + IN_CONTEXT + LONG),
    ],
)
def test_compiles_for_tpu(topology, tensor, lengths):
    """Forward, tangent and backward pass are one kernel each (beyond 512 keys the backward pass is
    two), and no memory grows with the square of the length."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(tiny.ROOT),
        # The process only compiles, so it may load libtpu while another process uses the TPU.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, topology, str(tensor), *lengths],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert [length for length, *_ in rows] == [int(length) for length in lengths]
    for length, kernels, arrays in rows:
        assert kernels == (3 if length <= 512 else 4)
        assert arrays < 32


def lowered_for_cuda(function, *shapes) -> str:
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3,
                        abstract_device=device)  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


TRITON = "__gpu$xla.gpu.triton"
ON_GPU = functools.partial(attention_jvp, platform="gpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("length", "width"), [(256, 72), (100, 64), (4096, 128)])
def test_the_kernel_is_lowered_by_triton(length, width, dtype):
    shapes = [jax.ShapeDtypeStruct((2, length, 4, width), dtype)] * 6
    assert lowered_for_cuda(ON_GPU, *shapes).count(TRITON) == 1


@pytest.mark.parametrize("form", [forward_mode.meanflow, forward_mode.one_linearisation])
def test_a_step_of_training_is_lowered_for_gpus(form):
    """With a stand-in for cuDNN, as JAX asks cuDNN for its version before it lowers attention."""
    attend = with_forward_mode(flash_backends.cpu_attention, ON_GPU)
    function = form(functools.partial(forward_mode.network, attend, "dots"))
    assert lowered_for_cuda(function, *forward_mode.arrays()).count(TRITON) == 1
    assert jnp.isfinite(forward_mode.expected(form)[0]).all()
