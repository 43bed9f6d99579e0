"""Many images as files: every format has the same images, and interrupted work resumes."""

import io
import json
import os
import pathlib

import numpy as np
import overflowing_sampler
import PIL.Image
import pytest
import small_network
import tiny
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from dmf.data.image_files import open_images
from dmf.data.image_sets import open_image_set
from dmf.errors import InputError, RunError
from dmf.sampling import image_writers
from dmf.sampling.class_labels import class_labels
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


def test_a_folder_may_have_a_dot_in_its_name(tmp_path):
    output = tmp_path / "samples_cfg1.5"
    assert sample(output, "--count=2", "--steps=1") == 0
    assert sorted(stored(output)) == ["000000.png", "000001.png", "dataset.json"]


def test_an_unknown_format_is_refused(tmp_path):
    generator = FakeGenerator()
    with pytest.raises(InputError, match="^--output=.*images.gif: give a .png"):
        write(tmp_path / "images.gif", generator)
    assert generator.calls == []
    assert not any(tmp_path.iterdir())


# From the command line.

ROUNDINGS = "choose one of nearest, half_up, down"


def sample(output: pathlib.Path, *flags: str) -> int:
    """Runs `dmf sample` on the small run."""
    where = f"--checkpoint={small_network.run()}", f"--output={output}"
    return tiny.dmf("sample", *where, *flags)


@pytest.mark.parametrize("labels", ["random", "all"])
def test_samples_are_the_same_in_every_format(tmp_path, labels, capsys):
    chosen = ["--labels=random", "--seed=3"] if labels == "random" else ["--seed=3"]
    expected = class_labels(np.arange(30), 10, "random" if labels == "random" else "balanced", 3)
    images = {}
    for name in NAMES:
        assert sample(tmp_path / name, "--steps=1", "--count=30", *chosen) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / name)
        images[name], written_labels = read(tmp_path / name)
        assert written_labels == expected.tolist()
    assert images["images"].shape == (30, 8, 8, 1)
    assert len(np.unique(images["images"], axis=0)) == 30
    for each in images.values():
        np.testing.assert_array_equal(each, images["images"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


def test_samples_do_not_depend_on_the_parts(tmp_path):
    for name, size in (("parts.npz", 1), ("whole.npz", 4)):
        chunk = f"--config.evaluation.chunk_size={size}"
        assert sample(tmp_path / name, "--steps=1", "--count=30", chunk) == 0
    (parts, _), (whole, _) = read(tmp_path / "parts.npz"), read(tmp_path / "whole.npz")
    assert np.abs(parts.astype(int) - whole).max() <= 1


def test_roundings_of_samples(tmp_path):
    images = {}
    for rounding in ("nearest", "down"):
        output = tmp_path / f"{rounding}.npz"
        assert sample(output, "--steps=1", "--count=8", f"--rounding={rounding}") == 0
        images[rounding] = read(output)[0].astype(int)
    differences = images["nearest"] - images["down"]
    assert set(np.unique(differences)) == {0, 1}
    assert 0.2 < differences[(images["down"] > 0) & (images["down"] < 255)].mean() < 0.8


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
    # The noise is the same for all numbers of steps.
    same, other = (np.abs(sheets[name].astype(int) - sheets["1"]).mean() for name in ("2", "2'"))
    assert 0 < same < 0.7 * other


def test_a_grid_of_images_that_are_not_finite_is_refused(tmp_path, capsys):
    with overflowing_sampler.registered():
        sampler = "--config.sampling.sampler.name=overflowing"
        code = sample(tmp_path / "x.png", sampler, "--count=20")
    assert code == 1
    assert "images 0 to 19 hold NaN or infinity" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


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
def test_invalid_flags_are_refused(tmp_path, capsys, flag, name, words):
    assert sample(tmp_path / name, flag) == 2
    assert capsys.readouterr().err == f"dmf sample: {words}\n"
    assert not any(tmp_path.iterdir())
