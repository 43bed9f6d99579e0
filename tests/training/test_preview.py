"""Grids of samples by another autoencoder than the run's own: its scaling, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network
from etils import epath

from dmf.checkpoints import load
from dmf.data.latent_origin import LatentOrigin
from dmf.errors import InputError
from dmf.models import TAESD, AutoencoderKL
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.training import callbacks, preview
from dmf.training.build import run, training
from dmf.training.loop import train
from dmf.training.settings import Run

pytestmark = pytest.mark.usefixtures("small_network_registered")

PUBLISHED = LatentScaling(scale=0.25, shift=0.5)
OWN = AutoencoderKL(widths=(4, 4), groups=2, latent_channels=1, channels=1,
                    default_scaling=PUBLISHED)  # fmt: skip
TINY = TAESD(width=2, encoder_blocks=(0, 0), decoder_blocks=(0, 0), latent_channels=1)
# Latents that were normalised otherwise than published.
FIELDS = {"latents.mean": (3.0,), "latents.std": (5.0,)}
CONFIG = {"run.sample_every": 4, "run.preview_autoencoder": "tiny"}


def config(overrides=None):
    return small_network.config(CONFIG | FIELDS | {"latents.autoencoder": "own"}
                                | (overrides or {}))


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    """Directories hold networks without parameters."""
    found = {"own": OWN, "tiny": TINY}
    for module in (load, preview):
        monkeypatch.setattr(module, "load_autoencoder", lambda name: (found[name], {}))
    return found


@pytest.mark.parametrize("other", [TINY, OWN], ids=["tiny", "the same"])
def test_another_autoencoder_decodes_the_same_latents(other):
    """TAESD takes latents after the published scaling, whichever the run has."""
    latents = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    samples = LatentScaling(mean=(3.0,), std=(5.0,)).apply(latents)
    space = preview.preview_space(config(), other, PUBLISHED, factor=2)
    expected = PUBLISHED.apply(latents) if other is TINY else latents
    np.testing.assert_allclose(space.scaling.invert(samples), expected, atol=1e-5)
    assert space.autoencoder == other


def used(monkeypatch, overrides=None):
    """The latent space of the grids of samples of a run."""
    spaces = []
    monkeypatch.setattr(callbacks, "Generator", lambda *parts, mesh: spaces.append(parts[-1]))
    made = config(overrides)
    built = recipe()._replace(run=run(made.run))
    callbacks.SampleGridCallback(made, built, epath.Path("run"))
    return spaces[0][0]


@functools.cache
def recipe():
    return training(config())


@pytest.mark.slow
def test_grids_are_decoded_by_it(monkeypatch):
    """Where the run has an autoencoder, where its dataset states one, and where nothing does."""
    x = jnp.ones((1, 1, 1, 1))
    assert used(monkeypatch, {"run.preview_autoencoder": ""}).autoencoder == OWN
    space = used(monkeypatch)
    assert space.autoencoder == TINY
    assert float(space.scaling.invert(x)[0, 0, 0, 0]) == pytest.approx((5 + 3 - 0.5) / 4)
    alone = {"latents.autoencoder": ""}
    assert float(used(monkeypatch, alone).scaling.invert(x)[0, 0, 0, 0]) == pytest.approx(1)
    origin = LatentOrigin("0" * 8, 2, 1, PUBLISHED)
    monkeypatch.setattr(preview, "stated_origins", lambda directories: {"data": origin})
    space = used(monkeypatch, alone)
    assert float(space.scaling.invert(x)[0, 0, 0, 0]) == pytest.approx((5 + 3 - 0.5) / 4)


@pytest.mark.parametrize(("other", "message"), [
    (TAESD(width=2, encoder_blocks=(0, 0), decoder_blocks=(0, 0)),
     "its latents have 4 channels, and config.model has 1; give"),
    (TAESD(width=2, encoder_blocks=(0,), decoder_blocks=(0,), latent_channels=1),
     "its factor is 1, and that of the latents of the run 2; give"),
], ids=["channels", "factor"])  # fmt: skip
def test_an_autoencoder_of_other_latents_is_found_before_training(
    tmp_path, networks, other, message
):
    networks["tiny"] = other
    with pytest.raises(InputError, match=f"^run.preview_autoencoder=tiny: {message}"):
        train(config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_without_grids_is_refused():
    with pytest.raises(InputError, match="^preview_autoencoder=tiny: run.sample_every=0 makes no"):
        Run(sample_every=0, preview_autoencoder="tiny")
