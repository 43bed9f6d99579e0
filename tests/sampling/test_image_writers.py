"""Many images as files: every format has the same images, and interrupted work resumes."""

import io
import json
import os
import pathlib

import numpy as np
import PIL.Image
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from dmf.data.image_files import open_images
from dmf.data.image_sets import open_image_set
from dmf.errors import InputError, RunError
from dmf.sampling import image_writers
from dmf.sampling.generator import GeneratedImages

pytestmark = pytest.mark.usefixtures("small_network_registered")

COUNT, SIZE = 22, 6
LABELS = np.array([(7 * i + i // 5) % 4 for i in range(COUNT)], np.int32)
NAMES = ("images.npz", "images.array_record", "images")
over_formats = pytest.mark.parametrize("name", NAMES)


def pixels(indices: np.ndarray, labels: np.ndarray, channels: int = 3) -> np.ndarray:
    """Images [n, 4, 5, channels] that depend on index and label."""
    places = np.arange(20 * channels).reshape(1, 4, 5, channels)
    column = (len(indices), 1, 1, 1)
    return ((places * 3 + indices.reshape(column) * 7 + labels.reshape(column) * 61) % 256).astype(
        np.uint8
    )


class FakeGenerator:
    """Generates images, records the indices of each call, and may be interrupted."""

    def __init__(self, *, calls: int = 10**6, bad: tuple[int, ...] = (), channels: int = 3):
        self.calls: list[list[int]] = []
        self._max_calls, self._bad, self._channels = calls, bad, channels

    def __call__(self, indices: np.ndarray, labels: np.ndarray) -> GeneratedImages:
        if len(self.calls) == self._max_calls:
            raise KeyboardInterrupt
        assert indices.shape == labels.shape == (SIZE,)
        self.calls.append(indices.tolist())
        images = pixels(indices, labels, self._channels)
        return GeneratedImages(images, ~np.isin(indices, self._bad))


def write(
    output: pathlib.Path, generator: FakeGenerator, labels: np.ndarray = LABELS, identity="a"
) -> None:
    image_writers.write_images(
        output, generator, labels, chunk_size=SIZE, devices=1, identity=identity, part_chunks=1
    )


def interrupted(output: pathlib.Path, calls: int, **settings) -> None:
    """Generates some parts, and is interrupted then."""
    with pytest.raises(KeyboardInterrupt):
        write(output, FakeGenerator(calls=calls), **settings)
    assert not output.exists()


def stored(output: pathlib.Path) -> dict[str, bytes]:
    """The bytes of every file of an output."""
    files = sorted(output.iterdir()) if output.is_dir() else [output]
    return {file.name: file.read_bytes() for file in files}


def decoded(data: bytes) -> np.ndarray:
    image = np.asarray(PIL.Image.open(io.BytesIO(data)))
    return image.reshape(*image.shape[:2], -1)


def read(output: pathlib.Path) -> tuple[np.ndarray, list[int]]:
    """The images and labels of an output in any format."""
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
    files = open_images(str(output))
    assert files.names == tuple(f"{i:06}.png" for i in range(len(files)))
    images = [decoded(files.files.read(name)) for name in files.names]
    return np.stack(images), files.labels.tolist()


@over_formats
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, SIZE - 1, SIZE, SIZE + 1, COUNT, 3 * SIZE])
def test_every_format_has_the_same_images(tmp_path, count, channels, name):
    output, labels = tmp_path / "deep" / "er" / name, np.sort(LABELS)[:count]
    generator = FakeGenerator(channels=channels)
    write(output, generator, labels)
    images, written_labels = read(output)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, pixels(np.arange(count), labels, channels))
    assert written_labels == labels.tolist()
    starts = range(0, count, SIZE)
    assert generator.calls == [list(range(start, start + SIZE)) for start in starts]
    assert [path.name for path in output.parent.iterdir()] == [name]


def test_an_archive_of_arrays_is_read_without_copies(tmp_path):
    write(tmp_path / "images.npz", FakeGenerator())
    images = open_image_set(str(tmp_path / "images.npz"))
    assert isinstance(images.array, np.memmap)
    np.testing.assert_array_equal(images.read(np.arange(COUNT)), pixels(np.arange(COUNT), LABELS))
    np.testing.assert_array_equal(images.labels(), LABELS)


def test_a_folder_has_images_and_their_labels(tmp_path):
    write(tmp_path / "images", FakeGenerator())
    names = [f"{i:06}.png" for i in range(COUNT)]
    assert sorted(stored(tmp_path / "images")) == [*names, "dataset.json"]
    listed = json.loads((tmp_path / "images" / "dataset.json").read_text())["labels"]
    assert listed == [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]
    images = open_image_set(str(tmp_path / "images"))
    assert images.notes == ""
    np.testing.assert_array_equal(images.read(np.arange(COUNT)), pixels(np.arange(COUNT), LABELS))


def test_a_folder_of_a_few_classes_can_be_read(tmp_path):
    labels = np.array([3, 5, 3], np.int32)
    write(tmp_path / "images", FakeGenerator(), labels)
    assert open_images(str(tmp_path / "images")).labels.tolist() == [3, 5, 3]


# Interruptions.


@over_formats
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_interrupted_work_resumes(tmp_path, calls, name):
    write(tmp_path / "whole" / name, FakeGenerator())
    output, generator = tmp_path / "parts" / name, FakeGenerator()
    interrupted(output, calls)
    write(output, generator)
    assert [indices[0] for indices in generator.calls] == [SIZE * i for i in range(calls, 4)]
    assert stored(output) == stored(tmp_path / "whole" / name)
    assert [path.name for path in output.parent.iterdir()] == [name]


@over_formats
def test_work_that_was_interrupted_while_writing_resumes(tmp_path, monkeypatch, name):
    write(tmp_path / "whole" / name, FakeGenerator())
    output, generator = tmp_path / "parts" / name, FakeGenerator()
    writer = image_writers.WRITERS[output.suffix]

    def broken(output, paths, labels):
        writer(output, [*paths[:-1], output.parent / "nothing"], labels)

    with monkeypatch.context() as changed:
        changed.setitem(image_writers.WRITERS, output.suffix, broken)
        with pytest.raises(RunError, match="nothing: No such file"):
            write(output, FakeGenerator())
    assert not output.exists()
    write(output, generator)
    assert generator.calls == []
    assert stored(output) == stored(tmp_path / "whole" / name)
    assert [path.name for path in output.parent.iterdir()] == [name]


def test_an_incomplete_part_is_generated_again(tmp_path):
    output, generator = tmp_path / "images.npz", FakeGenerator()
    interrupted(output, 2)
    (parts,) = tmp_path.iterdir()
    whole = sorted(path for path in parts.iterdir() if path.suffix == ".npy")
    assert len(whole) == 2
    whole[1].rename(whole[1].with_name(f".{whole[1].name}"))
    (parts / f".{whole[1].name}").write_bytes(b"\x93NUMPY")
    write(output, generator)
    assert [indices[0] for indices in generator.calls] == [6, 12, 18]
    np.testing.assert_array_equal(read(output)[0], pixels(np.arange(COUNT), LABELS))


@over_formats
@pytest.mark.parametrize("change", ["identity", "count"])
def test_other_images_start_from_the_beginning(tmp_path, change, name):
    output, generator = tmp_path / name, FakeGenerator()
    other = {"labels": LABELS[::-1].copy(), "identity": ["b", {"seed": 1}]}
    if change == "count":
        other = {"labels": LABELS[::-1][:-1].copy(), "identity": "a"}
    interrupted(output, 3)
    write(output, generator, **other)
    assert [indices[0] for indices in generator.calls] == [0, 6, 12, 18]
    count = len(other["labels"])
    np.testing.assert_array_equal(read(output)[0], pixels(np.arange(count), other["labels"]))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_parts_without_an_identity_are_deleted(tmp_path):
    """An interruption during the deletion of parts leaves such parts."""
    output = tmp_path / "images.npz"
    interrupted(output, 3)
    next(tmp_path.rglob("work.json")).unlink()
    labels = LABELS[::-1].copy()
    write(output, FakeGenerator(), labels, identity="b")
    np.testing.assert_array_equal(read(output)[0], pixels(np.arange(COUNT), labels))


def test_parts_that_are_cut_are_made_again(tmp_path):
    output, generator = tmp_path / "images.npz", FakeGenerator()
    interrupted(output, 3)
    first, second, _ = sorted(tmp_path.rglob("*.npy"))
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-1])
    write(output, generator)
    assert [indices[0] for indices in generator.calls] == [0, SIZE, 3 * SIZE]
    np.testing.assert_array_equal(read(output)[0], pixels(np.arange(COUNT), LABELS))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_an_identity_that_is_cut_is_no_identity(tmp_path, text):
    output, generator = tmp_path / "images.npz", FakeGenerator()
    interrupted(output, 3)
    next(tmp_path.rglob("work.json")).write_text(text)
    write(output, generator)
    assert [indices[0] for indices in generator.calls] == [0, 6, 12, 18]


def test_two_outputs_in_one_folder_are_independent(tmp_path):
    first, second = tmp_path / "images.npz", tmp_path / "images"
    interrupted(first, 2)
    generator = FakeGenerator()
    write(second, generator)
    assert len(generator.calls) == 4
    generator = FakeGenerator()
    write(first, generator)
    assert len(generator.calls) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "images.npz"]
    np.testing.assert_array_equal(read(first)[0], read(second)[0])


# Invalid images and outputs.


@over_formats
@pytest.mark.parametrize(("bad", "words"), [((1,), "1 of images 0 to 5 .* the first of them 1$"),
                                            ((20, 21, 22), "2 of images 18 to 21 .*them 20$"),
                                            ((5, 6, 8), "1 of images 0 to 5 .*them 5$")])
def test_images_that_are_not_finite_are_refused(tmp_path, bad, words, name):
    with pytest.raises(RunError, match=words) as error:
        write(tmp_path / name, FakeGenerator(bad=bad))
    assert "\n" not in str(error.value)
    assert not (tmp_path / name).exists()
    write(tmp_path / name, FakeGenerator())
    np.testing.assert_array_equal(read(tmp_path / name)[0], pixels(np.arange(COUNT), LABELS))


@over_formats
def test_an_output_that_another_command_is_writing_is_left_alone(tmp_path, name):
    def meddling(indices, labels):
        with pytest.raises(InputError, match=f"^--output=.*{name}: another command is writing"):
            write(tmp_path / name, FakeGenerator())
        return FakeGenerator()(indices, labels)

    write(tmp_path / name, meddling)
    np.testing.assert_array_equal(read(tmp_path / name)[0], pixels(np.arange(COUNT), LABELS))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@over_formats
def test_values_beyond_the_last_image_are_ignored(tmp_path, name):
    write(tmp_path / name, FakeGenerator(bad=(22, 23)))
    assert len(read(tmp_path / name)[0]) == COUNT


def test_a_folder_that_is_not_empty_is_left_as_it_was(tmp_path):
    output, generator = tmp_path / "images", FakeGenerator()
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=f"^--output={output}: it is a folder that is not empty"):
        write(output, generator)
    assert stored(output) == {"mine.txt": b"mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=f"^--output={tmp_path}/file: it is a file"):
        write(tmp_path / "file", generator)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "images"]
    assert generator.calls == []


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "images").mkdir()
    write(tmp_path / "images", FakeGenerator())
    assert len(read(tmp_path / "images")[0]) == COUNT


def test_an_unknown_format_is_refused(tmp_path):
    generator = FakeGenerator()
    with pytest.raises(InputError, match="^--output=.*images.gif: give a .png"):
        write(tmp_path / "images.gif", generator)
    assert generator.calls == []
    assert not any(tmp_path.iterdir())
