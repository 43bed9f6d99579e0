"""Golden values: inputs and outputs of the published implementations, as our arrays.

`load(name)` reads one file; `decoupled`, `meanflow` and `aligned` are the networks of its weights.
"""

import dataclasses
import functools
import json
import math
import pathlib
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.checkpoints.convert.tables.dit import from_jax, from_pytorch
from dmf.models.dit import DiT
from dmf.runtime.sharding import batch_sharding, make_mesh, parameter_shardings
from dmf.types import Params

FOLDER = pathlib.Path(__file__).parent / "golden"
# How a network runs, and on which mesh (data, fsdp, tensor; None: one device): none of it may
# change a number. Every pair of scan and remat is here, and every mesh with both values of scan.
EXECUTIONS = {
    "scan-none-1": (True, "none", None),
    "scan-dots-2x2x2": (True, "dots", (2, 2, 2)),
    "scan-full-2x1x4": (True, "full", (2, 1, 4)),
    "unrolled-none-2x1x4": (False, "none", (2, 1, 4)),
    "unrolled-dots-1": (False, "dots", None),
    "unrolled-full-2x2x2": (False, "full", (2, 2, 2)),
}
PLAIN = EXECUTIONS["scan-none-1"]
# The plain execution, and the one with scan and sharding over eight devices; all others are slow.
over_executions = pytest.mark.parametrize("execution", [
    pytest.param(name, marks=[] if name in ("scan-none-1", "scan-dots-2x2x2") else pytest.mark.slow)
    for name in EXECUTIONS
])
# These tests compile much and compute little.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@dataclasses.dataclass(frozen=True)
class Golden:
    """One file: its arrays by name, and the configuration they were made with."""

    arrays: dict[str, np.ndarray]
    config: dict

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def below(self, folder: str) -> dict[str, np.ndarray]:
        """The arrays whose names begin with `folder/`, by the rest of their names."""
        start = f"{folder}/"
        return {k.removeprefix(start): v for k, v in self.arrays.items() if k.startswith(start)}

    def images(self, name: str) -> jax.Array:
        """An NCHW array as float32 NHWC."""
        return jnp.asarray(np.moveaxis(self[name], 1, -1), jnp.float32)

    def vector(self, name: str) -> jax.Array:
        """[b, 1, 1, 1] or [b] as float32 [b]."""
        return jnp.asarray(self[name].reshape(-1), jnp.float32)

    def labels(self, name: str) -> jax.Array:
        return jnp.asarray(self[name], jnp.int32)


@functools.cache
def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return Golden(arrays, json.loads((FOLDER / f"{name}.json").read_text()))


def dit(golden: Golden, **changes) -> DiT:
    """The network of a golden file, with the fields that its file leaves open."""
    published = golden.config["model"]
    return DiT(
        input_size=published["input_size"],
        channels=published["in_channels"],
        patch_size=published["patch_size"],
        depth=published["depth"],
        width=published["hidden_size"],
        heads=published["num_heads"],
        mlp_ratio=published["mlp_ratio"],
        num_classes=published["num_classes"],
        qk_norm=golden.config.get("qk_norm", False),
        **changes,
    )


@functools.cache
def decoupled(name: str, scan: bool = True, remat: str = "none") -> DiT:
    """The network of a `dmf_*` file."""
    golden = load(name)
    return dit(
        golden,
        conditioning="decoupled",
        split_depth=golden.config["dmf_depth"],
        learned_variance=True,
        scan=scan,
        remat=remat,
    )


@functools.cache
def meanflow(name: str, scan: bool = True, remat: str = "none") -> DiT:
    """The network of a `meanflow_*` file."""
    return dit(load(name), conditioning="meanflow", scan=scan, remat=remat)


@functools.cache
def aligned(name: str, scan: bool = True, remat: str = "none") -> DiT:
    """The network of a `sit_repa_*` file."""
    golden = load(name)
    return dit(
        golden,
        conditioning="flow",
        alignment_depth=golden.config["repa_depth"],
        alignment_width=golden.config["z_dims"][0],
        alignment_hidden=golden.config["projector_dim"],
        scan=scan,
        remat=remat,
    )


@functools.cache
def aligned_params(name: str) -> Params:
    return on_device(from_pytorch(aligned(name), load(name).below("params")))


@functools.cache
def decoupled_params(name: str) -> Params:
    return on_device(from_pytorch(decoupled(name), load(name).below("params")))


@functools.cache
def meanflow_params(name: str) -> Params:
    return on_device(from_jax(meanflow(name), load(name).below("params")))


def drawn_weights(
    name: str, shape: Sequence[int], *, seed: int = 0, gain: float = 1.0
) -> np.ndarray:
    """The weights that the golden values of a frozen network were made with."""
    w = np.random.default_rng([zlib.crc32(name.encode()), seed]).standard_normal(shape)
    w = w.astype(np.float32)
    if name.endswith("running_var"):
        return 0.5 + np.abs(w)
    if len(shape) > 1:
        return gain * w / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * w if name.endswith(("weight", "lambda1", "gamma")) else 0.1 * w


@functools.cache
def autoencoder_tensors() -> dict[str, np.ndarray]:
    golden = load("vae_0").config
    return {name: drawn_weights(name, shape, seed=golden["seed"])
            for name, shape in golden["names"].items()}


@functools.cache
def dinov2_tensors() -> dict[str, np.ndarray]:
    names = load("dinov2_0").config["names"]
    return {name: drawn_weights(name, shape) for name, shape in names.items()}


@functools.cache
def inception_tensors() -> dict[str, np.ndarray]:
    """Without the counters of training steps."""
    names = json.loads((FOLDER / "inception_fid_names.json").read_text())
    return {name: drawn_weights(name, shape, gain=2) for name, shape in names.items()
            if not name.endswith("tracked")}


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def spread(mesh_sizes: tuple[int, int, int] | None, params: Params, per_sample: tuple):
    """Parameters and per-sample arrays as a training run lays them out on a mesh (None: whole)."""
    if mesh_sizes is None:
        return params, per_sample
    mesh = make_mesh(*mesh_sizes)
    params = jax.device_put(params, parameter_shardings(mesh, params))
    return params, jax.device_put(per_sample, batch_sharding(mesh))


def assert_near(ours, theirs, tolerance: float) -> None:
    """|ours - theirs| <= tolerance |theirs|, by the Euclidean norm."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    distance = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert distance <= tolerance, f"off by {distance:.2e} of the norm"


def assert_each_near(ours, theirs, tolerance: float) -> None:
    """As `assert_near`, for each entry of the leading axis."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one, other, tolerance)


def norm(tensors: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(w, dtype=np.float64)) for w in tensors.values())))
