"""Sources of images that cannot be opened: one line that says why."""

import gzip
import pathlib
import tarfile
import zipfile

import pytest
from test_image_files import FILES, LABELS, as_csv, as_json, check, deflated, folder, tarred, zipped

from dmf.data.image_files import open_images
from dmf.errors import InputError

# What cannot be opened.


def changed(*, cow) -> dict:
    """The labels of FILES, that of the only cow replaced."""
    return LABELS | {"cow/1.png": cow}


REFUSED = {
    "no images": ({"README.md": b"", ".1.png": b""}, ["no images", ".png", ".webp"]),
    "nothing": ({}, ["no images"]),
    "an empty class": (FILES | {"dog/notes.txt": b"Woof."}, ["class folder dog has no images"]),
    "images next to classes": (FILES | {"one.png": b""}, ["one.png", "labels file"]),
}
REFUSED_LABELS = {
    "missing": (as_json(LABELS | {"cow/7.png": 1}), ["cow/7.png", "no image of the source"]),
    "unnamed": (as_json(dict(list(LABELS.items())[1:])), ["no label for Bee/x.y.bmp (1 such"]),
    "negative": (as_json(changed(cow=-3)), ["cow/1.png", "-3", "whole number"]),
    "fraction": (as_json(changed(cow=2.5)), ["cow/1.png", "2.5", "whole number"]),
    "truth": (as_json(changed(cow=True)), ["cow/1.png", "True", "whole number"]),
    "word": (as_json(changed(cow="2")), ["cow/1.png", "'2'", "whole number"]),
    "vector": (as_json(changed(cow=[0, 1])), ["cow/1.png", "[0, 1]", "whole number"]),
    "gap": (as_json(changed(cow=10**15)), ["no image has the label 2", "class_names"]),
    "gap at the start": (as_json({n: i + 1 for n, i in LABELS.items()}), ["the label 0"]),
    "too few names": (as_json(LABELS, class_names=["a", "b"]), ["label 2", "2 names"]),
    "no names": (as_json(LABELS, class_names=[1, 2, 3]), ["1 in its", "class_names", "string"]),
    "one name": (as_json(LABELS, class_names="abc"), ["class_names", "lists"]),
    "no table": (b"[]", ['{"labels": [["file", 3]']),
    "no labels": (b"{}", ['{"labels": [["file", 3]']),
    "no list": (b'{"labels": 3}', ["lists"]),
    "no pairs": (b'{"labels": [["cow/1.png"]]}', ["['cow/1.png'] in it is not"]),
    "no names of files": (b'{"labels": [[1, 1]]}', ["[1, 1] in it is not"]),
    "no json": (b'{"labels":\n [[', ["line 2"]),
    "two lines": (as_json(LABELS | {"cow/\n7.png": 1}), ["cow/ 7.png"]),
    "much too deep": (b"[" * 100_000, ["recursion"]),
    "no text": (b"\xff\xfe\x00", ["utf-8"]),
    "two labels": (
        as_json(LABELS)[:-2] + b', ["cow/1.png", 0]]}', ["cow/1.png has two labels, 2 and 0"]
    ),
}
REFUSED_TABLES = {
    "missing": (as_csv(LABELS | {"cow/7.png": 1}), ["cow/7.png", "no image of the source"]),
    "unnamed": (as_csv({"cow/1.png": 0}), ["no label for Bee/x.y.bmp (5 such"]),
    "negative": (as_csv(changed(cow=-3)), ["cow/1.png", "-3", "whole number"]),
    "fraction": (as_csv(changed(cow=2.0)), ["cow/1.png", "'2.0'", "whole number"]),
    "word": (as_csv(changed(cow="cow")), ["cow/1.png", "'cow'", "whole number"]),
    "word at once": (b"cow/1.png,cow", ["cow/1.png", "'cow'", "whole number"]),
    "empty": (as_csv(changed(cow="")), ["cow/1.png", "''", "whole number"]),
    "long": (as_csv(changed(cow="9" * 10_000)), ["cow/1.png", "9999", "whole number"]),
    "three columns": (b"cow/1.png,1,2", ["'cow/1.png,1,2' in it is not file,label"]),
    "one column": (b"cow/1.png", ["'cow/1.png' in it is not file,label"]),
    "one field without end": (b'"' + b"a" * 200_000, ["field"]),
}


def refusal(source: str, labels: str = "") -> str:
    with pytest.raises(InputError) as error:
        open_images(source, labels=labels)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(source)
    return str(error.value)


@pytest.mark.parametrize("pack", [folder, deflated, tarred])
@pytest.mark.parametrize("case", REFUSED)
def test_files_that_cannot_be_a_set(case, pack, tmp_path):
    files, named = REFUSED[case]
    source = pack(tmp_path / "packed", files)
    line = refusal(source)
    assert line.startswith(f"source={source}: ")
    assert all(part in line for part in named), line


@pytest.mark.parametrize("case", REFUSED_LABELS)
def test_labels_that_cannot_be(case, tmp_path):
    data, named = REFUSED_LABELS[case]
    line = refusal(folder(tmp_path / "set", FILES | {"dataset.json": data}))
    assert line.startswith("labels=dataset.json: ")
    assert all(part in line for part in named), line


@pytest.mark.parametrize("case", REFUSED_TABLES)
def test_tables_that_cannot_be(case, tmp_path):
    data, named = REFUSED_TABLES[case]
    line = refusal(tarred(tmp_path / "set", FILES | {"labels.csv": data}, "set/"))
    assert line.startswith("labels=labels.csv: ")
    assert all(part in line for part in named), line


@pytest.mark.parametrize("labels", ["none.json", "cow", "/nowhere/labels.csv"])
def test_a_labels_file_that_is_not_there(labels, tmp_path):
    line = refusal(folder(tmp_path / "set", FILES), labels)
    assert line.startswith(f"labels={labels}: no such file")
    assert "no such file" in refusal(str(tmp_path / "set"), str(tmp_path))


def test_a_labels_file_of_another_kind(tmp_path):
    line = refusal(folder(tmp_path / "set", FILES | {"labels.xml": b""}), "labels.xml")
    assert line == "labels=labels.xml: give a .json or a .csv"


def test_an_empty_folder_of_a_class(tmp_path):
    source = folder(tmp_path / "set", FILES)
    (tmp_path / "set/dog/puppies").mkdir(parents=True)
    assert "class folder dog has no images" in refusal(source)
    with zipfile.ZipFile(zipped(tmp_path / "packed", FILES), "a") as archive:
        archive.writestr(zipfile.ZipInfo("dog/"), b"")
    assert "class folder dog has no images" in refusal(str(tmp_path / "packed.zip"))
    with tarfile.open(tarred(tmp_path / "packed", FILES), "a") as archive:
        entry = tarfile.TarInfo("dog")
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
    assert "class folder dog has no images" in refusal(str(tmp_path / "packed.tar"))


@pytest.mark.parametrize("source", ["", "/nowhere", "/nowhere/set.zip"])
def test_a_source_that_is_not_there(source):
    assert refusal(source) == f"source={source}: there is no such folder or archive"


@pytest.mark.parametrize("suffix", [".rar", ".png", ""])
def test_a_source_of_another_kind(suffix, tmp_path):
    path = tmp_path / f"set{suffix}"
    path.write_bytes(FILES["cow/1.png"])
    assert "give a folder, a .zip or an uncompressed .tar" in refusal(str(path))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_a_compressed_tar(suffix, tmp_path):
    path = tmp_path / f"set{suffix}"
    path.write_bytes(gzip.compress(pathlib.Path(tarred(tmp_path / "plain", FILES)).read_bytes()))
    line = refusal(str(path))
    assert "uncompress it to a .tar" in line


def with_bytes(path: str, change) -> str:
    data = bytearray(pathlib.Path(path).read_bytes())
    pathlib.Path(path).write_bytes(change(data))
    return path


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_an_archive_that_is_none_or_not_whole(pack, tmp_path):
    path = pack(tmp_path / "packed", FILES)
    whole = pathlib.Path(path).read_bytes()
    ends = [0, 100, 512, 700, len(whole) // 2]
    if pack is tarred:  # Where a header or the mark of the end would begin.
        with tarfile.open(path) as archive:
            ends += [-(-entry.size // 512) * 512 + entry.offset_data for entry in archive]
    for end in ends:
        line = refusal(with_bytes(path, lambda data, end=end: whole[:end]))
        assert line.startswith(f"source={path}: cannot be read: ")
    assert "cannot be read" in refusal(with_bytes(path, lambda data: b"no archive" * 1000))


def test_a_tar_with_a_broken_header_does_not_end_there(tmp_path):
    path = tarred(tmp_path / "packed", FILES)
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset

    def broken(data):
        data[third + 150] ^= 1  # in the checksum
        return data

    assert "damaged or cut short" in refusal(with_bytes(path, broken))


def test_a_tar_may_be_filled_up_with_anything(tmp_path):
    path = tarred(tmp_path / "packed", FILES)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]

    def filled(data):
        data[last.offset_data + last.size] = 1
        return data

    assert last.size % 512
    check(open_images(with_bytes(path, filled)), "classes")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar_are_not_lost_in_silence(kind, tmp_path):
    path = tarred(tmp_path / "packed", FILES)
    with tarfile.open(path, "a") as archive:
        entry = tarfile.TarInfo("cow/2.png")
        entry.type, entry.linkname = kind, "cow/1.png"
        archive.addfile(entry)
    line = refusal(path)
    assert "cow/2.png in it is a link" in line
    assert "--dereference" in line


def test_members_of_a_zip_that_cannot_be_read_by_themselves(tmp_path):
    path = zipped(tmp_path / "packed", FILES, how=zipfile.ZIP_BZIP2)
    assert "neither stored nor deflated" in refusal(path)

    def encrypted(data):
        data[data.index(b"PK\1\2") + 8] |= 1
        return data

    assert "encrypted" in refusal(with_bytes(zipped(tmp_path / "other", FILES), encrypted))
