"""Flash attention on a mesh and in a network: the target device, and the sharding of kernels."""

import contextlib
import dataclasses
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_forward_mode as forward_mode
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dmf import default_config
from dmf.errors import InputError
from dmf.models import layers
from dmf.models.abstract_params import abstract_params
from dmf.models.attention import attention, kernel_sharding
from dmf.models.attention.jvp_kernel import attention_jvp
from dmf.models.dit import DiT
from dmf.models.in_context_dit import InContextDiT
from dmf.objectives.build import interpolant
from dmf.runtime.sharding import batch_sharding, local_mesh, make_mesh, map_over_devices
from dmf.sampling import stablehlo
from dmf.sampling.build import sampling

KINDS = {"cpu": "cpu", "tpu": "TPU v5 lite", "gpu": "NVIDIA H100 80GB HBM3"}
MODEL = DiT(input_size=8, channels=3, depth=2, width=32, heads=4, num_classes=5,
            conditioning="decoupled", split_depth=1, attention="flash")  # fmt: skip
IN_CONTEXT = InContextDiT(input_size=8, channels=3, depth=2, head_depth=1, width=32, heads=4,
                          num_classes=5, attention="flash", positions="rotary_2d",
                          prediction="data")  # fmt: skip


def target(platform: str, kind: str = "", tensor: int = 1):
    """A context with a mesh of devices of a topology."""
    device = AbstractDevice(kind or KINDS[platform], None, platform)
    mesh = AbstractMesh((1, 1, tensor), ("data", "fsdp", "tensor"),
                        axis_types=(AxisType.Auto,) * 3, abstract_device=device)  # fmt: skip
    return jax.sharding.use_abstract_mesh(mesh)


def zeros(keys=256, width=72, dtype="bfloat16", count=16):
    return jnp.zeros((1, keys, count, width), dtype)


def chosen(x, name="auto"):
    return attention.choose_implementation(name, x, x)


@pytest.mark.parametrize("keys", [64, 256, 4096])
def test_auto_is_xla_on_cpu(keys):
    assert chosen(zeros(keys)) == "xla"
    with jax.set_mesh(make_mesh()):
        assert chosen(zeros(keys)) == "xla"


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_auto_is_flash_from_a_length_on(platform):
    with target(platform):
        assert [chosen(zeros(keys)) for keys in (64, 128, 255, 256, 276, 4096)] == [
            "xla", "xla", "xla", "flash", "flash", "flash",
        ]  # fmt: skip
        assert chosen(zeros(64), "flash") == "flash"
        assert chosen(zeros(4096), "xla") == "xla"


def test_auto_is_xla_where_the_library_or_the_mesh_cannot_take_the_arrays():
    with target("gpu"):
        assert chosen(zeros(dtype="float32")) == chosen(zeros(width=256)) == "xla"
    with target("gpu", "AMD Instinct MI300X"):
        assert chosen(zeros()) == "xla"
    with target("tpu", tensor=3):
        assert chosen(zeros(count=16)) == "xla"
        assert chosen(zeros(count=12, dtype="float32")) == "flash"


def test_auto_is_xla_with_several_devices_and_no_mesh(monkeypatch):
    for module in (attention, kernel_sharding):
        monkeypatch.setattr(module, "target_platform", lambda: "tpu")
    assert jax.device_count() == 8
    assert chosen(zeros()) == "xla"
    assert chosen(zeros(), "flash") == "flash"
    with target("tpu"):
        assert chosen(zeros()) == "flash"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert chosen(zeros()) == "flash"


def test_auto_is_xla_on_a_gpu_older_than_ampere(monkeypatch):
    turing = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA GeForce RTX 2080",
                                   compute_capability="7.5")  # fmt: skip
    monkeypatch.setattr(kernel_sharding, "_default_device", lambda: turing)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert chosen(zeros()) == "xla"
    turing.compute_capability = "8.6"
    assert chosen(zeros()) == "flash"


def test_a_jax_without_triton_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    with target("gpu"):
        assert chosen(zeros()) == "xla"
        with pytest.raises(InputError, match=r"^model.attention=flash: .* no Pallas for Triton"):
            jax.eval_shape(partial(attention_jvp, platform="gpu"), *[zeros()] * 6)


def test_the_capability_is_that_of_the_local_gpu_or_of_the_name_of_another(monkeypatch):
    assert kernel_sharding.compute_capability() == 8.0
    hoppers = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB")
    for kind in (*hoppers, "NVIDIA A100-SXM4-80GB", "AMD Instinct MI300X"):
        with target("gpu", kind):
            assert kernel_sharding.compute_capability() == (9.0 if kind in hoppers else 8.0)
    local = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA L4", compute_capability="8.9")
    monkeypatch.setattr(kernel_sharding, "_default_device", lambda: local)
    assert kernel_sharding.compute_capability() == 8.9
    with target("gpu", "NVIDIA L4"):
        assert kernel_sharding.compute_capability() == 8.9
    with target("gpu", "NVIDIA H200"):
        assert kernel_sharding.compute_capability() == 9.0


def test_cudnn_takes_no_float32():
    x = jnp.ones((1, 256, 2, 72))
    with target("gpu"), pytest.raises(InputError, match=r"^model.attention=flash: cuDNN takes bf"):
        attention.flash_attention(x, x, x)


def test_a_program_is_traced_anew_for_other_devices():
    """`jax.jit` tells programs apart by the mesh in context."""
    platforms = []
    function = jax.jit(lambda x: [x, platforms.append(kernel_sharding.target_platform())][0])
    for platform in ("tpu", "gpu", "tpu"):
        with target(platform):
            function.trace(jnp.ones(3))
    function(jnp.ones(3))
    assert platforms == ["tpu", "gpu", "cpu"]


def outputs_on(mesh, form, batch=8):
    """The outputs of a training step on a mesh that samples and heads are sharded over."""
    attend = attention.flash_attention
    weights, x, dx = forward_mode.arrays()
    x, dx = (jnp.tile(a, (3, 1, 1))[:batch] for a in (x, dx))
    function = form(lambda w, x: forward_mode.network(attend, "dots", w, x))
    if mesh is None:
        return jax.jit(function)(weights, x, dx)
    places = (
        NamedSharding(mesh, PartitionSpec(None, None, "tensor")),
        *[batch_sharding(mesh) if batch == 8 else NamedSharding(mesh, PartitionSpec())] * 2,
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, in_shardings=places).lower(weights, x, dx)
    return lowered.compile()(weights, x, dx)


@pytest.mark.parametrize("form", [
    pytest.param(forward_mode.meanflow, marks=pytest.mark.slow), forward_mode.one_linearisation,
])  # fmt: skip
def test_a_mesh_changes_nothing(form):
    forward_mode.assert_close(outputs_on(make_mesh(2, 2, 2), form), outputs_on(None, form))


def test_a_batch_that_the_mesh_does_not_divide_is_replicated():
    sharded, single = (outputs_on(mesh, forward_mode.one_linearisation, batch=3)
                       for mesh in (make_mesh(4, 1, 2), None))
    forward_mode.assert_close(sharded, single)


def test_each_device_has_its_own_samples_and_zeros():
    shapes = []

    def identity(x):
        shapes.append(x.shape)
        return x

    x = jnp.ones((8, 5, 4, 6))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        jax.jit(kernel_sharding.shard_kernel(identity, 8, 4))(x)
        jax.jit(kernel_sharding.shard_kernel(identity, 6, 4))(x[:6])
    # Within a `shard_map` the kernel is not sharded again.
    x = jnp.ones((64, 5, 4, 6))
    map_over_devices(
        lambda _, x: kernel_sharding.shard_kernel(identity, len(x), 4)(x), local_mesh()
    )(0, x)
    assert shapes == [(2, 5, 2, 6), (6, 5, 2, 6), (8, 5, 4, 6)]


def test_heads_that_tensor_does_not_divide_are_named():
    with jax.set_mesh(make_mesh(2, 1, 4)):
        with pytest.raises(InputError, match=r"^mesh.tensor=4: .* model.heads=6") as error:
            kernel_sharding.shard_kernel(jnp.sin, 2, 6)
    assert "\n" not in str(error.value)


def test_a_platform_without_a_kernel_is_named(monkeypatch):
    monkeypatch.setattr(attention, "target_platform", lambda: "metal")
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(InputError, match="^model.attention=flash: there is no kernel for metal"):
        attention.flash_attention(x, x, x)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_a_network_is_the_same_by_kernels(mesh):
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(random.normal(0, 0.1, p.shape), jnp.float32),
        jax.eval_shape(MODEL.init, jax.random.key(0)),
    )
    x, dx = jnp.asarray(random.normal(size=(2, 8, 8, 8, 3)), jnp.float32)
    t, r, y = jnp.linspace(0.3, 1, 8), jnp.linspace(0.3, 0, 8), jnp.arange(8) % 6

    def both(model):
        def apply(params, x, dx):
            return jax.jvp(lambda x: model.apply(params, x, t, r, y), (x,), (dx,))

        return jax.jit(apply)(params, x, dx)

    with jax.set_mesh(make_mesh(*mesh)) if mesh else contextlib.nullcontext():
        outputs = both(MODEL)
    forward_mode.assert_close(outputs, both(dataclasses.replace(MODEL, attention="xla")))


@pytest.fixture
def without_kernels(monkeypatch):
    def fail(*_):
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(attention, "flash_attention", fail)


@pytest.mark.slow
def test_parameters_are_drawn_without_kernels(without_kernels):
    """A block is initialised on one token of one sample, which no kernel takes."""
    block = layers.Block(4, 4.0, False, jnp.dtype("float32"), "flash")
    tokens, condition = jnp.zeros((1, 1, 32)), jnp.zeros((1, 32))
    params = block.init(jax.random.key(0), tokens, condition)
    with pytest.raises(AssertionError, match="a kernel was called"):
        block.apply(params, tokens, condition)


def test_a_network_calls_the_implementation_of_its_field(without_kernels):
    x, t, y = jnp.zeros((2, *MODEL.sample_shape)), jnp.ones(2), jnp.zeros(2, jnp.int32)
    for name in ("auto", "xla", "flash"):
        model = dataclasses.replace(MODEL, attention=name)
        params = jax.eval_shape(dataclasses.replace(MODEL, attention="xla").init, jax.random.key(0))
        fails = pytest.raises(AssertionError, match="a kernel was called")
        with fails if name == "flash" else contextlib.nullcontext():
            jax.eval_shape(model.apply, params, x, t, t, y)


@pytest.mark.parametrize("model", [
    MODEL, pytest.param(IN_CONTEXT, marks=pytest.mark.slow)
], ids=["dit", "in_context_dit"])  # fmt: skip
def test_a_function_exported_for_all_platforms_has_no_kernel(without_kernels, model):
    """Nor does it depend on the number of images."""
    config = default_config.get_config()
    settings = sampling(config.sampling, interpolant(config.objective))
    function = stablehlo.image_function(model, settings, None, steps=1)
    network = dataclasses.replace(model, attention="xla")
    shapes = flatten_dict(abstract_params(network), sep="/")
    weights = {f"network/{name}": shape for name, shape in shapes.items()}
    (count,) = jax.export.symbolic_shape("n")
    labels = jax.ShapeDtypeStruct((count,), jnp.int32)
    images = jax.eval_shape(function, weights, labels, jnp.int32(0))
    assert images.shape == (count, 8, 8, 3)
