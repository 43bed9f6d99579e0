"""Cached latents that cannot be read: one line that names the file, at once or when it is read."""

import os
import re
import zipfile

import numpy as np
import pytest
from test_latent_caches import (
    CHANNELS,
    COUNT,
    ROWS,
    assert_rows,
    channels_first,
    edm2_name,
    npy,
    npz,
    random_moments,
    refused,
    write_classes,
    write_edm2,
    write_list,
    zipped,
)

from dmf.data import latent_caches
from dmf.data.latent_caches import open_cache

# What is refused when opening.


def broken(tmp_path, **changes):
    return write_edm2(tmp_path / "data", **changes)


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("no archive")
    refused(lambda: open_cache(""), "directory=:", "give the folder")
    refused(lambda: open_cache(tmp_path / "nowhere"), f"{tmp_path}/nowhere: ", "give the folder")
    refused(lambda: open_cache(tmp_path / "empty"), "no .npy or .npz", "give the folder")
    refused(lambda: open_cache(tmp_path / "text.zip"), "not a zip file")
    refused(lambda: open_cache("gs://bucket/latents"), "local disk")


def test_an_empty_class_folder(tmp_path):
    folder = write_classes(tmp_path / "data")
    (folder / "class 2 of none").mkdir()
    (folder / "class 2 of none/notes.txt").write_text("no row")
    refused(lambda: open_cache(folder), "'class 2 of none'", "fill")
    refused(lambda: open_cache(zipped(folder, tmp_path / "data.zip")), "'class 2 of none'")


@pytest.mark.parametrize("label", [-1, 2.5, "dog", None, True, [0, 1], 2**31, 1e400, float("nan")])
def test_labels_that_are_none(tmp_path, label):
    folder = broken(tmp_path)
    pairs = [[edm2_name(i), 0] for i in range(COUNT)]
    pairs[4][1] = label
    write_list(folder, pairs)
    refused(lambda: open_cache(folder), repr(edm2_name(4)), f"label {label} ", "whole number")


@pytest.mark.parametrize("write", [write_edm2, write_classes])
def test_labels_above_the_number_of_classes(tmp_path, write):
    folder = write(tmp_path / "data")
    name = edm2_name(1) if write is write_edm2 else "class 3/001.npy"
    assert open_cache(folder, num_classes=4).num_classes == 4
    refused(lambda: open_cache(folder, num_classes=3), repr(name), "label 3", "from 0 to 2")


@pytest.mark.parametrize("label", [-1, 4, 1.5, [1, 2]])
def test_invalid_labels_in_the_files_of_the_moments(tmp_path, label):
    save = npz(label=True)
    folder = write_classes(
        tmp_path / "data", labels=None, suffix="npz",
        save=lambda path, row, _: save(path, row, label if path.stem == "003" else 0),
    )  # fmt: skip
    cache = open_cache(folder, num_classes=4)
    cache.read([0, 1, 2, 4])
    refused(lambda: cache.read([2, 3]), "'003.npz'", f"label {label} ")
    refused(cache.labels, "'003.npz'", f"label {label} ")
    assert open_cache(folder, num_classes=0).read([3])["y"] == 0


@pytest.mark.parametrize("base", ["", "vae-sd/"])
def test_files_and_list_that_do_not_agree(tmp_path, base):
    folder = write_edm2(tmp_path / "data" / base)
    top = tmp_path / "data"
    (folder / edm2_name(3)).rename(tmp_path / "aside")
    refused(lambda: open_cache(top), f"{base + edm2_name(3)!r} is in dataset.json, but not there")
    (tmp_path / "aside").rename(folder / edm2_name(3))
    np.save(folder / "00000/extra.npy", channels_first(ROWS[0, 0]))
    refused(lambda: open_cache(top), f"'{base}00000/extra.npy' is there, but not in dataset.json")
    refused(lambda: open_cache(zipped(top, tmp_path / "data.zip")), f"'{base}00000/extra.npy'")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"labels": 3}', '{"labels": [["a"]]}', '{"labels": {"a": 1}}', "[" * 100000,
     '{"labels": [[1, 2]]}', '{"labels": [3]}'],
)  # fmt: skip
def test_a_list_that_is_none(tmp_path, text):
    folder = broken(tmp_path)
    (folder / "dataset.json").write_text(text)
    refused(lambda: open_cache(folder), "'dataset.json' is not", '{"labels": [[')


def test_a_list_that_names_a_file_twice(tmp_path):
    folder = broken(tmp_path)
    write_list(folder, [[edm2_name(i), 0] for i in [*range(COUNT), 2]])
    refused(lambda: open_cache(folder), "twice")


def test_a_list_above_the_folder_given(tmp_path):
    """Or below it: its labels must not be lost in silence."""
    write_edm2(tmp_path / "around/data")
    refused(lambda: open_cache(tmp_path / "around"), "'data/dataset.json'", "give its folder")


def test_folders_in_folders(tmp_path):
    """Such as train and val, which are no classes."""
    write_classes(tmp_path / "data/train")
    write_classes(tmp_path / "data/val")
    refused(lambda: open_cache(tmp_path / "data"), "'train/class 0/000.npy'", "folder of its class")


def test_rows_next_to_class_folders(tmp_path):
    folder = write_classes(tmp_path / "data")
    np.save(folder / "loose.npy", channels_first(ROWS[0, 0]))
    refused(lambda: open_cache(folder), "'loose.npy'", "folder of its class")


def test_npy_next_to_npz(tmp_path):
    folder = write_classes(tmp_path / "data", labels=None)
    npz()(folder / "005.npz", ROWS[0], 0)
    refused(lambda: open_cache(folder), "'005.npz' is next to '000.npy'")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.ones((8, 8, 8), "f"), "channels is not clear"),
        (np.ones((8, 3, 8), "f"), "channels is not clear"),
        (np.ones((3, 8, 8), "f"), "channels is not clear"),
        (np.ones((4, 4, 8), "f"), "channels is not clear"),
        (np.ones((8, 4, 8), "f"), "channels is not clear"),
        (np.ones((0, 8, 8), "f"), "channels is not clear"),
        (np.ones((1, 4, 8, 8), "f"), "[2c, h, w]"),
        (np.ones((8, 8), "f"), "[2c, h, w]"),
        (np.ones((4, 8, 8)), "float64"),
        (np.ones((4, 8, 8), np.int32), "int32"),
        (np.ones((4, 8, 8), bool), "bool"),
    ],
)
def test_arrays_that_are_no_rows(tmp_path, values, named):
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data/a.npy", values)
    np.save(tmp_path / "data/b.npy", values)
    refused(lambda: open_cache(tmp_path / "data"), "'a.npy'", named)


@pytest.mark.parametrize("names", ["mean", "std", "mean std mean_flip", "moments_flip", "latents"])
def test_an_npz_that_lacks_arrays(tmp_path, names):
    (tmp_path / "data").mkdir()
    arrays = dict.fromkeys(names.split(), np.ones((4, 8, 8), "f"))
    np.savez(tmp_path / "data/a.npz", **arrays)
    refused(lambda: open_cache(tmp_path / "data"), "'a.npz'", "moments+moments_flip", "mean+std")


def test_an_npz_with_halves_of_two_shapes(tmp_path):
    (tmp_path / "data").mkdir()
    arrays = {"mean": np.ones((2, 8, 8), "f"), "std": np.ones((4, 8, 8), "f")}
    np.savez(tmp_path / "data/a.npz", **arrays)
    refused(lambda: open_cache(tmp_path / "data"), "'a.npz'", "(2, 8, 8)", "(4, 8, 8)")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "label"])
def test_nothing_is_unpickled(tmp_path, name):
    objects = np.full((4, 8, 8), Bomb(tmp_path / "unpickled"), object)
    (tmp_path / "data").mkdir()
    if name == "label":
        np.savez(tmp_path / "data/a.npz", moments=channels_first(ROWS[0, 0]), label=objects[0, 0])
        refused(open_cache(tmp_path / "data").labels, "'a.npz'", "object")
    else:
        save = np.save if name == "a.npy" else np.savez
        save(tmp_path / "data" / name, **{"arr" if save is np.save else "moments": objects})
        refused(lambda: open_cache(tmp_path / "data"), repr(name), "object")
    assert not (tmp_path / "unpickled").exists()


# What is refused when reading.


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    ("row", "named"),
    [
        (random_moments(1)[0, :, :4, :4], ["(6, 4, 4)", "(6, 8, 8)", "mixed resolutions"]),
        (random_moments(1)[0].astype(np.float16), ["float16", "float32"]),
    ],
)
def test_rows_of_another_shape_or_dtype(tmp_path, suffix, row, named, monkeypatch):
    save = npz() if suffix == "npz" else npy(channels_first)
    folder = write_classes(tmp_path / "data", labels=None, save=save, suffix=suffix)
    save(folder / f"007.{suffix}", row, 0)
    monkeypatch.setattr(latent_caches, "CHECKED_FILES", 3)
    cache = open_cache(folder)
    cache.read([6, 8])
    refused(lambda: cache.read([6, 7]), f"'007.{suffix}'", f"'000.{suffix}'", *named)
    monkeypatch.setattr(latent_caches, "CHECKED_FILES", COUNT)
    refused(lambda: open_cache(folder), f"'007.{suffix}'", *named)


@pytest.mark.parametrize(
    "other", [npz(flip=True), npz(label=True), npz(halves=True)], ids=["flip", "label", "halves"]
)
def test_rows_with_other_arrays(tmp_path, other, monkeypatch):
    folder = write_classes(tmp_path / "data", labels=None, save=npz(), suffix="npz")
    other(folder / "007.npz", ROWS[0], 0)
    monkeypatch.setattr(latent_caches, "CHECKED_FILES", 1)
    cache = open_cache(folder)
    refused(lambda: cache.read([7]), "'007.npz'", "'000.npz'", "moments")


@pytest.mark.parametrize(
    ("channel", "value", "named"),
    [(0, np.nan, "finite"), (1, np.inf, "finite"), (CHANNELS, np.nan, "finite"),
     (-1, np.inf, "finite"), (CHANNELS, 0.0, "but 0:"), (-1, -7.5, "but -7.5:")],
)  # fmt: skip
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("halves", [False, True])
def test_values_that_are_no_moments(tmp_path, channel, value, named, side, halves):
    rows = ROWS.copy()
    rows[7, side, 3, 2, channel] = value
    save = npz(halves=halves, flip=True)
    cache = open_cache(write_classes(tmp_path / "data", rows, None, save, "npz"))
    cache.read([6, 8])
    refused(lambda: cache.read([6, 7, 8]), "'007.npz'", named)


def test_means_may_be_anything_finite(tmp_path):
    rows = ROWS.copy()
    rows[7, 0, ..., 0] = -3e38
    rows[7, 0, ..., 1] = 0
    assert_rows(open_cache(write_classes(tmp_path / "data", rows, None)), labels=None, rows=rows)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data[:200] + data[201:],
        lambda data: data[:200] + b"more" + data[200:],
        lambda data: data.replace(b"NUMPY", b"NUMPI"),
        lambda data: data.replace(b"{'descr'", b"{({[!''\""),
        lambda data: data.replace(b"(6, 8, 8)", b"(6,-8,-8)"),
    ],
    ids=["empty", "5", "100", "end", "less", "more", "magic", "header", "negative"],
)
def test_damaged_files(tmp_path, suffix, damage):
    save = npz() if suffix == "npz" else npy(channels_first)
    folder = write_classes(tmp_path / "data", labels=None, save=save, suffix=suffix)
    cache = open_cache(folder)
    path = folder / f"007.{suffix}"
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: cache.read([7]), f"'007.{suffix}'")


@pytest.mark.parametrize("header", [b"", b"\x93NUMPY\1\0", b"(6, 8, 8)", b"(-6, 8, 8)"])
def test_a_header_that_is_none(tmp_path, header):
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data/a.npy", channels_first(ROWS[0, 0]))
    data = (tmp_path / "data/a.npy").read_bytes()
    # Of the same length: the shape's place is before blanks.
    changed = data.replace(b"(6, 8, 8), }  ", b"(-6, 8, 8), } ") if b"-6" in header else header
    (tmp_path / "data/a.npy").write_bytes(changed)
    refused(lambda: open_cache(tmp_path / "data"), "'a.npy'")


def test_a_file_that_is_gone(tmp_path):
    folder = write_edm2(tmp_path / "data")
    cache = open_cache(folder)
    (folder / edm2_name(5)).unlink()
    refused(lambda: cache.read([5]), repr(edm2_name(5)), "No such file", "restore")


def test_an_archive_that_is_cut_short_or_changed(tmp_path):
    path = zipped(write_edm2(tmp_path / "data"), tmp_path / "data.zip", zipfile.ZIP_DEFLATED)
    cache = open_cache(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(lambda: cache.read(range(COUNT)), "img-mean-std", "damaged in the archive")
    path.write_bytes(re.sub(rb"[^P]", b"\xff", data))
    refused(lambda: cache.read([0]), edm2_name(0), "damaged in the archive")


def test_an_archive_packed_in_another_way(tmp_path):
    path = zipped(write_edm2(tmp_path / "data"), tmp_path / "data.zip", zipfile.ZIP_LZMA)
    refused(lambda: open_cache(path), "img-mean-std", "zip -0")


def test_an_encrypted_archive(tmp_path):
    path = zipped(write_edm2(tmp_path / "data"), tmp_path / "data.zip")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    refused(lambda: open_cache(path), "encrypted", "zip -0")
