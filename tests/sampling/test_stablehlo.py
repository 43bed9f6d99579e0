"""Sampling as one function, which runs where only JAX is installed."""

import functools
import pathlib
import re

import jax
import numpy as np
import pytest
import small_network
import tiny
from safetensors.numpy import load_file, save_file

from dmf.checkpoints import load
from dmf.checkpoints import params as stored_params
from dmf.checkpoints.convert import namings
from dmf.models.abstract_params import abstract_params
from dmf.models.dit import DiT
from dmf.models.encoders.autoencoder_kl import AutoencoderKL
from dmf.sampling import stablehlo

pytestmark = pytest.mark.usefixtures("small_network_registered")

# Packages that the function must not need.
BLOCKED = "dmf", "flax", "optax", "orbax", "safetensors", "ml_collections", "jaxtyping"
AUTOENCODER = AutoencoderKL(widths=(8, 8), layers_per_block=1, groups=4)
LATENT = DiT(
    input_size=4, channels=4, depth=2, width=16, heads=2, num_classes=3,
    conditioning="decoupled", split_depth=1,
)  # fmt: skip


@functools.cache
def latent_checkpoint() -> pathlib.Path:
    """A flow map of latents with its autoencoder, converted in one command."""
    folder = tiny.SCRATCH / "latent"
    for name, network in (("map", LATENT), ("vae", AUTOENCODER)):
        draw = np.random.default_rng(1)
        shapes = abstract_params(network)
        params = jax.tree.map(lambda w: draw.normal(0, 0.1, w.shape).astype("f"), shapes)
        tensors = namings.to_named_tensors(network, params, namings.naming_of(network))
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / f"{name}.safetensors")
    # The default number of groups does not divide these widths.
    autoencoder_exit = tiny.dmf("convert", folder / "vae.safetensors", f"--output={folder}/vae",
                                "--groups=4")
    map_exit = tiny.dmf("convert", folder / "map.safetensors", f"--output={folder}/export",
                    "--num-heads=2", "--split-depth=1", f"--autoencoder={folder}/vae")
    assert (autoencoder_exit, map_exit) == (0, 0)
    return folder / "export"


def run_alone(folder: pathlib.Path, where: pathlib.Path) -> np.ndarray:
    """The images that the code of the model card generates, in a process without `dmf`."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    block_imports = (
        "import importlib.machinery, os, sys\n"
        "find = importlib.machinery.PathFinder.find_spec\n"
        "importlib.machinery.PathFinder.find_spec = lambda name, *rest: (\n"
        f"    None if name in {BLOCKED} else\n"
        f"    find(name, [{str(folder)!r}]) if name == 'flatbuffers' else find(name, *rest))\n"
        f"os.chdir({str(where)!r}); sys.argv = ['', {str(folder)!r}]\n"
    )
    finished = tiny.process(code=block_imports + code)
    assert finished.returncode == 0, finished.stderr
    return np.load(where / "images.npy")


def sampled(checkpoint, where: pathlib.Path, *flags: str) -> np.ndarray:
    """The images that `dmf sample` generates."""
    assert tiny.dmf(
        "sample", f"--checkpoint={checkpoint}", f"--output={where}/images.npz", "--count=8", *flags
    ) == 0
    return np.load(where / "images.npz")["arr_0"]


def exported(checkpoint, output, *flags: str) -> pathlib.Path:
    assert tiny.dmf("export", f"--checkpoint={checkpoint}", f"--output={output}",
                    "--format=stablehlo", *flags) == 0
    return output


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_images_are_those_of_dmf_sample(tmp_path, steps):
    folder = exported(small_network.flow_map_run(), tmp_path / "out", f"--steps={steps}")
    images = run_alone(folder, tmp_path)
    expected = sampled(small_network.flow_map_run(), tmp_path, f"--steps={steps}")
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, expected)


@pytest.mark.slow
def test_latents_are_decoded(tmp_path):
    """Noise, flow map, autoencoder and rounding in one function."""
    folder = exported(latent_checkpoint(), tmp_path / "out", "--steps=2")
    images = run_alone(folder, tmp_path)
    expected = sampled(latent_checkpoint(), tmp_path, "--steps=2")
    assert images.shape == (8, 8, 8, 3)
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(images, expected)


def test_labels_seed_and_count_are_free(tmp_path):
    """The function contains the guidance of the overrides."""
    overrides = ("--config.sampling.guidance.scale=2.0",)
    folder = exported(small_network.flow_map_run(), tmp_path / "out", "--steps=2", *overrides)
    function = jax.export.deserialize(
        bytearray((folder / stablehlo.FUNCTION_FILE).read_bytes())
    )
    assert function.platforms == stablehlo.PLATFORMS
    weights = load_file(folder / stablehlo.WEIGHTS_FILE)
    for count, seed in ((3, 5), (1, 0)):
        labels = np.full(count, 7, np.int32)
        images = function.call(weights, labels, np.int32(seed))
        expected = sampled(small_network.flow_map_run(), tmp_path, "--steps=2", "--labels=7",
                           f"--seed={seed}", *overrides)
        np.testing.assert_array_equal(images, expected[:count])


@pytest.mark.slow
def test_a_frozen_network_makes_no_images(tmp_path, capsys):
    latent_checkpoint()
    assert tiny.dmf("export", f"--checkpoint={tiny.SCRATCH}/latent/vae",
                    f"--output={tmp_path}/out", "--format=stablehlo") == 2
    assert "which makes no images" in capsys.readouterr().err


@pytest.mark.slow
def test_an_export_keeps_its_autoencoder(tmp_path):
    assert tiny.dmf(
        "export", f"--checkpoint={latent_checkpoint()}", f"--output={tmp_path}/again"
    ) == 0
    assert stored_params.read_config(tmp_path / "again")["latents"]["autoencoder"] == ""
    moved = (tmp_path / "again").rename(tmp_path / "elsewhere")
    np.testing.assert_array_equal(
        sampled(moved, tmp_path), sampled(latent_checkpoint(), tmp_path)
    )


@pytest.mark.slow
def test_a_frozen_network_is_exported_in_either_naming(tmp_path):
    latent_checkpoint()
    for naming, name in (("diffusers", "to_q"), ("diffusers-old", "query")):
        output = tmp_path / naming
        assert tiny.dmf(
            "export", f"--checkpoint={tiny.SCRATCH}/latent/vae", f"--output={output}",
            "--format=safetensors", f"--naming={naming}",
        ) == 0
        tensors = load_file(output / "model.safetensors")
        assert f"encoder.mid_block.attentions.0.{name}.weight" in tensors
        assert tiny.dmf("convert", output, f"--output={output}-back") == 0
        first, params = load.load_autoencoder(tiny.SCRATCH / "latent/vae")
        second, back = load.load_autoencoder(f"{output}-back")
        assert first == second == AUTOENCODER
        jax.tree.map(np.testing.assert_array_equal, params, back)


@pytest.mark.slow
def test_latents_without_an_autoencoder_are_no_images(tmp_path, capsys):
    map_alone = tiny.SCRATCH / "latent/map.safetensors"
    latent_checkpoint()
    tiny.dmf("convert", map_alone, f"--output={tmp_path}/map", "--num-heads=2", "--split-depth=1")
    assert tiny.dmf("sample", f"--checkpoint={tmp_path}/map", f"--output={tmp_path}/x.png") == 2
    assert "4 channels, which are no image; give --config.latents.autoencoder=DIR" in (
        capsys.readouterr().err
    )
    assert tiny.dmf("sample", f"--checkpoint={tmp_path}/map", f"--output={tmp_path}/x.png",
                    f"--config.latents.autoencoder={tiny.SCRATCH}/latent/vae") == 0


@pytest.mark.slow
def test_another_network_is_refused_as_an_autoencoder(tmp_path, capsys):
    latent_checkpoint()
    source = tiny.SCRATCH / "latent/map.safetensors"
    flags = ("--num-heads=2", "--split-depth=1", f"--autoencoder={latent_checkpoint()}")
    assert tiny.dmf("convert", source, f"--output={tmp_path}/map", *flags) == 2
    assert "it holds another network, DiT" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--format=onnx"], ["--format=safetensors", "--naming=odd"]])
def test_an_unknown_format_or_naming(tmp_path, capsys, flags):
    assert tiny.dmf("export", f"--checkpoint={tiny.flow_run()}", f"--output={tmp_path}/x",
                    *flags) == 2
    assert re.search("choose one of orbax|can be written as dmf, sit", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
