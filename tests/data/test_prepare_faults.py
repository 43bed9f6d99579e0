"""`dmf prepare` after a crash, a full disk or a hand in its output; and what it says at its end."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
import tiny
from array_record.python import array_record_module

from dmf.data import prepare as prepare_module
from dmf.data import shard_writer
from dmf.data.image_files import UnreadableImage, open_images
from dmf.data.prepare import prepare
from dmf.data.shard_writer import PrepareSettings
from dmf.errors import InputError, RunError
from dmf.runtime import files

SETTINGS = PrepareSettings(resolution=8, shard_size=4, batch_size=8)
SHARD = "latents-train.array_record-0000{}-of-00003"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of two classes, for three shards."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(12):
        path = folder / ("cats" if i < 5 else "dogs") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(np.full((9, 9, 3), 20 * i, np.uint8)).save(path)
    return open_images(str(folder))


@pytest.fixture(scope="module")
def prepared(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "out"
    assert prepare(images, folder, SETTINGS)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def emptied(path):
    path.write_bytes(b"")


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def halved(path):
    os.truncate(path, path.stat().st_size // 2)


def of_fewer_records(path):
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    writer.write(bytes(2000))
    writer.close()


def cut(path):
    os.truncate(path, path.stat().st_size - 7)


@pytest.mark.parametrize(("name", "damage", "said"), [
    (SHARD.format(1), lambda path: path.unlink(), "shard 1 or its report is damaged"),
    (SHARD.format(1), emptied, "shard 1 or its report is damaged"),
    (SHARD.format(1), cut, "shard 1 or its report is damaged"),
    (SHARD.format(1), halved, "shard 1 or its report is damaged"),
    (SHARD.format(1), of_fewer_records, "shard 1 or its report is damaged"),
    (SHARD.format(1), zeroed, "shard 1 or its report is damaged"),
    ("shards/00001.json", lambda path: path.unlink(), "2 of the 3 shards"),
    ("shards/00001.json", emptied, "shard 1 or its report is damaged"),
    ("shards/00001.json", lambda path: path.write_text("[]"), "shard 1 or its report is damaged"),
    ("shards/00001.json", lambda path: path.write_text('{"length": 4}'), "its report is damaged"),
    ("preparation.json", emptied, "preparation.json is damaged; all shards are to be written"),
    ("preparation.json", lambda path: path.write_text("{}"), "0 of the 3 shards"),
    ("labels.npy", emptied, "3 of the 3 shards"),
    ("dataset_info.json", emptied, "3 of the 3 shards"),
], ids=range(14))  # fmt: skip
def test_what_is_lost_or_damaged_is_made_again(
    images, prepared, tmp_path, capsys, name, damage, said
):
    folder = shutil.copytree(prepared, tmp_path / "out")
    damage(folder / name)
    assert prepare(images, folder, SETTINGS)
    assert contents(folder) == contents(prepared)
    assert said in capsys.readouterr().err


def test_a_shard_that_another_process_lost_is_not_reported_as_prepared(
    images, prepared, tmp_path, capsys
):
    folder = shutil.copytree(prepared, tmp_path / "out")
    (folder / "dataset_info.json").unlink()
    (folder / SHARD.format(1)).unlink()
    assert not prepare(images, folder, SETTINGS, process=0, processes=2)
    said = capsys.readouterr().err
    assert "2 of 3 shards are finished; the dataset is complete when the other processes" in said
    assert "prepared" not in said.splitlines()[-1]
    assert not (folder / "dataset_info.json").exists()
    assert prepare(images, folder, SETTINGS, process=1, processes=2)
    assert contents(folder) == contents(prepared)


def test_a_shard_is_on_the_disk_before_its_report(images, tmp_path, monkeypatch):
    """Otherwise a power failure could leave the report of a shard that is empty."""
    events = []

    def synced(sync):
        def record(path):
            events.append(path.name)
            sync(path)
        return record

    for module in (files, shard_writer, prepare_module):
        monkeypatch.setattr(module, "sync", synced(module.sync))
    prepare(images, tmp_path / "out", SETTINGS)
    order = [name for name in events if "00001" in name]
    assert order[0].startswith(f".{SHARD.format(1)}.")
    assert order[1].startswith(".00001.json")
    info = events.index("dataset_info.json")
    assert info > max(i for i, name in enumerate(events) if "array_record" in name)
    assert "features.json" in events[:info]
    for name in (".preparation.json", ".labels.npy"):
        assert any(event.startswith(name) for event in events[:info])


def test_two_commands_of_one_process_number_do_not_write_at_once(
    images, prepared, tmp_path, monkeypatch
):
    """The second is refused; where no lock holds, as in buckets, both write whole shards."""
    out, write = tmp_path / "out", shard_writer.ShardWriter._crops

    def second(writer, indices):
        monkeypatch.setattr(shard_writer.ShardWriter, "_crops", write)
        with pytest.raises(InputError, match=f"^output={out}: another command is writing there"):
            prepare(images, out, SETTINGS)
        with monkeypatch.context() as patch:
            patch.setattr(prepare_module, "owned", lambda *_: contextlib.nullcontext())
            assert prepare(images, out, SETTINGS)
        yield from write(writer, indices[:2])
        raise KeyboardInterrupt

    (out / "shards").mkdir(parents=True)
    (out / f".{SHARD.format(1)}.partial").write_text("left by a killed command")
    monkeypatch.setattr(shard_writer.ShardWriter, "_crops", second)
    with pytest.raises(KeyboardInterrupt):
        prepare(images, out, SETTINGS)
    assert contents(out) == contents(prepared)


def test_labels_of_a_complete_dataset_are_never_cut_short(images, prepared, tmp_path, monkeypatch):
    folder = shutil.copytree(prepared, tmp_path / "out")

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "sync", stop)
    monkeypatch.setattr(files, "sync", stop)
    (folder / "labels.npy").write_bytes(labels := b"whole")
    with pytest.raises(KeyboardInterrupt):
        prepare(images, folder, SETTINGS)
    assert (folder / "labels.npy").read_bytes() == labels


@pytest.mark.parametrize("step", range(6))
def test_after_a_full_disk_the_same_command_resumes(images, prepared, tmp_path, monkeypatch, step):
    """Whichever file did not fit, and where a partial one stayed."""
    full = OSError(28, "No space left on device")
    writes = iter([None] * step + [full])

    def sync(path):
        error = next(writes, None)
        if error is not None:
            raise error

    with monkeypatch.context() as patch:
        for module in (files, shard_writer, prepare_module):
            patch.setattr(module, "sync", sync)
        with pytest.raises(RunError, match="no space left to write .*run the same command again"):
            prepare(images, tmp_path / "out", SETTINGS)
    assert prepare(images, tmp_path / "out", SETTINGS)
    assert contents(tmp_path / "out") == contents(prepared)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_full_disk_at_the_end_leaves_no_dataset(images, prepared, tmp_path, monkeypatch):
    def write_metadata(**arguments):
        (arguments["data_dir"] / "features.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tfds.folder_dataset, "write_metadata", write_metadata)
        with pytest.raises(RunError, match="no space left to write"):
            prepare(images, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out/dataset_info.json").exists()
    assert not list((tmp_path / "out").glob(".*"))
    assert prepare(images, tmp_path / "out", SETTINGS)
    assert contents(tmp_path / "out") == contents(prepared)


def test_an_output_among_the_images_is_refused_in_python_too(images, tmp_path):
    with pytest.raises(InputError, match="it lies in source="):
        prepare(images, f"{images.source}/cats/out", SETTINGS)


@pytest.mark.parametrize(("names", "message"), [
    (("crane", "dog", "crane "), "the classes 0 and 2 have one name, 'crane'; give each a name of"),
    (("a", "caf\udce9"), r"the class 1 has the name 'caf\\udce9'; give it a name of one line of U"),
    (("a", "\ud800"), r"the class 1 has the name '\\ud800'; give it a name of one line of UTF-8$"),
    (("a\nb",), r"the class 0 has the name 'a\\nb'; give it a name of one line of UTF-8$"),
    (("a", " "), "the class 1 has the name ' '; give it a name of one line of UTF-8$"),
])  # fmt: skip
def test_class_names_that_cannot_be_stored_are_refused_first(images, tmp_path, names, message):
    named = dataclasses.replace(images, class_names=names, labels=images.labels % len(names))
    with pytest.raises(InputError, match=f"^source={images.source}: {message}"):
        prepare(named, tmp_path / "out", SETTINGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flag", "said"), [
    ("--dtype=nonsense", "--dtype=nonsense: it has no effect without --autoencoder or --features"),
    ("--nomirror", "--mirror=False: it has no effect without --autoencoder or --features"),
    ("--keep-images", "--keep-images=True: it has no effect without --autoencoder"),
    ("--features-side=-3", "--features-side=-3: it has no effect without --features"),
    ("--protocol=bogus", "--protocol=bogus: it has no effect without --reference"),
    ("--inception=/nowhere", "--inception=/nowhere: it has no effect without --reference"),
    ("--dinov2=/nowhere", "--dinov2=/nowhere: it has no effect without --reference"),
])
def test_flags_without_an_effect(images, tmp_path, capsys, flag, said):
    flags = [f"--source={images.source}", f"--output={tmp_path}/out", "--resolution=8", flag]
    assert tiny.dmf("prepare", *flags) == 2
    assert capsys.readouterr().err == f"dmf prepare: {said}; leave it out\n"
    assert list(tmp_path.iterdir()) == []


def test_it_says_what_is_there_and_what_is_next(images, tmp_path, capsys):
    source = shutil.copytree(images.source, tmp_path / "images")
    for name in ("cats/a.tif", "dogs/b.tif", "cats/.DS_Store", "dogs/broken.png"):
        (source / name).write_bytes(b"")
    flags = [f"--source={source}", f"--output={tmp_path}/my out", "--resolution=8", "--name=mine"]
    assert tiny.dmf("prepare", *flags, "--batch-size=8", "--shard-size=4") == 0
    lines = capsys.readouterr().err.strip().splitlines()
    left_out = ("; left out: hidden files or folders: 1 (cats/.DS_Store); "
                "files that are no images (.tif): 2 (cats/a.tif, dogs/b.tif)")
    assert lines[0] == f"13 images in 4 shards{left_out}"
    assert lines[-2] == (
        f"12 images prepared in {tmp_path}/my out: 2 classes (cats 5, dogs 7), 0.0 MiB; 1 could "
        f"not be read (preparation.json names them){left_out}"
    )
    stored = json.loads((tmp_path / "my out/preparation.json").read_text())
    assert stored["left_out"]["files that are no images (.tif)"] == {
        "count": 2, "files": ["cats/a.tif", "dogs/b.tif"],
    }
    assert lines[-1].startswith("next: dmf train ")
    command = shlex.split(lines[-1].removeprefix("next: "))
    fields = dict(flag.removeprefix("--config.").split("=") for flag in command[4:])
    assert fields == {"data.directory": f"{tmp_path}/my out"}  # It states its sizes.


def test_of_many_classes_it_says_how_many_and_the_smallest(tmp_path, capsys):
    for i in range(12):
        for j in range(1 + (i != 7)):
            path = tmp_path / "images" / f"c{i:02}" / f"{j}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    prepare(open_images(str(tmp_path / "images")), tmp_path / "out", SETTINGS)
    assert "12 classes of 1 to 2 images (fewest: c07), " in capsys.readouterr().err


def test_images_without_labels_are_said_to_be(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    PIL.Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "images/1.png")
    prepare(open_images(str(tmp_path / "images")), tmp_path / "out", SETTINGS)
    assert "1 images prepared in" in (said := capsys.readouterr().err)
    assert "out: no labels, 0.0 MiB" in said


class Lost:
    """Images whose disk went away."""

    names, labels, class_names, source, left_out = ("a", "b"), None, (), "lost", {}

    def __len__(self) -> int:
        return 2

    def file_size(self, index: int) -> int:
        return 0

    def open(self, index: int):
        raise FileNotFoundError("no such file")


def test_a_lost_disk_is_no_unreadable_image(tmp_path):
    with pytest.raises(RunError, match="a is not there any more"):
        prepare(Lost(), tmp_path / "out", PrepareSettings(resolution=8))
    assert not list((tmp_path / "out").glob("latents-*"))


class Broken(Lost):
    """Images of which none can be read."""

    def open(self, index: int):
        raise UnreadableImage(self.names[index], "it is broken")


def test_nothing_but_unreadable_images(tmp_path):
    with pytest.raises(RunError, match="none of the 2 images could be read"):
        prepare(Broken(), tmp_path / "out", PrepareSettings(resolution=8))
    assert not (tmp_path / "out/dataset_info.json").exists()


def test_a_full_disk_says_so(tmp_path, monkeypatch, images):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "write_json", full)
    with pytest.raises(RunError, match="no space left to write"):
        prepare(images, tmp_path / "out", PrepareSettings(resolution=8))
