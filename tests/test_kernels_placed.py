"""Flash attention on a mesh and in a network: which devices it is for, and how it is split."""

import contextlib
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_kernels_modes as modes
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dmf import defaults, stablehlo
from dmf.kernels import flash, placement
from dmf.models import attention, layers
from dmf.models.dit import DiT
from dmf.sharding import batch_sharding, by_device, local_mesh, make_mesh
from dmf.typing import InputError

KINDS = {"cpu": "cpu", "tpu": "TPU v5 lite", "gpu": "NVIDIA H100 80GB HBM3"}
MODEL = DiT(input_size=8, channels=3, depth=2, width=32, heads=4, num_classes=5,
            conditioning="decoupled", split_depth=1, attention="flash")  # fmt: skip


def target(platform: str, kind: str = "", tensor: int = 1):
    """A mesh of devices that are not here, in context."""
    device = AbstractDevice(kind or KINDS[platform], None, platform)
    mesh = AbstractMesh((1, 1, tensor), ("data", "fsdp", "tensor"),
                        axis_types=(AxisType.Auto,) * 3, abstract_device=device)  # fmt: skip
    return jax.sharding.use_abstract_mesh(mesh)


def heads(keys=256, width=72, dtype="bfloat16", count=16):
    return jnp.zeros((1, keys, count, width), dtype)


def chosen(x, name="auto"):
    return flash.choose(name, x, x)


@pytest.mark.parametrize("keys", [64, 256, 4096])
def test_auto_is_the_formula_on_cpu(keys):
    assert chosen(heads(keys)) == "xla"
    with jax.set_mesh(make_mesh()):
        assert chosen(heads(keys)) == "xla"


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_auto_is_flash_from_a_length_on(platform):
    with target(platform):
        assert [chosen(heads(keys)) for keys in (64, 128, 255, 256, 4096)] == [
            "xla", "xla", "xla", "flash", "flash",
        ]  # fmt: skip
        assert chosen(heads(64), "flash") == "flash"
        assert chosen(heads(4096), "xla") == "xla"


def test_auto_asks_what_the_library_and_the_mesh_take():
    with target("gpu"):
        assert chosen(heads(dtype="float32")) == chosen(heads(width=256)) == "xla"
    with target("gpu", "AMD Instinct MI300X"):
        assert chosen(heads()) == "xla"
    with target("tpu", tensor=3):
        assert chosen(heads(count=16)) == "xla"
        assert chosen(heads(count=12, dtype="float32")) == "flash"


def test_auto_is_the_formula_where_nothing_says_how_to_split_a_kernel(monkeypatch):
    """Several devices, and no mesh in context."""
    for module in (flash, placement):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    assert jax.device_count() == 8
    assert chosen(heads()) == "xla"
    assert chosen(heads(), "flash") == "flash"
    with target("tpu"):
        assert chosen(heads()) == "flash"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert chosen(heads()) == "flash"


def test_auto_is_the_formula_on_a_gpu_older_than_ampere(monkeypatch):
    turing = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA GeForce RTX 2080",
                                   compute_capability="7.5")  # fmt: skip
    monkeypatch.setattr(placement, "_default_device", lambda: turing)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert chosen(heads()) == "xla"
    turing.compute_capability = "8.6"
    assert chosen(heads()) == "flash"


def test_cudnn_takes_no_float32():
    x = jnp.ones((1, 256, 2, 72))
    with target("gpu"), pytest.raises(InputError, match=r"^model.attention=flash: cuDNN takes bf"):
        flash.flash_attention(x, x, x)


def test_a_program_is_traced_anew_for_other_devices():
    """`jax.jit` tells programs apart by the mesh in context."""
    seen = []
    function = jax.jit(lambda x: [x, seen.append(placement.platform())][0])
    for platform in ("tpu", "gpu", "tpu"):
        with target(platform):
            function.trace(jnp.ones(3))
    function(jnp.ones(3))
    assert seen == ["tpu", "gpu", "cpu"]


def on(mesh, form, batch=8):
    """A step of training on a mesh, with samples and heads split over it."""
    attend = flash.flash_attention
    weights, x, dx = modes.arrays()
    x, dx = (jnp.tile(a, (3, 1, 1))[:batch] for a in (x, dx))
    function = form(lambda w, x: modes.network(attend, "dots", w, x))
    if mesh is None:
        return jax.jit(function)(weights, x, dx)
    places = (
        NamedSharding(mesh, PartitionSpec(None, None, "tensor")),
        *[batch_sharding(mesh) if batch == 8 else NamedSharding(mesh, PartitionSpec())] * 2,
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, in_shardings=places).lower(weights, x, dx)
    return lowered.compile()(weights, x, dx)


@pytest.mark.parametrize("form", [modes.meanflow, modes.one_linearisation])
def test_a_mesh_changes_nothing(form):
    modes.assert_close(on(make_mesh(2, 2, 2), form), on(None, form))


def test_a_batch_that_the_mesh_does_not_divide_is_whole_everywhere():
    form = modes.one_linearisation
    modes.assert_close(on(make_mesh(4, 1, 2), form, batch=3), on(None, form, batch=3))


def test_each_device_has_its_own_samples_and_heads():
    shapes = []

    def seen(x):
        shapes.append(x.shape)
        return x

    x = jnp.ones((8, 5, 4, 6))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        jax.jit(placement.by_device(seen, 8, 4))(x)
        jax.jit(placement.by_device(seen, 6, 4))(x[:6])
    # Within a function that each device runs by itself, it is the function itself.
    x = jnp.ones((64, 5, 4, 6))
    by_device(lambda _, x: placement.by_device(seen, len(x), 4)(x), local_mesh())(0, x)
    assert shapes == [(2, 5, 2, 6), (6, 5, 2, 6), (8, 5, 4, 6)]


def test_heads_that_tensor_does_not_divide_are_named():
    with jax.set_mesh(make_mesh(2, 1, 4)):
        with pytest.raises(InputError, match=r"^mesh.tensor=4: .* model.heads=6") as error:
            placement.by_device(jnp.sin, 2, 6)
    assert "\n" not in str(error.value)


def test_a_platform_without_a_kernel_is_named(monkeypatch):
    monkeypatch.setattr(flash, "platform", lambda: "metal")
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(InputError, match="^model.attention=flash: there is no kernel for metal"):
        flash.flash_attention(x, x, x)


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
        found = both(MODEL)
    modes.assert_close(found, both(dataclasses.replace(MODEL, attention="xla")))


@pytest.fixture
def without_kernels(monkeypatch):
    def fail(*_):
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(attention, "flash_attention", fail)


def test_parameters_are_drawn_without_kernels(without_kernels):
    """A block is initialised on one token of one sample, which no kernel is made for."""
    block = layers.Block(4, 4.0, False, jnp.dtype("float32"), "flash")
    tokens, condition = jnp.zeros((1, 1, 32)), jnp.zeros((1, 32))
    params = block.init(jax.random.key(0), tokens, condition)
    with pytest.raises(AssertionError, match="a kernel was called"):
        block.apply(params, tokens, condition)


def test_a_network_calls_what_its_field_says(without_kernels):
    x, t, y = jnp.zeros((2, *MODEL.sample_shape)), jnp.ones(2), jnp.zeros(2, jnp.int32)
    for name in ("auto", "xla", "flash"):
        model = dataclasses.replace(MODEL, attention=name)
        params = jax.eval_shape(dataclasses.replace(MODEL, attention="xla").init, jax.random.key(0))
        fails = pytest.raises(AssertionError, match="a kernel was called")
        with fails if name == "flash" else contextlib.nullcontext():
            jax.eval_shape(model.apply, params, x, t, t, y)


def test_what_is_exported_for_all_platforms_has_no_kernel(without_kernels):
    function = stablehlo.image_function(MODEL, defaults.get_config(), None, steps=1)
    network = dataclasses.replace(MODEL, attention="xla")
    shapes = flatten_dict(jax.eval_shape(network.init, jax.random.key(0)), sep="/")
    weights = {f"network/{name}": shape for name, shape in shapes.items()}
    images = jax.eval_shape(function, weights, jnp.zeros(2, jnp.int32), jnp.int32(0))
    assert images.shape == (2, 8, 8, 3)
