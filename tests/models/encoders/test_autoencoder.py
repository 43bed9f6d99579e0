"""The protocol of autoencoders: a new one needs its class and its registration alone."""

import dataclasses

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmf import registry
from dmf.checkpoints import export, load
from dmf.data.shard_writer import PrepareSettings, moments_function
from dmf.errors import InputError
from dmf.models import Autoencoder, AutoencoderKL
from dmf.models.encoders.autoencoder import Moments, as_moments, with_dtype
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.encoders.latent_space import LatentSpace


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchAutoencoder:
    """Latents are the pixels of 2 x 2 patches, scaled; there is no distribution and no dtype.

    Attributes:
      channels: channels of the images.
    """

    channels: int = 3
    factor = 2
    default_scaling = LatentScaling(scale=2.0)

    @property
    def latent_channels(self):
        return 4 * self.channels

    def init(self, key):
        return {"gain": jnp.ones((1, 1, 1, 1))}

    def encode(self, params, images):
        b, h, w, c = images.shape
        patches = images.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        return params["gain"] * patches.reshape(b, h // 2, w // 2, 4 * c)

    def decode(self, params, latents):
        b, h, w, _ = latents.shape
        patches = (latents / params["gain"]).reshape(b, h, w, 2, 2, self.channels)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, self.channels)


PARAMS = {"gain": jnp.full((1, 1, 1, 1), 3.0)}
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)), jnp.float32)


@pytest.fixture
def registered():
    registry.register("autoencoder", patches=PatchAutoencoder)
    yield
    del registry._COMPONENTS["autoencoder"]["patches"]


@pytest.mark.parametrize("network", [AutoencoderKL(), PatchAutoencoder()], ids=["kl", "patch"])
def test_the_protocol(network):
    assert isinstance(network, Autoencoder)


def test_latents_without_a_distribution_have_no_deviation():
    latents = PatchAutoencoder().encode(PARAMS, IMAGES)
    np.testing.assert_array_equal(as_moments(latents).mean, latents)
    assert not as_moments(latents).std.any()
    moments = Moments(latents, latents)
    assert as_moments(moments) is moments


def test_a_dtype_that_a_network_lacks_is_named():
    assert with_dtype(AutoencoderKL(), "bfloat16") == AutoencoderKL(dtype="bfloat16")
    assert with_dtype(PatchAutoencoder(), "float32") == PatchAutoencoder()
    with pytest.raises(InputError, match="^dtype=bfloat16: PatchAutoencoder computes in float32"):
        with_dtype(PatchAutoencoder(), "bfloat16")


@pytest.mark.parametrize("count", [1, 3])
def test_a_latent_space_of_any_autoencoder(count):
    network = PatchAutoencoder()
    space = LatentSpace(
        autoencoder=network, scaling=network.default_scaling, decode_batch=2
    )
    x = space.scaling.apply(network.encode(PARAMS, IMAGES[:count]))
    assert space.image_shape(x.shape[1:]) == (8, 8, 3)
    np.testing.assert_allclose(gv.jit(space.decode)(PARAMS, x), IMAGES[:count], atol=1e-6)


def test_a_dataset_of_latents_without_a_distribution():
    """They are stored as moments with a standard deviation of 0."""
    settings = PrepareSettings(resolution=8, autoencoder=PatchAutoencoder())
    levels = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    rows = moments_function(settings.autoencoder, mirror=True)(PARAMS, jnp.asarray(levels))
    assert rows.shape[1:] == (2, 4, 4, 24)
    assert not rows[..., 12:].any() and rows[..., :12].any()


def test_an_export_is_loaded_by_its_registered_name(registered):
    network, folder = PatchAutoencoder(), tiny.SCRATCH / "patch_autoencoder"
    config = load.export_config(network, {})
    assert config == {"autoencoder": {"name": "patches", "channels": 3}}
    export.write(folder, export.Parts(network, config, PARAMS, "by hand"))
    loaded, params = load.load_autoencoder(folder)
    assert loaded == network
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    space, _ = load.load_latent_space(
        tiny.config({"model.channels": 12, "latents.autoencoder": str(folder)})
    )
    assert space.autoencoder == network
