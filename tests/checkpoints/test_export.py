"""Exports of every format: nothing of this machine is in them, and nothing is left out."""

import jax
import numpy as np
import pytest
import tiny
import tiny_exports
from safetensors import safe_open

from dmf.checkpoints import export, load
from dmf.checkpoints.model_card import model_card
from dmf.errors import InputError
from dmf.models.build import network

FIELDS = {"model.channels": 4, "model.depth": 1, "model.width": 8, "model.heads": 1,
          "model.conditioning": "meanflow", "sampling.shift": 1.5}  # fmt: skip
PATHS = {
    "init.checkpoint": "/home/me/init", "teacher.checkpoint": "/home/me/teacher",
    "alignment.encoder": "/home/me/dino", "data.directory": "/home/me/data",
    "latents.autoencoder": "/home/me/vae", "evaluation.reference": "/home/me/ref.npz",
    "evaluation.inception": "/home/me/inception", "evaluation.dinov2": "/home/me/dinov2",
}  # fmt: skip


def parts(fields=FIELDS) -> export.Parts:
    """A tiny network over latents, and their autoencoder."""
    config = tiny.config(fields)
    config.data.mixture = {"more": {"name": "digits", "directory": "/home/me/more"}}
    flow, vae = network(config.model), tiny_exports.AUTOENCODER
    decoder = export.Parts(vae, load.export_config(vae, {}), tiny_exports.params(vae), "drawn")
    return export.Parts(
        flow, load.config_to_json(config), tiny_exports.params(flow), "drawn", decoder
    )


@pytest.mark.parametrize("form", [
    pytest.param(form, marks=pytest.mark.slow if form == "stablehlo" else ())
    for form in export.FORMATS
])
def test_no_path_of_this_machine_is_published(tmp_path, form):
    export.write(tmp_path / "out", parts(FIELDS | PATHS), form=form, steps=1)
    here = str(tiny.ROOT).encode()
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and "flatbuffers" not in path.parts:
            assert b"/home/me" not in path.read_bytes(), path
            assert here not in path.read_bytes(), path
    with pytest.raises(AssertionError):  # The walk above finds what is there.
        for path in (tmp_path / "out").rglob("*"):
            assert path.is_dir() or b"drawn" not in path.read_bytes()


def test_the_origin_of_a_converted_file_is_its_name(tmp_path):
    export.write(tmp_path / "first", parts(), form="safetensors")
    assert tiny.dmf("convert", tmp_path / "first", f"--output={tmp_path}/second") == 0
    for name in ("config.json", "README.md"):
        text = (tmp_path / "second" / name).read_text()
        assert "converted from first (dmf)" in text and str(tmp_path) not in text


def test_an_export_that_another_command_is_writing_is_left_alone(tmp_path, monkeypatch):
    def meddling(folder, written, publication):
        (folder / "mine").touch()
        with pytest.raises(InputError, match="^output=.*out: another command is writing there"):
            export.write(tmp_path / "out", written)

    monkeypatch.setattr(export, "_write_orbax", meddling)
    export.write(tmp_path / "out", parts())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_card_may_hold_what_separates_columns():
    card = model_card({"encoder": {"name": "inception"}}, {}, origin="a|b", usage="")
    assert "| origin | a\\|b |" in card


def test_safetensors_take_the_autoencoder_along(tmp_path):
    """The converted export samples images by itself, wherever it is."""
    first = parts()
    export.write(tmp_path / "first", first, form="safetensors")
    with safe_open(tmp_path / "first/autoencoder/model.safetensors", framework="np") as file:
        assert "decoder.conv_in.weight" in file.keys()  # noqa: SIM118
    (tmp_path / "first").rename(tmp_path / "moved")
    assert tiny.dmf("convert", tmp_path / "moved", f"--output={tmp_path}/second") == 0
    config = load.read_config(tmp_path / "second")
    assert config.latents.autoencoder == str(tmp_path / "second/autoencoder")
    space, params = load.load_latent_space(config)
    assert space.autoencoder == first.autoencoder.network
    jax.tree.map(np.testing.assert_array_equal, params, first.autoencoder.params)
    assert config.sampling.shift == 1.5


def test_a_parameter_without_a_published_name_is_not_left_out(tmp_path):
    with pytest.raises(InputError, match=r"naming=dmf: it has no name for guidance_embedding/"):
        export.write(
            tmp_path / "out", parts(FIELDS | {"model.guidance_input": True}), form="safetensors"
        )
    assert not list(tmp_path.iterdir())
