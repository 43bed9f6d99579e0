"""How well an autoencoder reconstructs images: every number against a plain computation, left out
metrics, interrupted work, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import plugin_files
import pytest
import tiny
import tiny_networks

from dmf import registry
from dmf.checkpoints import load
from dmf.data import image_sets
from dmf.evaluation import metrics, reconstruction
from dmf.evaluation.evaluated_images import evaluated_image_set
from dmf.evaluation.image_similarity import psnr, ssim
from dmf.evaluation.running_statistics import moments
from dmf.models import LPIPS
from dmf.models.encoders.autoencoder import Moments
from dmf.models.encoders.inception import resize_for_inception
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.encoders.latent_space import LatentSpace

SHAPE, COUNT = (12, 14, 3), 20
# The mean of four levels is a whole number.
IMAGES = 4 * np.random.default_rng(0).integers(0, 64, (COUNT, *SHAPE)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Mean:
    """Latents are the means of blocks of 2 x 2 pixels; their standard deviation is not used."""

    factor, channels, latent_channels, default_scaling = 2, 3, 3, LatentScaling(scale=7.0)

    def init(self, key):
        return {}

    def encode(self, params, images):
        n, h, w, c = images.shape
        mean = images.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
        return Moments(mean, 100 * jnp.ones_like(mean))

    def decode(self, params, latents):
        return jnp.repeat(jnp.repeat(latents + params["offset"], 2, axis=1), 2, axis=2)


class Gap(LPIPS):
    """The distance between mean pixels."""

    def apply(self, params, a, b):
        return jnp.abs(a - b).mean((1, 2, 3)) * params["gap"]


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    """Directories hold small networks; yields the parameters of the autoencoder."""
    tiny_networks.install(monkeypatch)
    others, params = load.load_encoder, {"offset": jnp.float32(0)}
    lpips = {"small": Gap(trunk="vgg16"), "large": LPIPS()}
    monkeypatch.setattr(load, "load_encoder", lambda name, kind: (
        (lpips[name], {"gap": jnp.float32(3)}) if kind == "lpips" else others(name, kind)))
    monkeypatch.setattr(Gap, "smallest_side", 4)
    monkeypatch.setattr(load, "load_autoencoder", lambda name: (Mean(), params))
    with plugin_files.registered_components():
        registry.register("autoencoder", mean=Mean)
        yield params


@pytest.fixture
def images(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    return tmp_path / "images.npz"


def measure(images, *arguments) -> int:
    return tiny.dmf("evaluate", "--reconstruction", f"--images={images}", "--autoencoder=any",
                    f"--output={images.parent}/e.json", "--config.evaluation.chunk_size=3",
                    "--config.evaluation.part_size=6", *arguments)  # fmt: skip


def plain_reconstructions() -> np.ndarray:
    n, (h, w, c) = COUNT, SHAPE
    means = IMAGES.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return means.repeat(2, 1).repeat(2, 2)


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of two images of one channel, window by window, in float64."""
    x = np.arange(11) - 5
    window = np.exp(-(x[:, None] ** 2 + x[None] ** 2) / (2 * 1.5**2))
    window, values = window / window.sum(), []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = (image[i : i + 11, j : j + 11].astype(float) for image in (a, b))
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            cov = np.cov(p.ravel(), q.ravel(), aweights=window.ravel(), ddof=0)
            means = (2 * mean_p * mean_q + 2.55**2) / (mean_p**2 + mean_q**2 + 2.55**2)
            values.append(means * (2 * cov[0, 1] + 7.65**2) / (np.trace(cov) + 7.65**2))
    return float(np.mean(values))


def test_every_number_is_that_of_a_plain_computation(images, capsys):
    assert measure(images, "--inception=I", "--lpips=small") == 0
    printed = capsys.readouterr().out
    result = json.loads((images.parent / "e.json").read_text())
    (row,), rebuilt = result["results"], plain_reconstructions()
    errors = ((IMAGES - rebuilt) ** 2).mean((1, 2, 3))
    assert row["psnr"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), rel=1e-4)
    similarities = [np.mean([plain_ssim(a[..., c], b[..., c]) for c in range(3)])
                    for a, b in zip(IMAGES, rebuilt, strict=True)]  # fmt: skip
    assert row["ssim"] == pytest.approx(np.mean(similarities), abs=1e-5)
    gaps = np.abs(IMAGES - rebuilt).mean() / 127.5
    assert row["lpips"] == pytest.approx(3 * gaps, rel=1e-4)
    inception, params = load.load_encoder("I", "inception")
    pool3 = jax.jit(lambda x: inception.apply(params, resize_for_inception(x)).pool3)
    features = [pool3(x.astype("f")) for x in (IMAGES, rebuilt)]
    distance = metrics.frechet_distance(*(moments(np.asarray(f)) for f in features))
    assert row["rfid"] == pytest.approx(distance, rel=1e-3)
    assert row["count"] == COUNT and result["autoencoder"] == "any"
    assert f"psnr {row['psnr']:.5g}  ssim {row['ssim']:.5g}  lpips" in printed
    assert not list(images.parent.glob(".*parts"))


def test_metrics_without_networks_are_left_out_and_work_resumes(images, capsys, monkeypatch):
    """An interrupted command goes on after its last whole part."""
    read = image_sets.ArrayImages.read
    seen = []

    def interrupted(self, indices):
        seen.append(int(indices[0]))
        if indices[0] == 18:
            raise KeyboardInterrupt
        return read(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(image_sets.ArrayImages, "read", interrupted)
        assert measure(images) == 130
        assert seen[-4:] == [0, 6, 12, 18]
        seen.clear()
        patch.setattr(image_sets.ArrayImages, "read", lambda self, indices: (
            seen.append(int(indices[0])), read(self, indices))[1])
        capsys.readouterr()
        assert measure(images) == 0
    assert seen[1:] == [18]
    said = capsys.readouterr().err
    assert "rfid is left out: no Inception is given; --inception=DIR" in said
    assert "lpips is left out: no LPIPS is given; --lpips=DIR" in said
    (row,) = json.loads((images.parent / "e.json").read_text())["results"]
    assert {"rfid", "lpips"}.isdisjoint(row) and row["psnr"] > 0


def test_small_images_have_no_ssim(capsys):
    space = LatentSpace(autoencoder=Mean(), scaling=LatentScaling())
    measured = reconstruction.Reconstruction(space=space, params={})
    assert measured.extractor((11, 14, 3)).kinds == ("psnr", "ssim")
    assert measured.extractor((10, 14, 3)).kinds == ("psnr",)
    small = image_sets.ArrayImages(name="small", array=IMAGES[:, :10], all_labels=None)
    measured.check(evaluated_image_set(small))
    assert "ssim is left out: images are smaller than its window of 11" in capsys.readouterr().err


def test_equal_images_have_a_finite_psnr():
    a = jnp.asarray(IMAGES[:2])
    b = a.at[1, 0, 0, 0].add(1)
    expected = 10 * np.log10(255**2 * np.prod(SHAPE))
    np.testing.assert_allclose(psnr(a, b), [expected] * 2, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [2, 60])
def test_scikit_image_computes_the_same(noise):
    skimage = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    draw = np.random.default_rng(1)
    smooth = draw.integers(0, 256, (3, 5, 6, 3)).repeat(9, 1).repeat(8, 2)
    others = np.clip(smooth + draw.normal(0, noise, smooth.shape), 0, 255)
    a, b = smooth.astype(np.uint8), others.astype(np.uint8)
    ours = [measure(jnp.asarray(a), jnp.asarray(b)) for measure in (ssim, psnr)]
    for x, y, similarity, ratio in zip(a, b, *ours, strict=True):
        expected = skimage.structural_similarity(
            x, y, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert float(similarity) == pytest.approx(expected, abs=2e-5)
        expected = skimage.peak_signal_noise_ratio(x, y, data_range=255)
        assert float(ratio) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--steps=2",), "--steps=['2']: it has no effect on --reconstruction; leave it out"),
    (("--reference=r.npz",), "--reference=r.npz: it has no effect on --reconstruction"),
    (("--rounding=up",), "rounding=up: choose one of"),
    (("--lpips=large",), "lpips: vgg16 needs images of 16 x 16; these are 12 x 14"),
    (("--config.sampling.decode_tiles=(8,2)",), "sampling.decode_tiles=(8, 2): the latents of an "
     "image are 6 x 7, no larger than a tile"),
    (("--noreconstruction",), "--autoencoder=any: it is for --reconstruction; leave it out"),
], ids=str)  # fmt: skip
def test_what_cannot_be_measured_is_refused(images, capsys, arguments, message):
    assert measure(images, *arguments) == 2
    assert message in capsys.readouterr().err


def test_images_that_cannot_be_measured_are_refused(images, capsys, networks):
    networks["offset"] = jnp.where(jnp.arange(7) == 3, jnp.nan, 0.0)[None, None, :, None]
    assert measure(images) == 2
    assert "hold NaN or infinity: nothing can be measured on them" in capsys.readouterr().err
    np.savez(images, arr_0=IMAGES[:6])
    assert measure(images, "--inception=I") == 2
    assert "rfid needs more than 6 images (the feature dimension); got 6" in capsys.readouterr().err
    np.savez(images, arr_0=IMAGES[:, :11])
    assert measure(images) == 2
    assert "give [b, h, w, 3], h and w multiples of 2" in capsys.readouterr().err
