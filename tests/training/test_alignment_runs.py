"""Training with representation alignment from end to end, and the datasets it is done on."""

import functools
import pathlib
import shutil

import image_set
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
import tiny_exports

from configs import default
from dmf.checkpoints.params import latest_step
from dmf.data import prepare, shard_writer
from dmf.data.build import data, dataset
from dmf.data.datasets import open_dataset
from dmf.data.image_files import open_images
from dmf.data.image_transforms import center_crop
from dmf.errors import InputError, RunError
from dmf.models.build import network
from dmf.models.encoders.patch_features import PatchFeatures
from dmf.objectives import FlowMatching
from dmf.runtime.sharding import make_mesh
from dmf.training import build, metrics_writer
from dmf.training.loop import train

COUNT = 24
# Batches are those of test_preparation.py, so that their encoding is compiled once.
FLAGS = ("--resolution=32", "--shard-size=8", "--batch-size=32")
FEATURES = ("--features-side=4", "--keep-images")


@functools.cache
def dinov2() -> pathlib.Path:
    return tiny_exports.exported(tiny_exports.DINOV2)


@functools.cache
def images() -> pathlib.Path:
    """Class folders, one image of which is truncated."""
    folder = tiny.SCRATCH / "images_to_align"
    image_set.make(folder, count=COUNT)
    return folder


def run_prepare(output: pathlib.Path, *flags: str) -> int:
    vae = tiny_exports.exported(tiny_exports.AUTOENCODER)
    return tiny.dmf("prepare", f"--source={images()}", f"--output={output}", f"--autoencoder={vae}",
                    *FLAGS, *flags)  # fmt: skip


@functools.cache
def prepared() -> pathlib.Path:
    """Moments with crops and features beside them, of both sides."""
    folder = tiny.SCRATCH / "aligned"
    assert run_prepare(folder, f"--features={dinov2()}", *FEATURES) == 0
    return folder


def records(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*array_record*"))}


def config(encoder: str, overrides=None):
    """A run that aligns with the features of an encoder, or with stored ones."""
    return tiny.config({
        "model.alignment_depth": 1, "model.alignment_width": 12, "model.alignment_hidden": 16,
        "alignment.encoder": encoder, "data.mirror": True, "run.log_every": 1,
        "run.checkpoint_every": 0, **(overrides or {}),
    }, objective=default.component(FlowMatching(alignment_coefficient=0.5)))  # fmt: skip


def config_of_latents(encoder: str, overrides=None):
    return config(encoder, {
        "data.directory": str(prepared()), "data.name": "latents", "model.channels": 4,
        "model.num_classes": len(image_set.CLASSES), "run.steps": 2, **(overrides or {}),
    })  # fmt: skip


def metric(workdir, name: str) -> list[float]:
    return [row[name] for row in metrics_writer.read_metrics(workdir)]


@pytest.mark.slow
def test_what_is_stored_is_the_crop_and_its_features():
    rows = tfds.builder_from_directory(prepared()).as_data_source("train")
    files = open_images(str(images()))
    read = open_dataset("x", directory=str(prepared()), extra="images").read(range(3, 9))
    x, y, pixels = read["x"], read["y"], read["images"]
    stored = open_dataset("x", directory=str(prepared()), extra="features")
    features = stored.read([3, 8])["features"]
    for i, row in zip(range(3, 9), (rows[i] for i in range(3, 9)), strict=True):
        crop = center_crop(files.image(files.names.index(row["name"].decode())), 32)
        np.testing.assert_array_equal(pixels[i - 3], crop)
        np.testing.assert_array_equal(x[i - 3], row["moments"])
        assert y[i - 3] == row["label"]
    np.testing.assert_array_equal(features, np.stack([rows[i]["features"] for i in (3, 8)]))
    assert features.shape == (2, 2, 16, 12)
    plain = PatchFeatures(encoder=tiny_exports.DINOV2, side=4)
    params = tiny_exports.params(tiny_exports.DINOV2)
    found = plain(params, jax.numpy.asarray(pixels[:1, :, ::-1]))
    np.testing.assert_allclose(features[0, 1], found[0], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_rows_are_the_same_in_memory_and_on_disk(monkeypatch):
    """And in a mixture of datasets."""
    in_memory = open_dataset("x", directory=str(prepared()), extra="images")
    monkeypatch.setattr("dmf.data.datasets.IN_MEMORY_BYTES", 0)
    on_disk = open_dataset("x", directory=str(prepared()), extra="images")
    assert type(in_memory) is not type(on_disk)
    chosen = config_of_latents("E", {"data.classes": (0, 2)})
    chosen.data.mixture = {"more": {"name": "latents", "directory": str(prepared())}}
    mixture = dataset(data(chosen.data), network(chosen.model), "images")
    wanted = np.flatnonzero(np.isin(in_memory.labels(), (0, 2)))[[1, 4]].tolist()
    datasets = ((in_memory, wanted), (on_disk, wanted), (mixture, [1, 4]))
    first, *others = (rows.read(indices) for rows, indices in datasets)
    assert first.keys() == {"x", "y", "images"}
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.fixture
def one_device(monkeypatch):
    """Runs are on one device, which is sooner."""
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(build, "mesh", lambda section: mesh)


@pytest.mark.slow
def test_computed_and_stored_features_give_the_same_losses(tmp_path, monkeypatch, one_device):
    """Up to the half precision of what is stored; computed in parts and on a mesh of all axes."""
    train(config_of_latents(""), tmp_path / "stored")
    monkeypatch.undo()
    split = {"gradient_accumulation": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    train(config_of_latents(str(dinov2()), split), tmp_path / "computed")
    for name in ("loss", "alignment_distance"):
        stored, computed = (metric(tmp_path / run, name) for run in ("stored", "computed"))
        np.testing.assert_allclose(stored, computed, rtol=2e-4)


@pytest.mark.slow
def test_a_run_aligns_its_tokens_and_resumes_bit_for_bit(tmp_path, one_device):
    chosen = config(str(dinov2()), {
        "run.steps": 24, "run.checkpoint_every": 12, "optimizer.learning_rate": 1e-2,
    })  # fmt: skip
    whole = train(chosen, tmp_path)
    distance = metric(tmp_path, "alignment_distance")
    assert np.mean(distance[-5:]) < np.mean(distance[:5]) - 0.2
    shutil.rmtree(tmp_path / "checkpoints/24")
    assert latest_step(tmp_path) == 12
    again = train(chosen, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    assert metric(tmp_path, "alignment_distance") == distance


@pytest.mark.slow
def test_interrupted_and_started_again(tmp_path, monkeypatch):
    """The shards that are finished are kept; the bytes are those of an undisturbed run."""
    flags, write = (f"--features={dinov2()}", *FEATURES), shard_writer.ShardWriter.write

    def stops(self, shard):
        if shard == 1:
            raise RunError("the machine is lost")
        return write(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.ShardWriter, "write", stops)
        assert run_prepare(tmp_path / "out", *flags) == 1
    assert len(records(tmp_path / "out")) == 1
    assert run_prepare(tmp_path / "out", *flags) == 0
    assert records(tmp_path / "out") == records(prepared())


@pytest.mark.slow
def test_features_are_among_the_settings(capsys):
    before = records(prepared())
    capsys.readouterr()
    others = ("--keep-images", f"--features={dinov2()}", "--features-side=8")
    for flags in (others[:1], others):
        assert run_prepare(prepared(), *flags) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "it holds other work, whose patch_features is {" in line
    assert records(prepared()) == before


@pytest.mark.slow
def test_what_is_no_dinov2_is_refused(tmp_path, capsys):
    autoencoder = tiny_exports.exported(tiny_exports.AUTOENCODER)
    assert run_prepare(tmp_path / "out", f"--features={autoencoder}") == 2
    assert f"--features={autoencoder}: it holds no DINOv2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.patch_size": 1}, "features have 16 patches an image, and .* 64 tokens"),
        ({"model.alignment_width": 16}, "model.alignment_width=16: .*latents have width 12"),
    ],
)
def test_a_network_for_other_features_is_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        train(config_of_latents("", fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()
