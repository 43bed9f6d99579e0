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
from dmf import build, logs, preparation, shards
from dmf.alignment import PatchFeatures
from dmf.checkpoint import latest_step
from dmf.data.crop import center_crop
from dmf.data.image_files import open_images
from dmf.data.sources import open_source
from dmf.sharding import make_mesh
from dmf.training import train
from dmf.typing import InputError, RunError

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


def prepare(output: pathlib.Path, *flags: str) -> int:
    vae = tiny_exports.exported(tiny_exports.AUTOENCODER)
    return tiny.dmf("prepare", f"--source={images()}", f"--output={output}", f"--vae={vae}",
                    *FLAGS, *flags)  # fmt: skip


@functools.cache
def prepared() -> pathlib.Path:
    """Moments with crops and features beside them, of both sides."""
    folder = tiny.SCRATCH / "aligned"
    assert prepare(folder, f"--features={dinov2()}", *FEATURES) == 0
    return folder


def records(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*array_record*"))}


def config(encoder: str, more=None):
    """A run that aligns with the features of an encoder, or with stored ones."""
    made = tiny.config({
        "model.alignment_depth": 1, "model.alignment_width": 12, "model.alignment_hidden": 16,
        "alignment.encoder": encoder, "data.mirror": True, "run.log_every": 1,
        "run.checkpoint_every": 0, **(more or {}),
    }, objective=default.flow_matching(alignment_coefficient=0.5))  # fmt: skip
    return made


def of_latents(encoder: str, more=None):
    return config(encoder, {
        "data.directory": str(prepared()), "data.name": "latents", "model.channels": 4,
        "model.num_classes": len(image_set.CLASSES), "run.steps": 2, **(more or {}),
    })  # fmt: skip


def metric(workdir, name: str) -> list[float]:
    return [row[name] for row in logs.read_metrics(workdir)]


def test_what_is_stored_is_the_crop_and_its_features():
    rows = tfds.builder_from_directory(prepared()).as_data_source("train")
    files = open_images(str(images()))
    x, y, pixels = open_source("x", directory=str(prepared()), beside="images").read(range(3, 9))
    _, _, features = open_source("x", directory=str(prepared()), beside="features").read([3, 8])
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


def test_rows_that_are_not_kept_in_memory_are_read_as_those_that_are(monkeypatch):
    """And of several datasets together."""
    kept = open_source("x", directory=str(prepared()), beside="images")
    monkeypatch.setattr("dmf.data.sources.RESIDENT_BYTES", 0)
    read = open_source("x", directory=str(prepared()), beside="images")
    assert type(kept) is not type(read)
    made = of_latents("E", {"data.classes": (0, 2)})
    made.data.mixture = {"more": {"name": "latents", "directory": str(prepared())}}
    joined = build.source(made, "images")
    wanted = np.flatnonzero(np.isin(kept.labels(), (0, 2)))[[1, 4]].tolist()
    sources = ((kept, wanted), (read, wanted), (joined, [1, 4]))
    for values in zip(*(source.read(indices) for source, indices in sources), strict=True):
        np.testing.assert_array_equal(values[0], values[1])
        np.testing.assert_array_equal(values[0], values[2])


@pytest.fixture
def one_device(monkeypatch):
    """Runs are on one device, which is sooner."""
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(build, "mesh", lambda config: mesh)


@pytest.mark.slow
def test_computed_and_stored_features_give_the_same_losses(tmp_path, monkeypatch, one_device):
    """Up to the half precision of what is stored; computed in parts and on a mesh of all axes."""
    train(of_latents(""), tmp_path / "stored")
    monkeypatch.undo()
    split = {"accumulation": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    train(of_latents(str(dinov2()), split), tmp_path / "computed")
    for name in ("loss", "alignment_distance"):
        stored, computed = (metric(tmp_path / run, name) for run in ("stored", "computed"))
        np.testing.assert_allclose(stored, computed, rtol=2e-4)


def test_a_run_aligns_its_tokens_and_goes_on_bit_for_bit(tmp_path, one_device):
    made = config(str(dinov2()), {
        "run.steps": 24, "run.checkpoint_every": 12, "optimizer.learning_rate": 1e-2,
    })  # fmt: skip
    whole = train(made, tmp_path)
    distance = metric(tmp_path, "alignment_distance")
    assert np.mean(distance[-5:]) < np.mean(distance[:5]) - 0.2
    shutil.rmtree(tmp_path / "checkpoints/24")
    assert latest_step(tmp_path) == 12
    again = train(made, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    assert metric(tmp_path, "alignment_distance") == distance


def test_interrupted_and_started_again(tmp_path, monkeypatch):
    """The shards that are finished are kept; the bytes are those of an undisturbed run."""
    flags, write = (f"--features={dinov2()}", *FEATURES), shards.ShardWriter.__call__

    def stops(self, shard):
        if shard == 1:
            raise RunError("the machine is lost")
        return write(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(preparation.ShardWriter, "__call__", stops)
        assert prepare(tmp_path / "out", *flags) == 1
    assert len(records(tmp_path / "out")) == 1
    assert prepare(tmp_path / "out", *flags) == 0
    assert records(tmp_path / "out") == records(prepared())


def test_features_are_among_the_settings(capsys):
    before = records(prepared())
    capsys.readouterr()
    for flags in (FEATURES, (f"--features={dinov2()}", "--keep-images", "--features-side=8")):
        assert prepare(prepared(), *flags) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "it holds other work, whose alignment is {" in line
    assert records(prepared()) == before


def test_what_is_no_dinov2_is_refused(tmp_path, capsys):
    vae = tiny_exports.exported(tiny_exports.AUTOENCODER)
    assert prepare(tmp_path / "out", f"--features={vae}") == 2
    assert f"--features={vae}: it holds no DINOv2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model.patch_size": 1}, "features have 16 patches an image, and .* 64 tokens"),
        ({"model.alignment_width": 16}, "model.alignment_width=16: .*latents have width 12"),
    ],
)
def test_a_network_for_other_features_is_refused(tmp_path, fields, named):
    with pytest.raises(InputError, match=named):
        train(of_latents("", fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()
