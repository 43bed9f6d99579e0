"""Many images as files: every form holds the same ones, and work that was interrupted goes on."""

import io
import json
import os
import pathlib

import numpy as np
import PIL.Image
import pytest
import tiny
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from dmf import outputs
from dmf.data.image_files import open_images
from dmf.data.image_sets import open_image_set
from dmf.generation import Generated
from dmf.protocols import labels_of
from dmf.typing import InputError, RunError

COUNT, SIZE = 22, 6
LABELS = np.array([(7 * i + i // 5) % 4 for i in range(COUNT)], np.int32)
NAMES = ("images.npz", "images.array_record", "images")
over_forms = pytest.mark.parametrize("name", NAMES)


def pixels(indices: np.ndarray, labels: np.ndarray, channels: int = 3) -> np.ndarray:
    """Images [n, 4, 5, channels] that tell index and label."""
    places = np.arange(20 * channels).reshape(1, 4, 5, channels)
    column = (len(indices), 1, 1, 1)
    return ((places * 3 + indices.reshape(column) * 7 + labels.reshape(column) * 61) % 256).astype(
        np.uint8
    )


class Maker:
    """Makes images, notes what it was asked for, and may be interrupted."""

    def __init__(self, *, calls: int = 10**6, bad: tuple[int, ...] = (), channels: int = 3):
        self.asked: list[list[int]] = []
        self._calls, self._bad, self._channels = calls, bad, channels

    def __call__(self, indices: np.ndarray, labels: np.ndarray) -> Generated:
        if len(self.asked) == self._calls:
            raise KeyboardInterrupt
        assert indices.shape == labels.shape == (SIZE,)
        self.asked.append(indices.tolist())
        made = pixels(indices, labels, self._channels)
        return Generated(made, ~np.isin(indices, self._bad))


def write(output: pathlib.Path, maker: Maker, labels: np.ndarray = LABELS, identity="a") -> None:
    outputs.write_images(output, maker, labels, chunk_size=SIZE, devices=1, identity=identity,
                         part_chunks=1)


def interrupted(output: pathlib.Path, calls: int, **settings) -> None:
    """Work that ended after some parts."""
    with pytest.raises(KeyboardInterrupt):
        write(output, Maker(calls=calls), **settings)
    assert not output.exists()


def stored(output: pathlib.Path) -> dict[str, bytes]:
    """Every byte of an output."""
    files = sorted(output.iterdir()) if output.is_dir() else [output]
    return {file.name: file.read_bytes() for file in files}


def decoded(data: bytes) -> np.ndarray:
    image = np.asarray(PIL.Image.open(io.BytesIO(data)))
    return image.reshape(*image.shape[:2], -1)


def read(output: pathlib.Path) -> tuple[np.ndarray, list[int]]:
    """Images and labels of any form."""
    if output.suffix == ".npz":
        with np.load(output) as file:
            assert sorted(file.files) == ["arr_0", "labels"]
            return file["arr_0"], file["labels"].tolist()
    if output.suffix == ".array_record":
        with ArrayRecordDataSource(os.fspath(output)) as source:
            examples = [tf_example_pb2.Example.FromString(record) for record in source]
        features = [example.features.feature for example in examples]
        assert all(sorted(feature) == ["image", "label"] for feature in features)
        images = [decoded(feature["image"].bytes_list.value[0]) for feature in features]
        return np.stack(images), [feature["label"].int64_list.value[0] for feature in features]
    found = open_images(str(output))
    assert found.names == tuple(f"{i:06}.png" for i in range(len(found)))
    images = [decoded(found.read(name)) for name in found.names]
    return np.stack(images), found.labels.tolist()


@over_forms
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, SIZE - 1, SIZE, SIZE + 1, COUNT, 3 * SIZE])
def test_every_form_holds_the_same_images(tmp_path, count, channels, name):
    output, labels = tmp_path / "deep" / "er" / name, np.sort(LABELS)[:count]
    maker = Maker(channels=channels)
    write(output, maker, labels)
    images, found = read(output)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, pixels(np.arange(count), labels, channels))
    assert found == labels.tolist()
    starts = range(0, count, SIZE)
    assert maker.asked == [list(range(start, start + SIZE)) for start in starts]
    assert [path.name for path in output.parent.iterdir()] == [name]


def test_an_archive_of_arrays_is_read_without_copies(tmp_path):
    write(tmp_path / "images.npz", Maker())
    found = open_image_set(str(tmp_path / "images.npz"))
    assert isinstance(found.array, np.memmap)
    np.testing.assert_array_equal(found.read(np.arange(COUNT)), pixels(np.arange(COUNT), LABELS))
    np.testing.assert_array_equal(found.labels(), LABELS)


def test_a_folder_has_images_and_their_labels(tmp_path):
    write(tmp_path / "images", Maker())
    names = [f"{i:06}.png" for i in range(COUNT)]
    assert sorted(stored(tmp_path / "images")) == [*names, "dataset.json"]
    listed = json.loads((tmp_path / "images" / "dataset.json").read_text())["labels"]
    assert listed == [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]
    found = open_image_set(str(tmp_path / "images"))
    assert found.notes == ""
    np.testing.assert_array_equal(found.read(np.arange(COUNT)), pixels(np.arange(COUNT), LABELS))


def test_a_folder_of_a_few_classes_can_be_read(tmp_path):
    labels = np.array([3, 5, 3], np.int32)
    write(tmp_path / "images", Maker(), labels)
    assert open_images(str(tmp_path / "images")).labels.tolist() == [3, 5, 3]


# Interruptions.


@over_forms
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_work_goes_on_where_it_was_interrupted(tmp_path, calls, name):
    write(tmp_path / "whole" / name, Maker())
    output, maker = tmp_path / "parts" / name, Maker()
    interrupted(output, calls)
    write(output, maker)
    assert [indices[0] for indices in maker.asked] == [SIZE * i for i in range(calls, 4)]
    assert stored(output) == stored(tmp_path / "whole" / name)
    assert [path.name for path in output.parent.iterdir()] == [name]


@over_forms
def test_work_that_ended_while_it_wrote_goes_on(tmp_path, monkeypatch, name):
    write(tmp_path / "whole" / name, Maker())
    output, maker = tmp_path / "parts" / name, Maker()
    form = outputs.FORMS[output.suffix]

    def broken(output, paths, labels):
        form(output, [*paths[:-1], output.parent / "nothing"], labels)

    with monkeypatch.context() as changed:
        changed.setitem(outputs.FORMS, output.suffix, broken)
        with pytest.raises(RunError, match="nothing: No such file"):
            write(output, Maker())
    assert not output.exists()
    write(output, maker)
    assert maker.asked == []
    assert stored(output) == stored(tmp_path / "whole" / name)
    assert [path.name for path in output.parent.iterdir()] == [name]


def test_a_part_that_was_half_written_is_made_again(tmp_path):
    output, maker = tmp_path / "images.npz", Maker()
    interrupted(output, 2)
    (parts,) = tmp_path.iterdir()
    whole = sorted(path for path in parts.iterdir() if path.suffix == ".npy")
    assert len(whole) == 2
    whole[1].rename(whole[1].with_name(f".{whole[1].name}"))
    (parts / f".{whole[1].name}").write_bytes(b"\x93NUMPY")
    write(output, maker)
    assert [indices[0] for indices in maker.asked] == [6, 12, 18]
    np.testing.assert_array_equal(read(output)[0], pixels(np.arange(COUNT), LABELS))


@over_forms
@pytest.mark.parametrize("change", ["identity", "count"])
def test_other_images_begin_anew(tmp_path, change, name):
    output, maker = tmp_path / name, Maker()
    other = {"labels": LABELS[::-1].copy(), "identity": ["b", {"seed": 1}]}
    if change == "count":
        other = {"labels": LABELS[::-1][:-1].copy(), "identity": "a"}
    interrupted(output, 3)
    write(output, maker, **other)
    assert [indices[0] for indices in maker.asked] == [0, 6, 12, 18]
    count = len(other["labels"])
    np.testing.assert_array_equal(read(output)[0], pixels(np.arange(count), other["labels"]))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_parts_of_which_nothing_is_known_are_not_taken(tmp_path):
    """As an interruption leaves them that falls into the removal of the parts."""
    output = tmp_path / "images.npz"
    interrupted(output, 3)
    next(tmp_path.rglob("work.json")).unlink()
    labels = LABELS[::-1].copy()
    write(output, Maker(), labels, identity="b")
    np.testing.assert_array_equal(read(output)[0], pixels(np.arange(COUNT), labels))


def test_two_outputs_beside_each_other_are_apart(tmp_path):
    first, second = tmp_path / "images.npz", tmp_path / "images"
    interrupted(first, 2)
    maker = Maker()
    write(second, maker)
    assert len(maker.asked) == 4
    maker = Maker()
    write(first, maker)
    assert len(maker.asked) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "images.npz"]
    np.testing.assert_array_equal(read(first)[0], read(second)[0])


# What is refused.


@over_forms
@pytest.mark.parametrize(("bad", "words"), [((1,), "1 of images 0 to 5 .* the first of them 1$"),
                                            ((20, 21, 22), "2 of images 18 to 21 .*them 20$"),
                                            ((5, 6, 8), "1 of images 0 to 5 .*them 5$")])
def test_images_that_are_not_finite_are_none(tmp_path, bad, words, name):
    with pytest.raises(RunError, match=words) as error:
        write(tmp_path / name, Maker(bad=bad))
    assert "\n" not in str(error.value)
    assert not (tmp_path / name).exists()
    write(tmp_path / name, Maker())
    np.testing.assert_array_equal(read(tmp_path / name)[0], pixels(np.arange(COUNT), LABELS))


@over_forms
def test_what_is_beyond_the_last_image_may_be_anything(tmp_path, name):
    write(tmp_path / name, Maker(bad=(22, 23)))
    assert len(read(tmp_path / name)[0]) == COUNT


def test_a_folder_that_is_not_empty_is_left_as_it_was(tmp_path):
    output, maker = tmp_path / "images", Maker()
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=f"^output={output}: it is a folder, and not an empty"):
        write(output, maker)
    assert stored(output) == {"mine.txt": b"mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=f"^output={tmp_path}/file: it is a file"):
        write(tmp_path / "file", maker)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "images"]
    assert maker.asked == []


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "images").mkdir()
    write(tmp_path / "images", Maker())
    assert len(read(tmp_path / "images")[0]) == COUNT


def test_a_form_that_there_is_not(tmp_path):
    maker = Maker()
    with pytest.raises(InputError, match="^--output=.*images.gif: give a .png"):
        write(tmp_path / "images.gif", maker)
    assert maker.asked == []
    assert not any(tmp_path.iterdir())


# From the command line.

ROUNDINGS = "choose one of nearest, half_up, down"


def sample(output: pathlib.Path, *more: str) -> int:
    """Makes samples of the small run."""
    where = f"--checkpoint={tiny.flow_run()}", f"--output={output}"
    return tiny.dmf("sample", *where, *more)


@pytest.mark.parametrize("labels", ["random", "all"])
def test_samples_are_the_same_in_every_form(tmp_path, labels, capsys):
    chosen = ["--labels=random", "--seed=3"] if labels == "random" else ["--seed=3"]
    expected = labels_of(np.arange(30), 10, "random" if labels == "random" else "balanced", 3)
    found = {}
    for name in NAMES:
        assert sample(tmp_path / name, "--steps=1", "--count=30", *chosen) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / name)
        found[name], numbers = read(tmp_path / name)
        assert numbers == expected.tolist()
    assert found["images"].shape == (30, 8, 8, 1)
    assert len(np.unique(found["images"], axis=0)) == 30
    for images in found.values():
        np.testing.assert_array_equal(images, found["images"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


def test_samples_of_more_than_one_part_are_those_of_one(tmp_path):
    for name, size in (("parts.npz", 1), ("whole.npz", 4)):
        chunk = f"--config.evaluation.chunk_size={size}"
        assert sample(tmp_path / name, "--steps=1", "--count=30", chunk) == 0
    (parts, _), (whole, _) = read(tmp_path / "parts.npz"), read(tmp_path / "whole.npz")
    assert np.abs(parts.astype(int) - whole).max() <= 1


def test_roundings_of_samples(tmp_path):
    found = {}
    for rounding in ("nearest", "down"):
        output = tmp_path / f"{rounding}.npz"
        assert sample(output, "--steps=1", "--count=8", f"--rounding={rounding}") == 0
        found[rounding] = read(output)[0].astype(int)
    differences = found["nearest"] - found["down"]
    assert set(np.unique(differences)) == {0, 1}
    assert 0.2 < differences[(found["down"] > 0) & (found["down"] < 255)].mean() < 0.8


def test_a_grid_shows_the_samples_of_each_number_of_steps(tmp_path):
    sheets = {}
    for steps, seed in (("1", 0), ("2", 0), ("1,2", 0), ("2", 1)):
        output = tmp_path / "grid.png"
        assert sample(output, f"--steps={steps}", "--count=20", f"--seed={seed}") == 0
        sheets[steps + "'" * seed] = np.asarray(PIL.Image.open(output))
    # Rows of 10 digits of 8 x 8, one pixel apart, enlarged six times.
    row, gap = 9 * 6, 6
    assert sheets["1"].shape == (2 * row + gap, 10 * row + gap)
    assert sheets["1,2"].shape == (4 * row + gap, 10 * row + gap)
    np.testing.assert_array_equal(sheets["1,2"][: 2 * row + gap], sheets["1"])
    np.testing.assert_array_equal(sheets["1,2"][2 * row :], sheets["2"])
    # All are of the same noise.
    same, other = (np.abs(sheets[name].astype(int) - sheets["1"]).mean() for name in ("2", "2'"))
    assert 0 < same < 0.7 * other


@pytest.mark.parametrize(
    ("flag", "name", "words"),
    [
        ("--steps=1,2", "x.npz", "--steps=1,2: several are for a .png grid; give one"),
        ("--steps=1,2", "x", "--steps=1,2: several are for a .png grid; give one"),
        ("--rounding=sideways", "x.npz", f"--rounding=sideways: {ROUNDINGS}"),
        ("--rounding=sideways", "x.png", f"--rounding=sideways: {ROUNDINGS}"),
        ("--labels=0,random", "x.npz", "--labels=0,random: give whole numbers"),
    ],
)
def test_what_cannot_be_sampled(tmp_path, capsys, flag, name, words):
    assert sample(tmp_path / name, flag) == 2
    assert capsys.readouterr().err == f"dmf sample: {words}\n"
    assert not any(tmp_path.iterdir())
