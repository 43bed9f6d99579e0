"""`dmf prepare`: the contents of a dataset of latents, and resuming an interrupted preparation."""

import functools
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import image_set
import jax
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
import tiny
from safetensors.numpy import save_file

from dmf.checkpoints import load
from dmf.checkpoints.convert import namings
from dmf.data.datasets import open_dataset
from dmf.data.image_files import open_images
from dmf.data.image_sets import open_image_set
from dmf.data.image_transforms import center_crop
from dmf.data.latent_origin import latent_origin, origin_of
from dmf.data.pixels import png
from dmf.errors import InputError
from dmf.models.encoders.autoencoder_kl import AutoencoderKL
from dmf.training.loop import train

COUNT, SIDE = 300, 32
AUTOENCODER = AutoencoderKL(widths=(8, 8, 8), layers_per_block=1, groups=4)
SHARDS = ("--resolution=32", "--shard-size=64", "--batch-size=32")


@functools.cache
def images() -> pathlib.Path:
    """Class folders of every kind of image, one of them truncated."""
    folder = tiny.SCRATCH / "images"
    image_set.make(folder, count=COUNT)
    return folder


@functools.cache
def autoencoder() -> pathlib.Path:
    """A small autoencoder with random weights, as `dmf convert` writes it."""
    folder = tiny.SCRATCH / "autoencoder"
    shapes = jax.eval_shape(AUTOENCODER.init, jax.random.key(0))
    draw = np.random.default_rng(3)
    params = jax.tree.map(lambda w: draw.normal(0, 0.2, w.shape).astype("f"), shapes)
    tensors = namings.to_named_tensors(AUTOENCODER, params, namings.naming_of(AUTOENCODER))
    save_file(tensors, tiny.SCRATCH / "autoencoder.safetensors")
    assert tiny.dmf(
        "convert", tiny.SCRATCH / "autoencoder.safetensors", f"--output={folder}", "--groups=4"
    ) == 0
    return folder


def run_prepare(output, *flags: str, source=None) -> int:
    return tiny.dmf(
        "prepare", f"--source={source or images()}", f"--output={output}",
        f"--autoencoder={autoencoder()}", *SHARDS, *flags,
    )


@functools.cache
def prepared() -> pathlib.Path:
    """The whole dataset, prepared without an interruption."""
    folder = tiny.SCRATCH / "latents"
    assert run_prepare(folder) == 0
    return folder


def records(folder: pathlib.Path) -> dict[str, bytes]:
    """The bytes of every shard, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*array_record*"))}


@pytest.mark.slow
def test_tfds_reads_it_alone():
    """In a process where dmf cannot be imported."""
    code = (
        "import sys; sys.modules['dmf'] = None\n"
        "import tensorflow_datasets as tfds, numpy as np\n"
        f"rows = tfds.builder_from_directory({str(prepared())!r}).as_data_source('train')\n"
        "row = rows[3]\n"
        "print(len(rows), row['moments'].shape, row['moments'].dtype, row['label'], row['name'])\n"
    )
    done = tiny.process(code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{COUNT - 1} (2, 8, 8, 8) float16 ")


def test_every_readable_image_is_there_with_its_label():
    files = open_images(str(images()))
    builder = tfds.builder_from_directory(prepared())
    rows = builder.as_data_source("train")
    names = {files.names[i]: int(files.labels[i]) for i in range(len(files))}
    stored = {row["name"].decode(): int(row["label"]) for row in rows}
    assert stored.items() <= names.items()
    assert len(stored) == len(rows) == COUNT - 1
    assert builder.info.features["label"].names == list(files.class_names)
    report = json.loads((prepared() / "preparation.json").read_text())
    (skipped,) = report["skipped"]
    assert names.keys() - stored.keys() == {skipped["image"]}
    assert report["written"] == COUNT - 1
    assert latent_origin(prepared()) == origin_of(*load.load_autoencoder(autoencoder()))


def test_moments_are_those_of_encoding_one_by_one():
    """And those of the mirror image are not the mirrored moments."""
    files = open_images(str(images()))
    places = {name: i for i, name in enumerate(files.names)}
    rows = tfds.builder_from_directory(prepared()).as_data_source("train")
    network, params = load.load_autoencoder(autoencoder())
    encode = jax.jit(network.encode)
    for row in list(rows)[::29]:
        pixels = center_crop(files.image(places[row["name"].decode()]), SIDE)
        x = pixels.astype(np.float32)[None] / 127.5 - 1
        for view, stored in ((x, row["moments"][0]), (x[:, :, ::-1], row["moments"][1])):
            expected = np.concatenate(encode(params, view), axis=-1)[0]
            np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=1e-4)
        mirrored = row["moments"][0][:, ::-1].astype(np.float32)
        assert np.abs(row["moments"][1] - mirrored).max() > 0.01


@pytest.mark.slow  # test_alignment_runs.py trains on prepared moments too.
def test_it_trains(tmp_path):
    config = tiny.config({
        "data.directory": str(prepared()), "data.name": "latents", "data.mirror": True,
        "model.channels": 4, "model.num_classes": len(open_images(str(images())).class_names),
        "latents.scale": 0.5, "latents.autoencoder": str(autoencoder()),
        "run.steps": 3, "run.sample_every": 3, "sampling.steps": (1,),
    })
    assert int(train(config, tmp_path / "run").step) == 3
    assert (tmp_path / "run/samples/00000003.png").exists()


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path):
    for process in (1, 0):
        assert run_prepare(tmp_path / "out", f"--process={process}", "--processes=2") == 0
        assert (tmp_path / "out/dataset_info.json").exists() == (process == 0)
    assert records(tmp_path / "out") == records(prepared())
    for name in ("dataset_info.json", "features.json", "labels.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (prepared() / name).read_bytes()


@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_killed_and_started_again(tmp_path, shards):
    """Finished shards are not redone; the bytes are those of an undisturbed run."""
    prepared()
    command = tiny.command(
        "prepare", f"--source={images()}", f"--output={tmp_path}/out",
        f"--autoencoder={autoencoder()}", *SHARDS,
    )
    process = subprocess.Popen(
        command, env=tiny.environment(), cwd=tiny.ROOT, stderr=subprocess.DEVNULL
    )
    reports = tmp_path / "out/shards"
    deadline = time.monotonic() + 240
    while len(list(reports.glob("[0-9]*.json"))) < shards and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in reports.glob("[0-9]*.json")}
    assert shards <= len(done)
    assert run_prepare(tmp_path / "out") == 0
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert records(tmp_path / "out") == records(prepared())
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
def test_an_unfinished_dataset_is_none(tmp_path):
    assert run_prepare(tmp_path / "out", "--process=0", "--processes=2") == 0
    with pytest.raises(InputError, match="no such dataset"):
        open_dataset("latents", directory=str(tmp_path / "out"))


def test_other_settings_are_other_work(tmp_path, capsys):
    folder = shutil.copytree(prepared(), tmp_path / "out")
    assert run_prepare(folder, "--shard-size=20") == 2
    assert "it holds other work, whose shard_size is 64 and not 20" in capsys.readouterr().err
    assert records(folder) == records(prepared())
    assert run_prepare(folder) == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    assert run_prepare(tmp_path / "full") == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unreadable_image_may_end_the_work(tmp_path, capsys):
    assert run_prepare(tmp_path / "out", "--unreadable=fail") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--unreadable=skip leaves such images out" in error
    assert not (tmp_path / "out/dataset_info.json").exists()
    assert run_prepare(tmp_path / "out", "--unreadable=skip") == 0
    assert records(tmp_path / "out") == records(prepared())


def test_crops_without_an_autoencoder(tmp_path):
    """Pixel space: rows are the crops to the bit, read like any dataset."""
    assert tiny.dmf("prepare", f"--source={images()}", f"--output={tmp_path}/out", *SHARDS) == 0
    dataset = open_dataset("crops", directory=str(tmp_path / "out"))
    files = open_images(str(images()))
    rows = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    places = {name: i for i, name in enumerate(files.names)}
    read = dataset.read([5, 17])
    for row, stored, label in zip((rows[5], rows[17]), read["x"], read["y"], strict=True):
        index = places[row["name"].decode()]
        np.testing.assert_array_equal(stored, center_crop(files.image(index), SIDE))
        assert label == files.labels[index]


def test_images_are_stored_along_with_the_moments(tmp_path):
    flags = ("--keep-images", "--nomirror")
    assert run_prepare(tmp_path / "out", *flags) == 0
    row = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")[0]
    files = open_images(str(images()))
    crop = center_crop(files.image(files.names.index(row["name"].decode())), SIDE)
    np.testing.assert_array_equal(row["image"], crop)
    assert row["moments"].shape == (1, 8, 8, 8)
    stored = open_image_set(str(tmp_path / "out"))
    assert stored.shape == crop.shape and len(stored) == len(files) - 1
    np.testing.assert_array_equal(stored.read(np.array([0, 1]))[0], crop)
    for source, side, message in (
        (prepared(), 0, "its samples are latents; give images, or latents that dmf prepare --keep"),
        (tmp_path / "out", 8, "resolution=8: the images of .* are taken as they are"),
    ):
        with pytest.raises(InputError, match=message):
            open_image_set(str(source), side=side)
    with pytest.raises(InputError, match="data.mirror=True: the dataset has no moments of mirror"):
        train(tiny.config({
            "data.directory": str(tmp_path / "out"), "data.mirror": True, "model.channels": 4,
            "model.num_classes": len(files.class_names),
        }), tmp_path / "run")


def test_another_resolution_than_the_model(tmp_path):
    with pytest.raises(InputError) as error:
        train(tiny.config({"data.directory": str(prepared()), "model.channels": 4,
                           "model.input_size": 16}), tmp_path / "run")
    assert "shape (8, 8, 4), but config.model takes (16, 16, 4)" in str(error.value)


TOGETHER = """
import sys
import time
from dmf.data.prepare import prepare
from dmf.data.raw_images import open_raw_images
from dmf.data.shard_writer import PrepareSettings

source, output, process, start = sys.argv[1:]
images = open_raw_images(source)
settings = PrepareSettings(resolution=8, shard_size=1, batch_size=1)
for attempt in range(8):
    time.sleep(max(0, float(start) + 0.7 * attempt - time.time()))
    prepare(images, f"{output}/{attempt}", settings, process=int(process), processes=2)
"""


@pytest.mark.slow
def test_processes_may_begin_and_end_together(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            PIL.Image.fromarray(np.full((9, 9, 3), i, np.uint8)).save(
                tmp_path / "images" / name / f"{i}.png")
    start = time.time() + 8
    command = tiny.command(tmp_path / "images", tmp_path, code=TOGETHER)
    workers = [subprocess.Popen([*command, str(i), str(start)], env=tiny.environment(),
                                stderr=subprocess.PIPE, text=True) for i in range(2)]  # fmt: skip
    for worker in workers:
        _, log = worker.communicate(timeout=120)
        assert worker.returncode == 0, log
    for attempt in range(8):
        builder = tfds.builder_from_directory(tmp_path / str(attempt))
        assert len(builder.as_data_source("train")) == 4
        left = [p.name for p in (tmp_path / str(attempt)).iterdir() if p.name.startswith(".")]
        assert left == []


@pytest.mark.parametrize("name", ["imagenet-256", "../evil", "256", "Upper", ""])
def test_a_name_that_tfds_would_refuse_is_refused_before_the_first_shard(tmp_path, capsys, name):
    flags = [f"--source={images()}", f"--output={tmp_path}/out", "--resolution=8"]
    assert tiny.dmf("prepare", *flags, f"--name={name}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"dmf prepare: name={name}: give a name of small letters")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["images", "images/out", "link/out"])
def test_an_output_among_the_images_is_refused(tmp_path, capsys, output):
    (tmp_path / "images" / "one").mkdir(parents=True)
    PIL.Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "images/one/1.png")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    flags = [f"--source={tmp_path}/images", f"--output={tmp_path}/{output}", "--resolution=8"]
    assert tiny.dmf("prepare", *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"output={tmp_path}/{output}: it lies in source={tmp_path}/images" in line
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["one"]


def test_a_file_name_that_is_no_utf8_is_stored_escaped(tmp_path):
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    path = os.fsencode(folder) + b"/caf\xe9.png"
    PIL.Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(folder / "plain.png")
    os.rename(folder / "plain.png", path)
    (folder / "broken.png").write_bytes(b"no image")
    os.rename(folder / "broken.png", path.replace(b"caf", b"tort"))
    flags = [f"--source={tmp_path}/images", f"--output={tmp_path}/out", "--resolution=8"]
    assert tiny.dmf("prepare", *flags) == 0
    (example,) = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    assert example["name"] == rb"one/caf\xe9.png"
    (skipped,) = json.loads((tmp_path / "out" / "preparation.json").read_text())["skipped"]
    assert skipped["image"] == r"one/tort\xe9.png"


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Files in a TFDS dataset, of two classes; one is damaged."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["left", "right"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        for i in range(9):
            data = png(picture(i))
            yield i, {"image": io.BytesIO(data[:60] if i == 4 else data), "label": i % 2}


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (33 + i, 40, 3)).astype(np.uint8)


def test_a_tfds_dataset_as_a_source(tmp_path):
    """Its files are decoded here: one that is damaged is left out and named."""
    Pictures(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    assert tiny.dmf(
        "prepare", "--source=pictures", "--split=test", f"--data-directory={tmp_path}/tfds",
        f"--output={tmp_path}/out", "--resolution=32",
    ) == 0
    rows = list(tfds.builder_from_directory(tmp_path / "out").as_data_source("train"))
    crops = {center_crop(PIL.Image.fromarray(picture(i)), SIDE).tobytes(): i for i in range(9)}
    assert sorted(crops[row["image"].tobytes()] for row in rows) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert all(crops[row["image"].tobytes()] % 2 == row["label"] for row in rows)
    (skipped,) = json.loads((tmp_path / "out/preparation.json").read_text())["skipped"]
    assert skipped["image"].startswith("pictures/test/")
