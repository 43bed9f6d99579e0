"""Images of a folder or an archive: the same names, labels and pixels wherever they lie."""

import concurrent.futures
import gzip
import io
import json
import os
import pathlib
import pickle
import sys
import tarfile
import tracemalloc
import zipfile

import image_set
import numpy as np
import pytest
from etils import epath
from PIL import Image

from dmf.data.crop import center_crop
from dmf.data.image_files import ImageFiles, UnreadableImage, open_images
from dmf.typing import InputError

RNG = np.random.default_rng(0)
PIXELS = {
    name: image_set.colours(RNG, 20 + 3 * i, 30 - i)
    for i, name in enumerate((
        "ant/10.png", "ant/9.png", "ant/deep/er/1.PNG", "Bee/x.y.bmp", "Bee/é b,c.Png", "cow/1.png",
    ))
}
FILES = {
    name: image_set.saved(Image.fromarray(pixels), "bmp" if name.endswith("bmp") else "png")
    for name, pixels in PIXELS.items()
}
NAMES = ("Bee/x.y.bmp", "Bee/é b,c.Png", "ant/10.png", "ant/9.png", "ant/deep/er/1.PNG",
         "cow/1.png")
LABELS = {name: ("Bee", "ant", "cow").index(name.partition("/")[0]) for name in NAMES}
FLAT = {name.replace("/", "-"): data for name, data in FILES.items()}
BESIDES = {
    ".hidden/1.png": FILES["cow/1.png"],
    "ant/._10.png": b"of macOS",
    "__MACOSX/._1.png": b"of macOS",
    "README.md": b"Animals.",
    "cow/notes.txt": b"Moo.",
}


def as_json(labels: dict, **fields) -> bytes:
    return json.dumps({"labels": list(map(list, labels.items())), **fields}).encode()


def as_csv(labels: dict, header: str = "") -> bytes:
    quoted = [f'"{name}",{label}' if "," in name else f"{name},{label}"
              for name, label in labels.items()]
    return "\r\n".join([header, *quoted]).encode()


def folder(path: pathlib.Path, files: dict[str, bytes], top: str = "") -> str:
    for name, data in files.items():
        place = path / top / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    path.mkdir(exist_ok=True)
    return str(path)


def zipped(path, files, top="", how=zipfile.ZIP_STORED) -> str:
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(top + name)
            entry.extra = b"\x99\x99\4\0more"  # as other programs add times and owners
            archive.writestr(entry, data, how)
    return str(path)


def deflated(path, files, top="") -> str:
    return zipped(path, files, top, zipfile.ZIP_DEFLATED)


def zipped_as_it_comes(path, files, top="") -> str:
    """Written to a pipe: sizes stand behind the bytes, and folders have entries."""
    class Pipe(io.RawIOBase):
        def __init__(self):
            self.written = bytearray()

        def writable(self):
            return True

        def write(self, data):
            self.written += data
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for parent in sorted({str(pathlib.PurePosixPath(top + name).parent) for name in files}):
            archive.writestr(zipfile.ZipInfo(f"{parent}/"), b"")
        for name, data in files.items():
            archive.writestr(top + name, data)
    path = path.with_suffix(".zip")
    path.write_bytes(pipe.written)
    return str(path)


def tarred(path, files, top="", form=tarfile.PAX_FORMAT) -> str:
    path = path.with_suffix(".tar")
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(top + name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return str(path)


def tarred_folder(path, files, top="") -> str:
    """As `tar -cf` does it, with entries of folders."""
    root = pathlib.Path(folder(path, files, top))
    path = path.with_suffix(".tar")
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(root, ".")
    return str(path)


PACKED = (zipped, deflated, zipped_as_it_comes, tarred, tarred_folder)
PLACES = [(folder, "")] + [(pack, top) for pack in PACKED for top in ("", "./", "set/", "a/b c/")]
LAYOUTS = {
    "classes": FILES | BESIDES,
    "json": FILES | BESIDES | {"dataset.json": as_json(LABELS)},
    "csv": FILES | BESIDES | {"labels.csv": as_csv(LABELS)},
    "csv with a header": FILES | {"labels.csv": as_csv(LABELS, "file,label")},
    "csv of a spreadsheet": FILES | {"labels.csv": b"\xef\xbb\xbf" + as_csv(LABELS)},
    "json and csv": FILES | {"labels.csv": b"", "dataset.json": as_json(LABELS)},
    "unlabelled": FLAT | {"README.md": b"", ".1.png": b""},
}


def check(images: ImageFiles, layout: str) -> None:
    flat = layout == "unlabelled"
    names = tuple(sorted(FLAT)) if flat else NAMES
    assert images.names == names
    assert len(images) == len(FILES)
    if flat:
        assert images.labels is None
        assert images.class_names == ()
    else:
        assert images.labels.dtype == np.int64
        assert images.labels.tolist() == [LABELS[name] for name in NAMES]
        classes = ("Bee", "ant", "cow") if layout == "classes" else ("0", "1", "2")
        assert images.class_names == classes
    for i, name in enumerate(names):
        pixels = np.asarray(images.image(i))
        np.testing.assert_array_equal(pixels, PIXELS[name.replace("-", "/")])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("pack", "top"), PLACES, ids=lambda part: getattr(part, "__name__", part))
def test_the_same_files_are_the_same_images_everywhere(pack, top, layout, tmp_path):
    source = pack(tmp_path / "packed", LAYOUTS[layout], top)
    check(open_images(source), layout)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_what_lies_beside_the_folder_of_an_archive_does_not_matter(pack, tmp_path):
    files = {f"set/{name}": data for name, data in FILES.items()}
    beside = {"README.md": b"", "docs/method.md": b"", "__MACOSX/set/cow/._1.png": b"",
              ".trash/1.png": b""}
    check(open_images(pack(tmp_path / "packed", files | beside)), "classes")


def test_one_class_is_a_class_in_a_folder_and_none_in_an_archive(tmp_path):
    files = {name: data for name, data in FILES.items() if name.startswith("ant/")}
    images = open_images(folder(tmp_path / "set", files))
    assert (images.class_names, images.labels.tolist()) == (("ant",), [0, 0, 0])
    images = open_images(zipped(tmp_path / "packed", {k: files[k] for k in list(files)[:2]}))
    assert (images.class_names, images.labels) == ((), None)
    assert images.names == ("10.png", "9.png")


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_suffix_may_be_shouted(pack, tmp_path):
    source = pathlib.Path(pack(tmp_path / "packed", FILES))
    check(open_images(str(source.rename(source.with_suffix(source.suffix.upper())))), "classes")


def test_a_bucket_is_a_folder(tmp_path):
    folder(tmp_path / "bucket", LAYOUTS["json"])

    def there(original, path, *rest):
        return original(str(path).replace("gs://bucket", f"{tmp_path}/bucket"), *rest)

    kinds = dict.fromkeys(("exists", "isdir", "listdir", "open"), there)
    with epath.testing.mock_epath(**kinds):
        check(open_images("gs://bucket"), "json")
        folder(tmp_path / "bucket/elsewhere", {"other.csv": as_csv(LABELS)})
        check(open_images("gs://bucket", labels="gs://bucket/elsewhere/other.csv"), "json")


def test_links_to_folders_are_followed(tmp_path):
    folder(tmp_path / "all", FILES)
    (tmp_path / "some").mkdir()
    for name in ("ant", "Bee", "cow"):
        (tmp_path / "some" / name).symlink_to(tmp_path / "all" / name)
    check(open_images(str(tmp_path / "some")), "classes")


def test_order_is_that_of_code_points_and_not_of_the_disk(tmp_path, monkeypatch):
    source = folder(tmp_path / "set", FILES)
    listed = os.listdir
    names = set()
    for turn in (sorted, lambda found: sorted(found, reverse=True)):
        monkeypatch.setattr(os, "listdir", lambda path: turn(listed(path)))
        names.add(open_images(source).names)
    assert names == {NAMES}


def test_suffixes_need_not_be_true(tmp_path):
    """One of the photographs of ImageNet is a PNG, and some have the inks of print."""
    pixels = PIXELS["cow/1.png"]
    files = {"a/1.JPEG": FILES["cow/1.png"], "b/2.png": image_set.saved(
        Image.fromarray(pixels).convert("CMYK"), "jpeg")}
    images = open_images(folder(tmp_path / "set", files))
    np.testing.assert_array_equal(np.asarray(images.image(0)), pixels)
    assert images.image(1).mode == "CMYK"


# Labels files.


@pytest.mark.parametrize(
    ("pack", "top"),
    [(folder, ""), (deflated, ""), (deflated, "set/"), (tarred, ""), (tarred, "set/")],
)
def test_a_labels_file_that_is_named(pack, top, tmp_path):
    wrong = as_json(dict.fromkeys(LABELS, 0))
    files = FILES | {"dataset.json": wrong, "more/right.csv": as_csv(LABELS)}
    source = pack(tmp_path / "packed", files, top)
    outside = tmp_path / "outside.json"
    outside.write_bytes(as_json(LABELS))
    assert open_images(source).labels.tolist() == [0] * len(FILES)
    check(open_images(source, labels="more/right.csv"), "csv")
    check(open_images(source, labels=f"{top}more/right.csv"), "csv")
    check(open_images(source, labels=str(outside)), "json")


@pytest.mark.parametrize("top", ["", "set/", "./"])
def test_names_in_a_labels_file_may_have_the_folders_of_the_archive(top, tmp_path):
    source = zipped(tmp_path / "packed", FILES, "set/")
    outside = tmp_path / "labels.csv"
    outside.write_bytes(as_csv({top + name: label for name, label in LABELS.items()}))
    check(open_images(source, labels=str(outside)), "csv")


def test_the_layout_of_edm2_with_one_folder(tmp_path):
    """Whose folder is part of the names in dataset.json, which lies beside it."""
    files = {f"00000/img{i:08d}.png": data for i, data in enumerate(FILES.values())}
    labels = {name: i % 2 for i, name in enumerate(files)}
    for pack in (folder, zipped):
        images = open_images(pack(tmp_path / "set", files | {"dataset.json": as_json(labels)}))
        assert images.names == tuple(files)
        assert images.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_a_labels_file_may_say_that_there_are_none(tmp_path):
    files = FILES | {"one.png": FILES["cow/1.png"], "dataset.json": b'{"labels": null}'}
    images = open_images(folder(tmp_path / "set", files))
    assert images.labels is None
    assert images.class_names == ()
    assert len(images) == len(FILES) + 1


def test_names_of_classes_may_be_more_than_there_are_images_of(tmp_path):
    labels = dict.fromkeys(LABELS, 3) | {"cow/1.png": 1}
    names = ["none", "cow", "empty", "other", "more"]
    files = FILES | {"dataset.json": as_json(labels, class_names=names)}
    images = open_images(folder(tmp_path / "set", files))
    assert images.class_names == tuple(names)
    assert images.labels.tolist() == [3, 3, 3, 3, 3, 1]


# What cannot be opened.


def changed(*, cow) -> dict:
    """The labels of FILES, that of the only cow replaced."""
    return LABELS | {"cow/1.png": cow}


REFUSED = {
    "no images": ({"README.md": b"", ".1.png": b""}, ["no images", ".png", ".webp"]),
    "nothing": ({}, ["no images"]),
    "an empty class": (FILES | {"dog/notes.txt": b"Woof."}, ["class folder dog has no images"]),
    "images beside classes": (FILES | {"one.png": b""}, ["one.png", "labels file"]),
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


# Images that cannot be decoded.


def unreadable(images: ImageFiles, index: int = 0) -> UnreadableImage:
    with pytest.raises(UnreadableImage) as error:
        images.image(index)
    assert "\n" not in str(error.value)
    return error.value


def test_what_cannot_be_decoded_is_named(tmp_path):
    files = {"a/1.png": b"", "a/2.jpg": b"text", "a/3.png": FILES["cow/1.png"][:300]}
    images = open_images(folder(tmp_path / "set", files))
    errors = [unreadable(images, i) for i in range(3)]
    assert [error.name for error in errors] == list(files)
    assert str(errors[0]) == "a/1.png: is empty"
    assert str(errors[1]) == "a/2.jpg: is no BMP, GIF, JPEG, PNG or WebP file"
    assert "truncated" in errors[2].why
    assert isinstance(errors[0], ValueError)
    copy = pickle.loads(pickle.dumps(errors[2]))
    assert (copy.name, copy.why, str(copy)) == (errors[2].name, errors[2].why, str(errors[2]))


@pytest.mark.filterwarnings("error")
def test_an_image_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    images = open_images(folder(tmp_path / "set", FILES))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert unreadable(images).name == "Bee/x.y.bmp"
    assert "pixels" in unreadable(images).why


@pytest.mark.parametrize("pack", [zipped, deflated])
@pytest.mark.parametrize("place", [0, 500])
def test_bytes_that_the_archive_knows_to_be_wrong(pack, place, tmp_path):
    """A photograph can be decoded with many a bit wrong; the checksum tells."""
    photo = image_set.saved(Image.fromarray(image_set.colours(RNG, 60, 60)), "jpeg")
    path = pack(tmp_path / "packed", {"a/1.jpg": photo, "b/1.jpg": photo})

    def flipped(data):
        data[data.index(b"more") + len(b"more") + place] ^= 0b110
        return data

    images = open_images(with_bytes(path, flipped))
    assert str(unreadable(images)) == "a/1.jpg: is damaged in the archive"
    assert images.image(1).size == (60, 60)


def test_a_member_that_unfolds_to_more_than_it_claims(tmp_path):
    path = deflated(tmp_path / "packed", {"1.png": bytes(20_000_000)})

    def claim(data):
        place = data.index(b"PK\1\2") + 24
        data[place : place + 4] = (1000).to_bytes(4, "little")
        return data

    images = open_images(with_bytes(path, claim))
    tracemalloc.start()
    try:
        assert unreadable(images).why == "is damaged in the archive"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_is_gone_is_no_matter_of_the_image(tmp_path):
    images = open_images(folder(tmp_path / "set", FILES))
    (tmp_path / "set" / NAMES[0]).unlink()
    with pytest.raises(FileNotFoundError):
        images.image(0)


# Threads, and a set of real files.


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs")
    return path, image_set.make(path / "set", 100)


def crops(images: ImageFiles, workers: int) -> list[bytes]:
    def crop(index: int) -> bytes:
        try:
            return center_crop(images.image(index), image_set.SIDE).tobytes()
        except UnreadableImage as error:
            return error.name.encode()

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(crop, range(len(images))))


@pytest.fixture(scope="module")
def one_by_one(photographs):
    return crops(open_images(str(photographs[0] / "set")), 1)


@pytest.mark.parametrize("pack", [folder, deflated, tarred])
def test_threads_do_not_mix_images_up(pack, photographs, one_by_one, tmp_path):
    path, written = photographs
    files = {name: (path / "set" / name).read_bytes() for name in written.names}
    images = open_images(pack(tmp_path / "packed", files, "" if pack is folder else "set/"))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        assert crops(images, 8) == one_by_one
    finally:
        sys.setswitchinterval(interval)


def test_a_set_of_real_files(photographs, one_by_one):
    path, written = photographs
    images = open_images(str(path / "set"))
    assert images.names == written.names
    assert images.class_names == image_set.CLASSES
    np.testing.assert_array_equal(images.labels, written.labels)
    whole = image_set.SIDE**2 * 3
    wrong = [name for name, crop in zip(images.names, one_by_one, strict=True)
             if len(crop) != whole]
    assert wrong == [written.broken]
    assert len(set(one_by_one)) == len(written.names)


def test_the_set_of_real_files_is_the_same_each_time_and_of_every_kind(photographs, tmp_path):
    path, written = photographs
    again = image_set.make(tmp_path / "again", 100)
    other = image_set.make(tmp_path / "other", 100, seed=1)
    assert again.names == written.names == other.names
    for name in written.names:
        data = (path / "set" / name).read_bytes()
        assert data == (tmp_path / "again" / name).read_bytes()
        assert data != (tmp_path / "other" / name).read_bytes()
    assert len(set(written.kinds.values())) == 18
    sizes = [Image.open(path / "set" / name).size for name in written.names]
    assert 1 < min(map(min, sizes)) / image_set.SIDE < 1.3
    assert 4.5 < max(map(max, sizes)) / image_set.SIDE <= 5
    assert {width > height for width, height in sizes} == {True, False}


def test_images_may_go_to_another_process(photographs, one_by_one):
    images = open_images(str(photographs[0] / "set"))
    copy = pickle.loads(pickle.dumps(images))
    assert crops(copy, 1) == one_by_one


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux for open files")
@pytest.mark.parametrize("pack", [folder, deflated, tarred])
def test_no_file_stays_open(pack, tmp_path):
    images = open_images(pack(tmp_path / "packed", FILES))
    held = images.image(0)
    numbers = pathlib.Path("/proc/self/fd").iterdir()
    opened = [os.readlink(number) for number in numbers if number.is_symlink()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]
    held.load()
