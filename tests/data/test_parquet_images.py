"""Images in parquet files, as the Hugging Face hub stores them: splits, columns, and bad files."""

import errno
import json
import pathlib
import sys
import types

import image_set
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmf.data.datasets import open_dataset
from dmf.data.image_files import UnreadableImage
from dmf.data.image_transforms import load_pixels
from dmf.data.parquet_images import ParquetImages
from dmf.data.prepare import prepare
from dmf.data.raw_images import RawImages, open_raw_images
from dmf.data.shard_writer import PrepareSettings
from dmf.errors import InputError, RunError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
FILES = [image_set.saved(Image.fromarray(pixels), "png") for pixels in PIXELS]
LABELS = [2, 0, 1, 1, 2, 0, 0]
NAMES = ["apple", "bread", "cloud"]
FEATURES = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"},
            "id": {"dtype": "int64", "_type": "Value"}}  # fmt: skip


def write(path: pathlib.Path, rows=range(7), *, features=FEATURES, drop=(), **columns):
    """A file of some rows; its row groups have two rows."""
    struct = [{"bytes": FILES[i], "path": f"{i}.png"} for i in rows]
    table = pa.table({"id": list(rows), "image": struct, "label": [LABELS[i] for i in rows]}
                     | columns).drop_columns(list(drop))
    stated = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(stated if features else {}), path,
                   row_group_size=2)
    return path


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A split in two files, and another split."""
    write(tmp_path / "data/train-00000-of-00002-0a1b.parquet", range(4))
    write(tmp_path / "data/train-00001-of-00002-2c3d.parquet", range(4, 7))
    write(tmp_path / "data/test-00000-of-00001.parquet", [5])
    (tmp_path / "README.md").write_text("")
    return tmp_path


def refused(message: str, source, **options) -> None:
    with pytest.raises(InputError, match=message) as error:
        open_raw_images(str(source), **options)
    assert "\n" not in str(error.value)


def test_rows_come_in_the_order_of_the_files(folder):
    images = open_raw_images(str(folder))
    assert isinstance(images, ParquetImages) and isinstance(images, RawImages)
    assert images.labels.tolist() == LABELS
    assert images.class_names == tuple(NAMES)
    assert images.names[3:5] == ["train-00000-of-00002-0a1b.parquet/3",
                                 "train-00001-of-00002-2c3d.parquet/0"]
    for i in (6, 0, 1, 5, 3, 2, 4):
        np.testing.assert_array_equal(load_pixels(images.open(i)), PIXELS[i])
    assert len(images.files._loaded) == 4, "row groups are not kept in bounded memory"
    test = open_raw_images(str(folder), split="test")
    assert test.labels.tolist() == [0] and len(test.class_names) == 3


def test_a_file_or_a_folder_of_a_split(folder, tmp_path):
    path = folder / "data/test-00000-of-00001.parquet"
    assert open_raw_images(str(path)).labels.tolist() == [0]
    write(tmp_path / "other/plain/train/0000.parquet", [4], features={})
    refused("no image has the label 0, but one has 2: number the classes", tmp_path / "other")
    images = open_raw_images(str(tmp_path / "other"), class_count=3)
    assert images.labels.tolist() == [2] and len(images.class_names) == 3


def test_other_columns(tmp_path):
    path = write(tmp_path / "a.parquet", img=FILES, fine_label=LABELS, drop=("image", "label"),
                 features={})
    images = open_raw_images(str(path))
    assert images.labels is None and images.class_names == ()
    np.testing.assert_array_equal(load_pixels(images.open(2)), PIXELS[2])
    images = open_raw_images(str(path), image_column="img", label_column="fine_label")
    assert images.labels.tolist() == LABELS
    assert open_raw_images(str(write(path)), label_column="none").labels is None
    two = FEATURES | {"id": FEATURES["label"]}
    path = write(path, range(3), features=two)
    refused("^label-column=: give one of label, id$", path)
    assert open_raw_images(str(path), label_column="id").labels.tolist() == [0, 1, 2]


def test_a_dataset_is_prepared_and_resumed(folder, tmp_path):
    images = open_raw_images(str(folder / "data"))
    settings = PrepareSettings(resolution=8, shard_size=3, batch_size=8)
    assert not prepare(images, tmp_path / "out", settings, process=0, processes=2)
    assert prepare(images, tmp_path / "out", settings)
    rows = open_dataset("latents", directory=str(tmp_path / "out")).read(range(7))
    np.testing.assert_array_equal(rows["x"], PIXELS)
    assert rows["y"].tolist() == LABELS


def test_splits_and_columns_are_listed(folder, tmp_path):
    refused(r"^split=val: .* has the splits test \(1 files\), train \(2 files\)$", folder,
            split="val")
    columns = r"the columns are id \(int64\), image \(struct.*\), label \(int64\)$"
    refused(rf"^image-column=picture: .* no such column of files of images; {columns}", folder,
            image_column="picture")
    refused(rf"^label-column=image: .* column of whole numbers; {columns}", folder,
            label_column="image")
    path = write(tmp_path / "a.parquet", drop=["image"])
    refused(r"^image-column=: .* of which there is none; the columns are id \(int64\), l", path)
    path = write(tmp_path / "a.parquet", a=FILES, b=FILES, drop=["image"])
    refused("^image-column=: give the column that holds the files of images; the columns", path)
    write(tmp_path / "twice/a/train.parquet"), write(tmp_path / "twice/b/train.parquet")
    refused("^source=.*split train is in several folders, a, b: give one, as .*/twice/b$",
            tmp_path / "twice")


def test_bad_files(folder, tmp_path):
    refused("a.parquet/1 has the label 3: labels are whole numbers from 0 to 2; correct",
            write(tmp_path / "a.parquet", label=[0, 3, 1, 1, 1, 1, 1]))
    refused("a.parquet/2 has no label: give each row one, or --label-column=none$",
            write(tmp_path / "a.parquet", label=[0, 1, None, 1, 1, 1, 1]))
    refused("^num-classes=5: the files name 3 classes; leave it out$", folder, class_count=5)
    refused("^num-classes=3: the images have no labels; leave it out$", folder, class_count=3,
            label_column="none")
    refused("^labels-file=a.csv: it has no effect on parquet files", folder, labels="a.csv")
    refused("^source=.*/none.parquet: there is no such folder or file$", tmp_path / "none.parquet")
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "empty.parquet")
    refused("it has no rows$", tmp_path / "empty.parquet")
    write(folder / "data/train-00001-of-00002-2c3d.parquet", label=[1.0] * 7)
    refused("2c3d.parquet: its column label is double, and int64 in the first file", folder)
    path = folder / "data/train-00000-of-00002-0a1b.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    refused("^source=.*0a1b.parquet: it is no whole parquet file .*; copy it again$", folder)


def test_one_file_is_open_at_a_time(folder, monkeypatch):
    """There may be more files than a process can open."""
    opened = []

    class File(pq.ParquetFile):
        def __init__(self, path):
            if not all(file.closed for file in opened):
                raise OSError(errno.EMFILE, f"Failed to open {path}: Too many open files")
            super().__init__(path)
            opened.append(self)

    monkeypatch.setattr(pq, "ParquetFile", File)
    assert open_raw_images(str(folder)).labels.tolist() == LABELS
    with File(folder / "data/test-00000-of-00001.parquet"):
        refused("^source=.*0a1b.parquet: it cannot be read .Too many open files.$", folder)


def test_a_row_without_an_image_is_one_that_cannot_be_read(tmp_path):
    missing = [{"bytes": None, "path": "0.png"}, {"bytes": b"no", "path": "1.png"}]
    path = write(tmp_path / "a.parquet", [0, 1], image=missing)
    images = open_raw_images(str(path))
    for i, reason in enumerate(["is empty", "is no BMP, GIF, JPEG, PNG or WebP file"]):
        with pytest.raises(UnreadableImage, match=f"^a.parquet/{i}: {reason}$"):
            images.open(i)
    path.unlink()
    with pytest.raises(RunError, match="a.parquet: a file of the dataset is missing or damaged"):
        (open_raw_images(str(write(path))) and path.unlink()) or images.files._loaded.clear()
        images.open(0)


def test_large_row_groups_are_refused(folder, monkeypatch):
    monkeypatch.setattr("dmf.data.parquet_images.MAX_GROUP_BYTES", 100)
    refused(r"a row group of its images has \S+ bytes, and the most are 100: write it", folder)


def test_pyarrow_is_an_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(r"^source=\S+: it needs pyarrow; pip install pyarrow$", folder)


def fake_hub(monkeypatch, folder: pathlib.Path) -> list[list[str]]:
    """Replaces the hub by a folder; returns which files were downloaded."""
    wanted: list[list[str]] = []

    def list_repo_files(self, repository, repo_type):
        assert (repository, repo_type) == ("someone/images", "dataset")
        return [str(path.relative_to(folder)) for path in folder.rglob("*.*")]

    def snapshot_download(repository, repo_type, allow_patterns):
        wanted.append(allow_patterns)
        return str(folder)

    api = type("HfApi", (), {"list_repo_files": list_repo_files})
    hub = types.SimpleNamespace(HfApi=api, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return wanted


def test_the_files_of_a_split_are_downloaded(folder, monkeypatch):
    wanted = fake_hub(monkeypatch, folder)
    assert open_raw_images("hf:someone/images", split="test").labels.tolist() == [0]
    assert open_raw_images("hf:someone/images/data").labels.tolist() == LABELS
    assert wanted == [["data/test-00000-of-00001.parquet"],
                      [f"data/train-0000{i}-of-00002-{end}.parquet"
                       for i, end in enumerate(("0a1b", "2c3d"))]]
    refused("^source=hf:someone/images/dat: it holds no .parquet files$", "hf:someone/images/dat")
    refused("^source=hf:someone: give hf:OWNER/DATASET$", "hf:someone")
    refused("^split=val: hf:someone/images has the splits test", "hf:someone/images", split="val")
    refused("^source=hf:x/y: it cannot be downloaded .*; without a network, give a folder",
            "hf:x/y")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(r"^source=hf:x/y: it needs huggingface_hub \(pip install it\)$", "hf:x/y")
