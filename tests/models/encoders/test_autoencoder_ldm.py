"""Autoencoders by the names of latent diffusion: VA-VAE, MAR, Stable Diffusion and FLUX."""

import json
import pathlib
import shutil

import golden_values as gv
import jax
import jax.numpy as jnp
import latent_run
import ldm_autoencoder as ldm
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from dmf.checkpoints.convert import namings
from dmf.checkpoints.convert.open_checkpoint import open_checkpoint
from dmf.checkpoints.convert.tables.autoencoder_ldm import from_diffusers, to_diffusers
from dmf.errors import InputError
from dmf.models.encoders.autoencoder_kl import AutoencoderKL
from dmf.models.encoders.latent_scaling import LatentScaling

LDM = next(naming for naming in namings.NAMINGS if naming.name == "ldm")
# The sizes of VA-VAE (f16, 32 channels), of MAR's, of Stable Diffusion's and of FLUX's autoencoder.
VA_VAE = {"widths": (128, 128, 256, 256, 512), "layers": 2, "channels": 32, "encoder": (4,),
          "decoder": (4,)}  # fmt: skip
PUBLISHED = {
    "va_vae": VA_VAE,
    "mar": VA_VAE | {"channels": 16, "decoder": ()},
    "stable_diffusion": {"widths": (128, 256, 512, 512), "layers": 2, "channels": 4},
    "flux": {"widths": (128, 256, 512, 512), "layers": 2, "channels": 16, "quant": False},
}
TINY = {"widths": (4, 8, 8), "layers": 1, "channels": 3, "encoder": (1, 2), "decoder": (0, 2)}
# What the training of VA-VAE leaves in a checkpoint; the second network is a DINOv2.
TRAINING_ONLY = {
    "loss.logvar": (), "loss.discriminator.main.0.weight": (4, 3, 4, 4), "linear_proj.weight": (8,),
    "foundation_model.model.cls_token": (1, 1, 8),
    "foundation_model.model.blocks.0.attn.qkv.weight": (24, 8),
    "foundation_model.model.blocks.0.mlp.fc1.weight": (32, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_autoencoders_are_known_by_their_shapes(name):
    sizes = PUBLISHED[name]
    shapes = ldm.shapes(**sizes)
    network = LDM.infer_network(shapes, {})
    quant = sizes.get("quant", True)
    scaling = {} if sizes["channels"] == 4 else {"default_scaling": LatentScaling()}
    assert network == AutoencoderKL(
        widths=sizes["widths"], latent_channels=sizes["channels"], quant_conv=quant,
        post_quant_conv=quant, encoder_attention=sizes.get("encoder", ()),
        decoder_attention=sizes.get("decoder", ()), **scaling,
    )  # fmt: skip
    assert network.factor == 2 ** (len(sizes["widths"]) - 1)
    table = LDM.table(network)
    assert {tensor: entry.shape for tensor, entry in table.items()} == shapes
    levels = len(sizes["widths"])
    assert all(from_diffusers(to_diffusers(tensor, levels), levels) == tensor for tensor in shapes)


def test_tensors_come_and_go_unchanged():
    """Also beside those that only training uses; and diffusers' names give the same parameters."""
    tensors = ldm.drawn(ldm.shapes(**TINY))
    extra = {name: np.ones(shape, "f") for name, shape in TRAINING_ONLY.items()}
    found = namings.from_named_tensors(tensors | extra, {"groups": 2})
    assert found.naming is LDM and set(found.unused) == set(extra)
    paths = flatten_dict(found.params, sep="/")
    attention = {path.split("/")[1] for path in paths if "/level_" in path and "attention" in path}
    assert attention == {"level_1_attention_0", "level_2_attention_0", "level_0_attention_0",
                         "level_0_attention_1", "level_2_attention_1"}
    back = namings.to_named_tensors(found.network, found.params, LDM)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    modern = {
        to_diffusers(name, 3): t[..., 0, 0] if ".attn" in name and t.ndim == 4 else t
        for name, t in tensors.items()
    }
    same = namings.from_named_tensors(modern, {"groups": 2})
    assert same.naming.name == "diffusers" and same.network == found.network
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, same.params, found.params)))


@pytest.mark.parametrize(("part", "other"), [("encoder", "decoder"), ("decoder", "encoder")])
def test_a_part_alone(part, other):
    tensors = {name: tensor for name, tensor in ldm.drawn(ldm.shapes(**TINY)).items()
               if name.startswith(part)}
    with pytest.raises(InputError, match=f"^it holds the {part} of an autoencoder without its "
                                         f"{other}; give the whole autoencoder$"):
        namings.from_named_tensors(tensors, {})


@pytest.mark.parametrize("field", ["encoder_attention", "decoder_attention"])
def test_levels_that_are_none(field):
    with pytest.raises(InputError, match=rf"^{field}=\(4,\): give indices of levels, from 0 to 3$"):
        AutoencoderKL(**{field: (4,)})


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"quant": False, "encoder": ()}], ids=["all", "plain"])
def test_pytorch_computes_the_same(changes, tmp_path):
    """A whole training file with the statistics of its latents beside it."""
    torch = pytest.importorskip("torch", reason="needs torch")
    tensors = ldm.drawn(ldm.shapes(**TINY | changes))
    extra = {name: np.ones(shape, "f") for name, shape in TRAINING_ONLY.items()}
    state = {name: torch.from_numpy(tensor) for name, tensor in (tensors | extra).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "vae.ckpt")
    mean, std = np.arange(3) / 4, np.arange(1, 4) / 8
    torch.save({name: torch.tensor(values, dtype=torch.float32).reshape(1, 3, 1, 1)
                for name, values in (("mean", mean), ("std", std))}, tmp_path / "latents_stats.pt")
    opened = open_checkpoint(str(tmp_path))
    found = namings.from_named_tensors(opened.tensors, {"groups": 2}, neighbour=opened.neighbour)
    scaling = LatentScaling(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    assert found.network.default_scaling == found.scaling == scaling
    computed, draw = ldm.Computed(tensors, groups=2), np.random.default_rng(0).standard_normal
    images, latents = draw((2, 3, 16, 8)).astype("f"), draw((2, 3, 4, 2)).astype("f")

    def last(array) -> jax.Array:
        return jnp.asarray(np.moveaxis(np.asarray(array), 1, -1))

    params = gv.on_device(found.params)
    ours = gv.jit(found.network.encode)(params, last(images))
    for moment, theirs in zip(ours, computed.moments(torch.from_numpy(images)), strict=True):
        gv.assert_near(moment, last(theirs), 1e-5)
    gv.assert_near(gv.jit(found.network.decode)(params, last(latents)),
                   last(computed.images(torch.from_numpy(latents))), 1e-5)


def directory(folder: pathlib.Path) -> pathlib.Path:
    """An autoencoder with the statistics of its latents beside it."""
    folder.mkdir()
    save_file(ldm.drawn(ldm.shapes(**TINY)), folder / "vae.safetensors")
    (folder / "config.json").write_text(json.dumps({"norm_num_groups": 2}))
    shutil.copy(gv.FOLDER / "latents_stats.pt", folder)
    return folder


@pytest.mark.slow
def test_a_run_in_latents_that_are_prepared(tmp_path):
    latent_run.check(directory(tmp_path / "vae"), tmp_path, channels=3, factor=4)


@pytest.mark.slow
def test_a_run_in_latents_that_lightningdit_cached(tmp_path, capsys):
    """The statistics beside them reach the config of the run, and its samples are decoded."""
    autoencoder = tmp_path / "autoencoder"
    source = directory(tmp_path / "vae")
    assert tiny.dmf("convert", source, f"--output={autoencoder}") == 0
    draw = np.random.default_rng(0).standard_normal
    (tmp_path / "cache").mkdir()
    rows = {name: draw((24, 3, 8, 8)).astype("f") for name in ("latents", "latents_flip")}
    save_file(rows | {"labels": np.arange(24) % 10}, tmp_path / "cache/shard000.safetensors")
    shutil.copy(source / "latents_stats.pt", tmp_path / "cache")
    fields = (f"data.directory={tmp_path}/cache", "data.mirror=True", "model.channels=3",
              f"latents.autoencoder={autoencoder}", "run.steps=10", "run.checkpoint_every=10",
              "latents.scale=1.0")  # fmt: skip
    flags = [f"--config.{field}" for field in fields]
    workdir = tmp_path / "run"
    command = ("train", f"--config={tiny.CONFIG}", f"--workdir={workdir}")
    assert tiny.dmf(*command, *flags[:-1]) == 0
    stated = json.loads((workdir / "config.json").read_text())["latents"]
    assert (stated["mean"], stated["std"]) == ([0.5, -1.0, 0.25], [2.0, 0.5, 4.0])
    samples = f"--output={tmp_path}/samples.npz"
    assert tiny.dmf("sample", f"--checkpoint={workdir}", "--count=2", "--steps=1", samples) == 0
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (2, 32, 32, 3)
    assert tiny.dmf(*command, *flags) == 2, "the run goes on with another scaling"
