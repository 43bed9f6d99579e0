"""Images of a folder or an archive: the same names, labels and pixels wherever they lie."""

import io
import json
import os
import pathlib
import tarfile
import zipfile

import image_set
import numpy as np
import pytest
from etils import epath
from PIL import Image

from dmf.data.image_files import ImageFiles, open_images

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
OTHER_FILES = {
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
    "classes": FILES | OTHER_FILES,
    "json": FILES | OTHER_FILES | {"dataset.json": as_json(LABELS)},
    "csv": FILES | OTHER_FILES | {"labels.csv": as_csv(LABELS)},
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
def test_files_next_to_the_folder_of_an_archive_do_not_matter(pack, tmp_path):
    files = {f"set/{name}": data for name, data in FILES.items()}
    surroundings = {"README.md": b"", "docs/method.md": b"", "__MACOSX/set/cow/._1.png": b"",
              ".trash/1.png": b""}
    check(open_images(pack(tmp_path / "packed", files | surroundings)), "classes")


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
    for turn in (sorted, lambda names: sorted(names, reverse=True)):
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
    """Whose folder is part of the names in dataset.json, which lies next to it."""
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
