"""Latents that another project cached: all layouts give the same rows; errors name the file."""

import collections
import concurrent.futures
import json
import os
import threading
import zipfile

import numpy as np
import pytest

from dmf.data import archives, latent_caches
from dmf.data.datasets import Dataset
from dmf.data.latent_caches import open_cache
from dmf.errors import InputError

COUNT, SIDE, CHANNELS, CLASSES = 12, 8, 3, 4
LABELS = np.array([0, 3, 1, 2, 2, 0, 1, 3, 0, 1, 2, 3])
SHUFFLED = [7, 0, 11, 3, 3, 5]
RANDOM = np.random.default_rng(0)


def random_moments(count: int = COUNT, views: int = 2, dtype=np.float32) -> np.ndarray:
    """Moments [n, f, h, w, 2c] of which every value is another one; std is above 0."""
    moments = RANDOM.normal(size=(count, views, SIDE, SIDE, 2 * CHANNELS))
    moments[..., CHANNELS:] = np.exp(moments[..., CHANNELS:])
    return moments.astype(dtype)


ROWS = random_moments()


def channels_first(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, -1, 0)


def channels_last(values: np.ndarray) -> np.ndarray:
    return values


def edm2_name(i: int, folder_of: int = 5) -> str:
    """A file name as EDM2 numbers files, but with few files a folder, so that there are several."""
    number = 1000 * (i // folder_of) + i % folder_of
    return f"{number:08d}"[:5] + f"/img-mean-std-{number:08d}.npy"


def write_edm2(folder, rows=ROWS, labels=LABELS, names=None):
    """EDM2's layout; the order of the list is not that of the names."""
    names = names or [edm2_name(i) for i in range(len(rows))]
    for name, row in zip(names, rows, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, channels_first(row[0]))
    if labels is not None:
        pairs = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        write_list(folder, pairs[::-1])
    return folder


def write_list(folder, pairs) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))


def write_classes(folder, rows=ROWS, labels=LABELS, save=None, suffix="npy"):
    """A folder a class, or all in one folder without labels."""
    save = save or (lambda path, row, label: np.save(path, channels_first(row[0])))
    for i, row in enumerate(rows):
        place = folder if labels is None else folder / f"class {labels[i]}"
        place.mkdir(parents=True, exist_ok=True)
        save(place / f"{i:03d}.{suffix}", row, 0 if labels is None else labels[i])
    return folder


def npz(order=channels_first, *, halves=False, flip=False, label=False, save=np.savez):
    """A function that writes a row as an .npz."""

    def write(path, row, number):
        arrays = {}
        for side, end in list(zip(row, ("", "_flip"), strict=True))[: 1 + flip]:
            mean, std = np.split(side, 2, axis=-1)
            names = {"mean": mean, "std": std} if halves else {"moments": side}
            arrays |= {name + end: order(values) for name, values in names.items()}
        if label:
            arrays["label"] = number
        save(path, **arrays)

    return write


def npy(order, copy=np.ascontiguousarray):
    return lambda path, row, label: np.save(path, copy(order(row[0])))


def zipped(folder, target, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return target


def assert_rows(cache, views: int = 1, labels=LABELS, rows=ROWS, by_class: bool = False) -> None:
    """Checks that a cache holds the rows, read in any order."""
    order = np.argsort(LABELS, kind="stable") if by_class else np.arange(len(rows))
    rows = rows[order, :views]
    labels = np.zeros(len(rows), int) if labels is None else np.asarray(labels)[order]
    assert len(cache) == len(rows)
    assert (cache.views, *cache.shape[1:]) == cache.shape == rows.shape[1:]
    for indices in (range(len(rows)), SHUFFLED):
        read = cache.read(indices)
        moments, y = read["x"], read["y"]
        assert moments.dtype == rows.dtype
        assert y.dtype == np.int32
        np.testing.assert_array_equal(moments, rows[list(indices)])
        np.testing.assert_array_equal(y, labels[list(indices)])
    np.testing.assert_array_equal(cache.labels(), labels)
    assert cache.labels().dtype == np.int64


def refused(action, *named: str) -> str:
    """The one line of what is refused, which names all of these."""
    with pytest.raises(InputError) as error:
        action()
    line = str(error.value)
    assert line.startswith("directory=")
    assert "\n" not in line
    assert all(part in line for part in named), line
    return line


# Layouts.


def test_files_are_read_at_once(tmp_path, monkeypatch):
    """Each waits until as many as there are threads are being read."""
    count = latent_caches.READ_THREADS
    rows = random_moments(count)
    cache = open_cache(write_edm2(tmp_path, rows, np.arange(count)))
    together, read = threading.Barrier(count, timeout=20), archives.Folder.read

    def wait_and_read(*arguments):
        together.wait()
        return read(*arguments)

    monkeypatch.setattr(archives.Folder, "read", wait_and_read)
    np.testing.assert_array_equal(cache.read(range(count))["x"][:, 0], rows[:, 0])


def test_no_thread_is_started_for_a_batch_and_all_end_with_the_cache(tmp_path, started):
    cache = open_cache(write_edm2(tmp_path))
    for _ in range(latent_caches.READ_THREADS + 1):
        cache.read(SHUFFLED)
    assert 1 <= len(started) <= latent_caches.READ_THREADS
    del cache
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("packed", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("base", ["", "vae-sd"])
def test_the_layout_of_edm2_and_repa(tmp_path, base, packed):
    write_edm2(tmp_path / "data" / base)
    (tmp_path / "data/images/00000").mkdir(parents=True)
    (tmp_path / "data/images/00000/img00000000.png").write_bytes(b"not looked at")
    (tmp_path / "data/images/dataset.json").write_text("not looked at")
    if base:
        (tmp_path / "data/features.npy").write_bytes(b"not looked at")
    path = tmp_path / "data"
    if packed is not None:
        path = zipped(path, tmp_path / "data.zip", packed)
    cache = open_cache(path)
    assert_rows(cache)
    assert cache.num_classes == CLASSES
    assert cache.name == path.name
    assert isinstance(cache, Dataset)


@pytest.mark.parametrize("labels", ["null", "no list"])
@pytest.mark.parametrize("as_zip", [False, True])
def test_edm2_without_labels(tmp_path, labels, as_zip):
    folder = write_edm2(tmp_path / "data", labels=None)
    if labels == "null":
        write_list(folder, None)
    cache = open_cache(zipped(folder, tmp_path / "data.zip") if as_zip else folder)
    assert_rows(cache, labels=None)
    assert cache.num_classes == 0


def test_edm2_puts_channels_first_even_where_the_sizes_do_not_tell(tmp_path):
    small = ROWS[:, :, :4, :4]
    cache = open_cache(write_edm2(tmp_path / "data", small))
    assert_rows(cache, rows=small)


def test_names_with_backslashes(tmp_path):
    folder = write_edm2(tmp_path / "data")
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace("/", "\\\\"))
    assert_rows(open_cache(folder))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("order", [channels_first, channels_last])
@pytest.mark.parametrize(
    ("suffix", "views", "save"),
    [
        ("npy", 1, npy),
        ("npy", 1, lambda order: npy(order, np.asfortranarray)),
        ("npz", 1, npz),
        ("npz", 2, lambda order: npz(order, flip=True)),
        ("npz", 1, lambda order: npz(order, halves=True)),
        ("npz", 2, lambda order: npz(order, halves=True, flip=True)),
        ("npz", 2, lambda order: npz(order, halves=True, flip=True, save=np.savez_compressed)),
    ],
    ids=["npy", "fortran", "moments", "moments_flip", "halves", "halves_flip", "compressed"],
)
def test_a_file_a_row(tmp_path, flat, as_zip, order, suffix, views, save):
    labels = None if flat else LABELS
    folder = write_classes(tmp_path / "data", labels=labels, save=save(order), suffix=suffix)
    (folder / "README.md").write_text("not looked at")
    (folder / ".cache").mkdir()
    (folder / ".cache/._000.npy").write_bytes(b"not looked at")
    cache = open_cache(zipped(folder, tmp_path / "data.zip") if as_zip else folder)
    assert_rows(cache, views, labels, by_class=not flat)
    assert cache.num_classes == (0 if flat else CLASSES)


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f2", ">f4"])
def test_values_stay_as_they_are_stored(tmp_path, dtype):
    rows = ROWS.astype(dtype)
    cache = open_cache(write_classes(tmp_path / "data", rows, labels=None))
    assert cache.read([0])["x"].dtype.isnative
    assert_rows(cache, labels=None, rows=rows.astype(np.dtype(dtype).newbyteorder("=")))


def test_labels_in_the_files_of_the_moments(tmp_path):
    """They are read from all files, but only when all labels are asked for."""
    save = npz(label=True)
    folder = write_classes(
        tmp_path / "data", labels=None, suffix="npz",
        save=lambda path, row, _: save(path, row, [LABELS[int(path.stem)]]),
    )  # fmt: skip
    assert_rows(open_cache(folder))
    assert open_cache(folder).num_classes == CLASSES
    assert open_cache(folder, num_classes=10).num_classes == 10


def test_folders_and_labels_in_files_must_agree(tmp_path):
    good = write_classes(tmp_path / "good", save=npz(label=True), suffix="npz")
    assert_rows(open_cache(good), by_class=True)
    save = npz(label=True)
    bad = write_classes(
        tmp_path / "bad", suffix="npz", save=lambda path, row, label: save(path, row, label + 1)
    )
    cache = open_cache(bad)
    refused(lambda: cache.read([0]), "'class 0/000.npz'", "the label 1", "says 0")


def test_a_number_of_classes_may_be_given(tmp_path):
    folder = write_edm2(tmp_path / "data")
    assert open_cache(folder, num_classes=1000).num_classes == 1000
    unlabelled = open_cache(folder, num_classes=0)
    assert unlabelled.num_classes == 0
    assert_rows(unlabelled, labels=None)


# Reading.


@pytest.mark.parametrize("as_zip", [pytest.param(False, marks=pytest.mark.slow), True])
def test_several_threads_read_at_once(tmp_path, as_zip):
    folder = write_edm2(tmp_path / "data")
    cache = open_cache(zipped(folder, tmp_path / "data.zip") if as_zip else folder)
    wanted = [RANDOM.integers(0, COUNT, 9).tolist() for _ in range(60)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for indices, rows in zip(wanted, pool.map(cache.read, wanted), strict=True):
            np.testing.assert_array_equal(rows["x"], ROWS[indices, :1])
            np.testing.assert_array_equal(rows["y"], LABELS[indices])


def test_no_file_stays_open(tmp_path):
    folder = write_edm2(tmp_path / "data")
    before = len(os.listdir("/proc/self/fd"))
    caches = [open_cache(folder), open_cache(zipped(folder, tmp_path / "data.zip"))]
    for cache in caches:
        cache.read(range(COUNT))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("packed", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_opening_reads_a_few_headers(tmp_path, monkeypatch, packed):
    """All bytes after the headers may be cut off, and most files may be empty."""
    rows = np.repeat(ROWS, 10, axis=0)
    folder = write_edm2(tmp_path / "data", rows, labels=np.repeat(LABELS, 10))
    read = collections.Counter()

    def counting(of):
        def wrapped(self, name, size=-1):
            data = of(self, name, size)
            read[name] += len(data)
            return data

        return wrapped

    for files in (archives.Folder, archives.Archive):
        monkeypatch.setattr(files, "read", counting(files.read))
    open_cache(zipped(folder, tmp_path / "whole.zip", packed) if packed is not None else folder)
    del read["dataset.json"]
    assert 2 <= len(read) <= latent_caches.CHECKED_FILES
    assert max(read.values()) == 10 + 128
    for path in folder.rglob("*.npy"):
        name = str(path.relative_to(folder))
        path.write_bytes(path.read_bytes()[:128] if name in read else b"")
    cut = zipped(folder, tmp_path / "cut.zip", packed) if packed is not None else folder
    cache = open_cache(cut)
    assert len(cache) == len(rows)
    refused(lambda: cache.read([0]), edm2_name(0), "damaged")
    refused(lambda: cache.read([1]), edm2_name(1), "damaged")
