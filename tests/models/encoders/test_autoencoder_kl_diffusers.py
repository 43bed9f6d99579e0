"""Autoencoders as diffusers computes them: SDXL's, and those of 16 channels without quant
convolutions."""

import diffusers_autoencoders as da
import golden_values as gv
import jax.numpy as jnp
import latent_run
import numpy as np
import pytest

from dmf.checkpoints.convert import namings
from dmf.checkpoints.convert.open_checkpoint import open_checkpoint
from dmf.models.encoders.latent_scaling import LatentScaling


def read(folder) -> namings.Converted:
    opened = open_checkpoint(str(folder))
    return namings.from_named_tensors(opened.tensors, {}, neighbour=opened.neighbour)


def first(images_nchw):
    return np.moveaxis(images_nchw, 1, -1)


def assert_same_outputs(found: namings.Converted, theirs) -> None:
    params = gv.on_device(found.params)
    mean, std = gv.jit(found.network.encode)(params, first(theirs["images_nchw"]))
    gv.assert_near(mean, first(theirs["mean"]), 1e-5)
    gv.assert_near(std, first(theirs["std"]), 1e-5)
    decoded = gv.jit(found.network.decode)(params, first(theirs["z"]))
    gv.assert_near(decoded, first(theirs["decoded"]), 1e-5)


def test_golden_values_of_16_channels(tmp_path):
    """From a directory as diffusers writes it to latents, images, and the same tensors again."""
    found = read(da.golden_directory(tmp_path))
    assert (found.network.quant_conv, found.network.post_quant_conv) == (False, False)
    assert found.network.default_scaling == LatentScaling(scale=1.5305, shift=0.0609)
    assert_same_outputs(found, gv.load(da.GOLDEN))
    back = namings.to_named_tensors(found.network, found.params, found.naming)
    assert {name: list(w.shape) for name, w in back.items()} == gv.load(da.GOLDEN).config["names"]


@pytest.mark.slow
@pytest.mark.parametrize("name", da.CONFIGS)
def test_diffusers_computes_the_same(name, tmp_path):
    """Outputs, scaled latents, and the tensors of a round trip, which diffusers loads again."""
    torch = pytest.importorskip("torch", reason="needs torch and diffusers")
    pytest.importorskip("diffusers", reason="needs torch and diffusers")
    network = da.autoencoder(name)
    found, theirs = read(da.save(network, tmp_path)), da.outputs(network)
    assert_same_outputs(found, theirs)
    stated = network.config
    scaled = (theirs["mean"] - (stated.shift_factor or 0)) * stated.scaling_factor
    ours = found.network.default_scaling.apply(jnp.asarray(first(theirs["mean"])))
    gv.assert_near(ours, first(scaled), 1e-6)
    back = namings.to_named_tensors(found.network, found.params, found.naming)
    for key, tensor in network.state_dict().items():
        np.testing.assert_array_equal(back[key], tensor.numpy(), err_msg=key)
    network.load_state_dict({key: torch.from_numpy(w) for key, w in back.items()}, strict=True)


@pytest.mark.slow
def test_prepare_train_sample_and_decode(tmp_path):
    latent_run.check(da.golden_directory(tmp_path), tmp_path, channels=16, factor=2)
