"""Names of published checkpoints: nothing is lost on the way, and nothing is guessed."""

import importlib
import pathlib

import golden_values as gv
import jax
import numpy as np
import pytest

from dmf.checkpoints.convert import namings, tables
from dmf.checkpoints.convert.name_tables import Constant
from dmf.checkpoints.convert.tables.dit import (
    from_jax,
    from_pytorch,
    jax_table,
    pytorch_table,
    to_jax,
    to_pytorch,
)
from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.dit import DiT

SHAPE = {
    "input_size": 8, "channels": 4, "depth": 3, "width": 24, "heads": 2, "num_classes": 5,
}  # fmt: skip
MODELS = {
    "flow": DiT(**SHAPE),
    "aligned": DiT(**SHAPE, alignment_depth=2, alignment_width=6, alignment_hidden=10),
    "meanflow": DiT(**SHAPE, conditioning="meanflow"),
    "decoupled": DiT(
        **SHAPE | {"patch_size": 4},
        conditioning="decoupled",
        split_depth=1,
        qk_norm=True,
        learned_variance=True,
    ),
}
DIRECTIONS = {
    "pytorch": (pytorch_table, from_pytorch, to_pytorch),
    "jax": (jax_table, from_jax, to_jax),
}
over_models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
over_directions = pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)


def theirs(model: DiT, table=pytorch_table) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).standard_normal
    return {
        name: entry.value if isinstance(entry, Constant) else draw(entry.shape).astype("f")
        for name, entry in table(model).items()
    }


@over_models
@over_directions
def test_there_and_back(model, direction):
    table, to_params, to_tensors = direction
    tensors = theirs(model, table)
    back = to_tensors(model, to_params(model, tensors))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@over_models
@over_directions
def test_back_and_there(model, direction):
    _, to_params, to_tensors = direction
    shapes = abstract_params(model)
    draw = np.random.default_rng(1).standard_normal
    params = jax.tree.map(lambda leaf: draw(leaf.shape).astype("f"), shapes)
    back = to_params(model, to_tensors(model, params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
    ("name", "model", "to_tensors"),
    [
        ("dmf_tiny", gv.decoupled, to_pytorch),
        ("dmf_tiny_qknorm", gv.decoupled, to_pytorch),
        ("sit_repa_tiny", gv.aligned, to_pytorch),
        ("meanflow_tiny", gv.meanflow, to_jax),
    ],
)
def test_published_names_are_complete(name, model, to_tensors):
    """Also the fixed position table, which is computed and not kept."""
    model = model(name)
    from_theirs = from_jax if to_tensors is to_jax else from_pytorch
    published = gv.load(name).below("params")
    ours = to_tensors(model, from_theirs(model, published))
    assert ours.keys() == published.keys()
    for tensor, values in published.items():
        np.testing.assert_allclose(ours[tensor], values, atol=1e-6, err_msg=tensor)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(prefix):
    model = MODELS["flow"]
    tensors = theirs(model)
    wrapped = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    jax.tree.map(
        np.testing.assert_array_equal, from_pytorch(model, wrapped), from_pytorch(model, tensors)
    )


def assert_refused(model: DiT, tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        from_pytorch(model, tensors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1.bias", "x_embedder.proj.weight"])
def test_missing_tensor_is_named(name):
    tensors = theirs(MODELS["flow"])
    del tensors[name]
    assert_refused(MODELS["flow"], tensors, f"^tensor '{name}' is missing .* \\(1 such\\)$")


@pytest.mark.parametrize("name", ["blocks.3.mlp.fc1.bias", "encoder.weight"])
def test_unknown_tensor_is_named(name):
    tensors = theirs(MODELS["flow"]) | {name: np.zeros(3, "f")}
    assert_refused(MODELS["flow"], tensors, f"^tensor '{name}' is not .* \\(1 such\\)$")


@pytest.mark.parametrize(
    ("name", "shape"), [("t_embedder.mlp.0.weight", (256, 24)), ("blocks.2.attn.qkv.bias", (24,))]
)
def test_tensor_of_another_shape_is_named(name, shape):
    """Also a transposed one, whose number of values would fit."""
    tensors = theirs(MODELS["flow"]) | {name: np.zeros(shape, "f")}
    expected = f"^tensor '{name}' has shape \\({shape[0]}, ?.*: this network has"
    assert_refused(MODELS["flow"], tensors, expected)


@pytest.mark.parametrize(
    ("checkpoint", "network", "name"),
    [
        ("decoupled", "flow", "blocks.0.attn.k_norm.scale"),
        ("flow", "aligned", "projectors.0.0.bias"),
        ("meanflow", "flow", "h_embedder.mlp.0.bias"),
    ],
)
def test_checkpoint_of_another_network_is_refused(checkpoint, network, name):
    assert_refused(MODELS[network], theirs(MODELS[checkpoint]), f"^tensor '{name}' is ")


def test_number_of_classes_is_checked():
    tensors = theirs(MODELS["flow"])
    tensors["y_embedder.embedding_table.weight"] = np.zeros((1001, 24), "f")
    assert_refused(MODELS["flow"], tensors, r"has shape \(1001, 24\): this network has \(6, 24\)$")


def test_every_file_of_tables_is_read():
    """A network with a file of names needs no line elsewhere."""
    folder = pathlib.Path(tables.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    read = {naming.infer_network for naming in namings.NAMINGS}
    assert len(files) >= 4
    for name in files:
        module = importlib.import_module(f"{tables.__name__}.{name}")
        assert {naming.infer_network for naming in module.NAMINGS} <= read, name
    names = [naming.name for naming in namings.NAMINGS]
    assert len(set(names)) == len(names)
