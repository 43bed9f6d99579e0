"""Checkpoints that cannot be converted: one line that names the tensor or the file, and nothing is
written."""

import json
import os
import pathlib
import re

import golden_values as gv
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file
from test_convert import OF_DMF_TINY, PT, converted, refused

from dmf.checkpoints import load


def written(tmp_path, tensors) -> str:
    save_file(tensors, tmp_path / "bad.safetensors")
    return str(tmp_path / "bad.safetensors")


def spoiled(tmp_path, change) -> str:
    """A checkpoint of DMF with something wrong."""
    tensors = {name: np.array(w) for name, w in gv.load("dmf_tiny").below("params").items()}
    change(tensors)
    return written(tmp_path, tensors)


CHANGES = {
    "missing": (
        lambda w: w.pop("blocks.1.mlp.fc1.bias"),
        "tensor 'blocks.1.mlp.fc1.bias' is missing",
    ),
    "extra": (
        lambda w: w.update({"blocks.0.extra": np.zeros(3, "f")}),
        "tensor 'blocks.0.extra' is not a tensor of this network",
    ),
    "shape": (
        lambda w: w.update({"blocks.1.mlp.fc1.bias": np.zeros(3, "f")}),
        "tensor 'blocks.1.mlp.fc1.bias' has shape (3,): this network has",
    ),
    "dtype": (
        lambda w: w.update({"final_layer.linear.bias": np.zeros(16, np.int64)}),
        "tensor 'final_layer.linear.bias' has dtype int64",
    ),
    "position": (
        lambda w: w.update({"pos_embed": w["pos_embed"] + 0.1}),
        "tensor 'pos_embed' is fixed in this network, and differs",
    ),
    "twice": (
        lambda w: w.update({"module.final_layer.linear.bias": np.zeros(16, "f")}),
        "is there twice, with and without the prefix",
    ),
}


@pytest.mark.parametrize("problem", CHANGES)
def test_a_wrong_tensor_is_named(tmp_path, capsys, problem):
    change, message = CHANGES[problem]
    line = refused(capsys, tmp_path, spoiled(tmp_path, change), *OF_DMF_TINY)
    assert message in line
    assert "bad.safetensors" in line


def test_what_the_shapes_do_not_tell_must_be_given(tmp_path, capsys):
    assert "give --num-heads" in refused(capsys, tmp_path, PT)
    line = refused(capsys, tmp_path, PT, "--num-heads=4")
    assert "logvar_linear tells that this is a flow map; give --split-depth" in line
    assert "split_depth=99" in refused(capsys, tmp_path, PT, *OF_DMF_TINY[:1],
                                             "--split-depth=99")
    assert "groups: a diffusion transformer has no such field" in refused(
        capsys, tmp_path, PT, *OF_DMF_TINY, "--groups=8"
    )


def test_another_network_is_refused(tmp_path, capsys):
    line = refused(capsys, tmp_path, written(tmp_path, {"a.weight": np.zeros(3, "f")}))
    assert "its tensors ('a.weight') belong to no known network" in line
    known = line.partition("the known namings are ")[2]
    assert {"diffusers", "dmf", "sit", "meanflow"} <= set(re.findall(r"[\w-]+", known))
    line = refused(capsys, tmp_path, PT, "--naming=sit2")
    choices = line.partition("naming=sit2: choose one of ")[2]
    assert {"diffusers", "dmf", "sit", "meanflow"} <= set(re.findall(r"[\w-]+", choices))
    assert "naming=meanflow: the checkpoint has no tensor" in refused(
        capsys, tmp_path, PT, "--naming=meanflow"
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(tmp_path, dtype):
    theirs = {name: w.astype(dtype) for name, w in gv.load("dmf_tiny").below("params").items()}
    _, _, params = load.load_network(
        converted(tmp_path, written(tmp_path, theirs), *OF_DMF_TINY)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    kernel = theirs["final_layer.linear.weight"].astype(np.float32).T
    np.testing.assert_array_equal(params["final"]["linear"]["kernel"].reshape(kernel.shape), kernel)


STATED = ["3", "{", '{"model": 3}', '{"model": {"heads": 4}}', '{"model": {"colour": 4}}']


@pytest.mark.parametrize("stated", STATED)
def test_a_file_that_states_nonsense_of_itself(tmp_path, capsys, stated):
    path = tmp_path / "odd.safetensors"
    save_file(gv.load("dmf_tiny").below("params"), path, metadata={"dmf.config": stated})
    assert "odd.safetensors: " in refused(capsys, tmp_path, path, *OF_DMF_TINY)


def test_mutated_safetensors_give_clean_errors(tmp_path, capsys):
    good = pathlib.Path(spoiled(tmp_path, lambda tensors: None)).read_bytes()[:60_000]
    draw = np.random.default_rng(0)
    for i in range(60):
        data = bytearray(good)
        for place in draw.integers(0, 9000 if i % 2 else 16, 3):
            data[place] = draw.integers(0, 256)
        (tmp_path / "bad.safetensors").write_bytes(data)
        assert "bad.safetensors" in refused(capsys, tmp_path, tmp_path / "bad.safetensors")


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    assert "there is no such file" in refused(capsys, tmp_path, tmp_path / "nothing.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    line = refused(capsys, tmp_path, tmp_path / "text.safetensors")
    assert "no safetensors file, or not a whole one" in line
    whole = pathlib.Path(written(tmp_path, {"a": np.zeros(99, "f")}))
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-9])
    assert "cut.safetensors" in refused(capsys, tmp_path, tmp_path / "cut.safetensors")
    (tmp_path / "cut.pt").write_bytes(PT.read_bytes()[:-9])
    assert "cut.pt" in refused(capsys, tmp_path, tmp_path / "cut.pt")
    (tmp_path / "empty").mkdir()
    assert "it holds no checkpoint of Orbax" in refused(capsys, tmp_path, tmp_path / "empty")
    assert "it has no part 'swa' with" in refused(
        capsys, tmp_path, tmp_path / "bad.safetensors", "--key=swa"
    )


def test_the_output_is_not_written_over(tmp_path, capsys):
    output = tmp_path / "converted"
    output.mkdir()
    (output / "note").write_text("mine")
    assert tiny.dmf("convert", PT, f"--output={output}", *OF_DMF_TINY) == 2
    assert "it exists and is not empty; choose another" in capsys.readouterr().err
    assert os.listdir(output) == ["note"]


def test_what_a_killed_conversion_left_is_cleared_away(tmp_path):
    left = tmp_path / ".converted.0123.partial"
    left.mkdir()
    (left / "params").write_text("half")
    converted(tmp_path, PT, *OF_DMF_TINY)
    assert os.listdir(tmp_path) == ["converted"]


def test_the_card_says_where_it_comes_from(tmp_path):
    output = converted(tmp_path, PT, *OF_DMF_TINY)
    card = (output / "README.md").read_text()
    assert "converted from" in card
    assert "dmf_tiny.pt" in card
    assert "split depth 2" in card
    assert json.loads((output / "config.json").read_text())["origin"] in card


