"""Latents as LightningDiT stores them: rows, labels, and bad files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dmf.data.batch_transform import BatchTransform
from dmf.data.datasets import Dataset, open_dataset, stored_name
from dmf.data.latent_shards import LatentShards, open_latent_shards
from dmf.errors import InputError
from dmf.models.encoders.latent_scaling import LatentScaling

DRAW = np.random.default_rng(0).standard_normal
LATENTS, FLIPPED = DRAW((7, 3, 4, 5)).astype("f"), DRAW((7, 3, 4, 5)).astype("f")
LABELS = np.array([2, 0, 1, 1, 4, 0, 0])


def shard(folder, number: int, rows: slice, **changes):
    """A file of some samples; a change of None leaves an array out."""
    arrays = {"latents": LATENTS[rows], "latents_flip": FLIPPED[rows], "labels": LABELS[rows]}
    arrays = {name: np.ascontiguousarray(value) for name, value in (arrays | changes).items()
              if value is not None}
    path = folder / f"latents_rank00_shard{number:03}.safetensors"
    save_file(arrays, path, metadata={"total_size": "3"})
    return path


@pytest.fixture
def folder(tmp_path):
    shard(tmp_path, 0, slice(0, 4)), shard(tmp_path, 1, slice(4, 7))
    return tmp_path


def refused(folder, message: str, **options) -> None:
    with pytest.raises(InputError, match=message) as error:
        opened = open_dataset("cache", directory=str(folder), **options)
        opened.read(range(len(opened)))
    assert str(error.value).startswith(f"directory={folder}: 'latents_rank00_shard00")
    assert "\n" not in str(error.value)


def test_rows_of_all_shards(folder):
    assert stored_name(str(folder)) == "cache"
    dataset = open_dataset("cache", directory=str(folder))
    assert isinstance(dataset, LatentShards) and isinstance(dataset, Dataset)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (7, (2, 4, 5, 6), 5)
    assert dataset.labels().tolist() == LABELS.tolist()
    chosen = [6, 0, 4, 3, 3]
    rows = dataset.read(chosen)
    assert rows["y"].dtype == np.int32 and rows["y"].tolist() == LABELS[chosen].tolist()
    for view, stored in enumerate((LATENTS, FLIPPED)):
        mean, std = np.split(rows["x"][:, view], 2, axis=-1)
        np.testing.assert_array_equal(mean, np.moveaxis(stored[chosen], 1, -1))
        assert not std.any()


def test_samples_are_scaled_by_channel(folder):
    scaling = LatentScaling(mean=(1.0, 2.0, 3.0), std=(0.5, 2.0, 4.0))
    stored = jnp.asarray(open_latent_shards(folder).read([5])["x"])
    x = BatchTransform(scaling=scaling, mirror=False).samples(jax.random.key(0), stored)
    expected = (np.moveaxis(LATENTS[5:6], 1, -1) - [1, 2, 3]) / [0.5, 2, 4]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


def test_labels_and_mirror_images_may_be_absent(tmp_path):
    shard(tmp_path, 0, slice(0, 4), labels=None, latents_flip=None, latents=LATENTS.astype("f2"))
    dataset = open_latent_shards(tmp_path)
    assert (dataset.shape, dataset.num_classes) == ((1, 4, 5, 6), 0)
    rows = dataset.read([1, 6])
    assert rows["x"].dtype == np.float16 and rows["y"].tolist() == [0, 0]
    shard(tmp_path, 0, slice(0, 4), labels=np.array([0, 9, 99, 999]))
    assert open_latent_shards(tmp_path, num_classes=1000).num_classes == 1000
    assert open_latent_shards(tmp_path, num_classes=0).known_labels is None


def test_latents_of_two_autoencoders_are_not_mixed(folder):
    shard(folder, 1, slice(4, 7), latents=LATENTS[:3, :2], latents_flip=FLIPPED[:3, :2])
    held = r"latents\+latents_flip\+labels \({}, 4, 5\) F32"
    refused(folder, f"it holds {held.format(2)}, but 'latents_.*' {held.format(3)}: keep latents")
    shard(folder, 1, slice(4, 7), latents_flip=None)
    refused(folder, r"it holds latents\+labels \(3, 4, 5\) F32, but")


def test_bad_files(folder):
    refused(folder, "the label of row 0 is 4: labels are from 0 to 3; correct it", num_classes=4)
    path = shard(folder, 1, slice(4, 7), labels=np.array([0, -1, 0]))
    refused(folder, "shard001.safetensors': the label of row 1 is -1: labels are from 0 to")
    for changes, message in (
        ({"labels": LABELS[:2]}, r"its labels are \[2\] I64: give 3 whole numbers"),
        ({"labels": np.zeros(3, "f")}, r"its labels are \[3\] F32: give 3 whole numbers"),
        ({"latents": None}, "it holds labels, latents_flip, and no latents: give a folder of"),
        ({"latents": LATENTS[:3, 0], "latents_flip": None}, r"it holds latents \(3, 4, 5\) F32: "),
        ({"latents": LATENTS[:3].astype(int)}, r"latents \(3, 3, 4, 5\) I64, latents_flip"),
        ({"latents": LATENTS[:2]}, r"latents \(2, 3, 4, 5\) F32, latents_flip \(3, "),
        ({"latents": np.where(np.arange(3)[:, None, None, None] == 1, np.nan, LATENTS[:3])
          .astype("f")}, "shard001.safetensors': its latents of row 1 are not all finite"),
    ):
        shard(folder, 1, slice(4, 7), **changes)
        refused(folder, message)
    path.write_bytes(path.read_bytes()[:-8])
    refused(folder, "shard001.safetensors': is no whole safetensors file .*: copy it again$")
