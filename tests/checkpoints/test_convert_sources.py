"""Where a checkpoint lies: directories of diffusers, shards with an index, pointers of Git LFS; and
what the `config.json` beside it says."""

import json
import os
import pathlib

import diffusers_autoencoders
import golden_values as gv
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file
from test_convert import OF_DMF_TINY, PT, converted, refused

from configs import default
from dmf.checkpoints import load
from dmf.checkpoints.convert import namings
from dmf.checkpoints.convert.open_checkpoint import open_checkpoint
from dmf.errors import InputError
from dmf.models import AutoencoderKL
from dmf.models.build import network
from dmf.models.encoders.latent_scaling import LatentScaling

STATED = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.21.1", "act_fn": "silu",
    "block_out_channels": [32, 32, 64], "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3, "in_channels": 3, "out_channels": 3,
    "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 256,
    "scaling_factor": 0.13025,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return gv.autoencoder_tensors()


def diffusers(folder: pathlib.Path, weights, **changes) -> pathlib.Path:
    """A directory of an autoencoder as diffusers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({**STATED, **changes}))
    return folder


def read(source, fields=()) -> namings.Converted:
    opened = open_checkpoint(str(source))
    return namings.from_named_tensors(opened.tensors, dict(fields), neighbour=opened.neighbour)


def test_the_config_beside_an_autoencoder_is_read(tmp_path, weights):
    folder = diffusers(tmp_path / "vae", weights)
    for source in (folder, folder / "diffusion_pytorch_model.safetensors"):
        found = read(source)
        assert found.network.groups == 8 and found.scaling.scale == 0.13025
    os.unlink(folder / "config.json")
    assert read(folder).network.groups == 32 and read(folder).scaling is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"norm_num_groups": 7}, "groups=7: it must divide"),
    ({"norm_num_groups": "8"}, "norm_num_groups=8: give whole numbers"),
    ({"norm_num_groups": 10**18}, "groups=1000000000000000000: it must divide"),
    ({"layers_per_block": 10**18}, "layers_per_block=1000000000000000000: its tensors say 1"),
    ({"block_out_channels": [32, 64, 64]}, r"widths=\(32, 64, 64\): its tensors say"),
    ({"out_channels": 4}, "out_channels=4: another field says 3"),
    ({"act_fn": "gelu"}, "act_fn=gelu: only silu is known"),
    ({"down_block_types": 3}, "down_block_types=3: only DownEncoderBlock2D and Attn"),
    ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "only UpDecoderBlock2D and AttnUpDec"),
    ({"scaling_factor": True}, "it is no scaling of latents"),
    ({"mid_block_add_attention": False}, "mid_block_add_attention=False: only True is known"),
    ({"use_quant_conv": False}, "^quant_conv=False: its tensors say True"),
    ({"use_post_quant_conv": False}, "^post_quant_conv=False: its tensors say True"),
    ({"use_post_quant_conv": 1}, "use_post_quant_conv=1: give true or false"),
    ({"latent_channels": 16}, "^latent_channels=16: its tensors say 4"),
    ({"scaling_factor": 0}, "it is no scaling of latents"),
    ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "a std for each of latent_channels=4"),
    ({"gain": 2}, "gain=2: the field is not known, and may change the network"),
    ({"_class_name": "VQModel"}, "_class_name=VQModel: only AutoencoderKL is known"),
    ({"scaling_factor": "much"}, "it is no scaling of latents"),
    ({"scaling_factor": float("inf")}, "it is no scaling of latents"),
    ({"shift_factor": float("inf")}, "it is no scaling of latents"),
    ({"latents_mean": [0.0], "latents_std": None}, "it is no scaling of latents"),
])  # fmt: skip
def test_a_config_that_fits_no_autoencoder_of_ours(tmp_path, weights, changes, message):
    with pytest.raises(InputError, match=message):
        read(diffusers(tmp_path / "vae", weights, **changes))


def test_a_flag_that_contradicts_the_config(tmp_path, weights):
    folder = diffusers(tmp_path / "vae", weights)
    assert read(folder, {"groups": 8}).network.groups == 8
    with pytest.raises(InputError, match="groups=16: config.json says 8"):
        read(folder, {"groups": 16})


def test_the_scaling_of_the_autoencoder_is_that_of_the_flow_map(tmp_path, weights):
    pipeline = diffusers(tmp_path / "pipeline/vae", weights, shift_factor=0.5).parent
    output = converted(tmp_path, PT, *OF_DMF_TINY, f"--autoencoder={pipeline}")
    config = load.read_config(output)
    assert (config.latents.scale, config.latents.shift) == (0.13025, 0.5)
    assert load.load_autoencoder(config.latents.autoencoder)[0].groups == 8


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_of_an_autoencoder_alone(tmp_path, weights, part):
    tensors = {name: w for name, w in weights.items() if name.startswith(part)}
    with pytest.raises(InputError, match=f"^it holds the {part} of an autoencoder without its"):
        read(diffusers(tmp_path / "vae", tensors))


def test_an_autoencoder_of_other_latents_than_the_network(tmp_path, capsys):
    vae = diffusers_autoencoders.golden_directory(tmp_path)
    flags = (f"--output={tmp_path}/converted", *OF_DMF_TINY, f"--autoencoder={vae}")
    assert tiny.dmf("convert", PT, *flags) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.endswith("its latents have 16 channels, and the samples of the DiT 4")


def test_a_flow_map_has_the_latents_of_its_autoencoder():
    """Of any number of channels and any factor; without one, those of Stable Diffusion."""
    def dit(channels: int):
        return network(tiny.config({"model.channels": channels}).model)

    vae = AutoencoderKL(latent_channels=16, widths=(32, 32), default_scaling=LatentScaling(
        scale=0.3611, shift=0.1159))
    defaults = load.config_to_json(default.get_config())
    config = load.export_config(dit(16), {}, defaults, autoencoder=vae)
    assert config["data"]["name"] == "imagenet_latents_16"
    assert (config["latents"]["scale"], config["latents"]["shift"]) == (0.3611, 0.1159)
    config = load.export_config(dit(4), {}, defaults)
    assert (config["data"]["name"], config["latents"]["scale"]) == ("imagenet_latents_64", 0.18215)


def test_the_autoencoder_of_a_pipeline_is_taken_and_said(tmp_path, weights):
    diffusers(tmp_path / "vae", weights)
    opened = open_checkpoint(str(tmp_path))
    assert opened.note == "file vae/diffusion_pytorch_model.safetensors"
    assert open_checkpoint(str(tmp_path / "vae")).neighbour == STATED
    diffusers(tmp_path / "vae_ema", weights)
    opened = open_checkpoint(str(tmp_path))
    assert opened.note == "file vae_ema/diffusion_pytorch_model.safetensors"


def test_a_config_of_dinov2(tmp_path):
    tensors = gv.dinov2_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "image_size": 518}')
    assert read(tmp_path).network.heads == 4
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    with pytest.raises(InputError, match="hidden_act=relu: only gelu is known"):
        read(tmp_path, {"heads": 4})


def sharded(folder, **changes) -> pathlib.Path:
    """The tiny flow map in two files and their index."""
    tensors = gv.load("dmf_tiny").below("params")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**places, **changes}}))
    return index


def test_sharded_weights_are_one_network(tmp_path):
    index = sharded(tmp_path)
    for source in (index, tmp_path):
        found = open_checkpoint(str(source)).tensors
        assert found.keys() == gv.load("dmf_tiny").below("params").keys()
    np.testing.assert_array_equal(
        found["x_embedder.proj.bias"], gv.load("dmf_tiny").below("params")["x_embedder.proj.bias"]
    )


@pytest.mark.parametrize(("file", "message"), [
    ("../model-1.safetensors", "which is no .safetensors file beside it"),
    ("/etc/passwd", "'/etc/passwd', which is no .safetensors file"),
    ("model-3.safetensors", "model-3.safetensors: it is no file, and model.*json names it"),
])
def test_an_index_names_files_beside_it(tmp_path, file, message):
    with pytest.raises(InputError, match=message):
        open_checkpoint(str(sharded(tmp_path, other=file)))


@pytest.mark.parametrize("change", [
    {"pos_embed": "model-1.safetensors"}, {"other": "model-2.safetensors"},
])  # fmt: skip
def test_an_index_says_which_file_has_which_tensor(tmp_path, change):
    with pytest.raises(InputError, match=f"tensor '{min(change)}' is not where the index says"):
        open_checkpoint(str(sharded(tmp_path, **change)))


def test_shards_have_no_tensor_twice(tmp_path):
    index = sharded(tmp_path, other="model-3.safetensors")
    (tmp_path / "model-3.safetensors").write_bytes((tmp_path / "model-1.safetensors").read_bytes())
    with pytest.raises(InputError, match="model-3.safetensors: tensor .* is not where the index"):
        open_checkpoint(str(index))


@pytest.mark.parametrize("name", [
    "a.pt", "model.safetensors", "model.safetensors.index.json", "vae/config.json", "x/model-2",
])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, capsys, weights, name):
    place = tmp_path / name
    if name.startswith("vae"):
        diffusers(place.parent, weights)
    place.parent.mkdir(exist_ok=True)
    if name.startswith("x"):
        sharded(place.parent)
        place = place.with_suffix(".safetensors")
    place.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    source = place if place.parent == tmp_path else place.parent
    line = refused(capsys, tmp_path, source)
    assert f"{place}: it is a pointer of Git LFS" in line and "git lfs pull" in line


def test_a_directory_of_several_files_asks_for_one(tmp_path):
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match="several files of weights, give one: a.pt, b.safetensors"):
        open_checkpoint(str(tmp_path))
    os.unlink(tmp_path / "b.safetensors")
    (tmp_path / "a.pt").write_bytes(PT.read_bytes())
    assert open_checkpoint(str(tmp_path)).note == f"file {tmp_path.name}/a.pt"
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    with pytest.raises(InputError, match="a pipeline of diffusers without a vae"):
        open_checkpoint(str(tmp_path / "pipeline"))


def test_a_relative_directory_of_orbax(tmp_path, monkeypatch):
    params = unflatten_dict(gv.load("meanflow_tiny").below("params"), sep="/")
    ocp.PyTreeCheckpointer().save(tmp_path / "run", {"params": params})
    monkeypatch.chdir(tmp_path)
    found = open_checkpoint("run").tensors
    assert found.keys() == {name.removeprefix("params/")
                            for name in gv.load("meanflow_tiny").below("params")}
