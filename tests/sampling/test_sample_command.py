"""`dmf sample`: its formats have the same images, and what it refuses."""

import pathlib

import numpy as np
import overflowing_sampler
import PIL.Image
import pytest
import small_network
import tensorflow_datasets as tfds
import tiny
from test_image_writers import NAMES, read, stored

from dmf.cli.sample import _chosen
from dmf.data import pixels
from dmf.data.build import Data
from dmf.errors import InputError
from dmf.sampling.class_labels import class_labels

pytestmark = pytest.mark.usefixtures("small_network_registered")

ROUNDINGS = "choose one of nearest, half_up, down"


def sample(output: pathlib.Path, *flags: str) -> int:
    """Runs `dmf sample` on the small run."""
    where = f"--checkpoint={small_network.run()}", f"--output={output}"
    return tiny.dmf("sample", *where, *flags)


@pytest.mark.parametrize("labels", ["random", pytest.param("all", marks=pytest.mark.slow)])
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


@pytest.mark.slow
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
        # Below the captions of classes, 20 pixels high, and at the right of those of steps.
        sheets[steps + "'" * seed] = np.asarray(PIL.Image.open(output))[20:, -546:]
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


@pytest.mark.slow
def test_a_guide_guides_and_the_network_itself_changes_nothing(tmp_path):
    images, run = {}, small_network.run()
    guided = ("--config.sampling.guidance.scale=3", f"--guide={run}")
    for name, flags in (("plain", ()), ("itself", guided),
                        ("raw", (*guided, "--guide-ema="))):  # fmt: skip
        output = tmp_path / f"{name}.npz"
        assert sample(output, "--steps=1", "--count=8", *flags) == 0
        images[name] = read(output)[0].astype(int)
    assert np.abs(images["itself"] - images["plain"]).max() <= 1
    assert np.abs(images["raw"] - images["plain"]).max() > 1


def test_labels_are_given_by_number_or_by_name(tmp_path):
    label = tfds.features.ClassLabel(names=["cat", "dog", "1"])
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="pets", version=tfds.core.Version("1.0.0"), data_dir=str(tmp_path), module_name="")
    info = tfds.core.DatasetInfo(
        builder=identity, features=tfds.features.FeaturesDict({"label": label}))
    info.set_splits(tfds.core.splits.SplitDict([]))
    info.write_to_directory(tmp_path)
    pets = Data(name="pets", directory=str(tmp_path))
    assert _chosen(["dog", "cat", "1"], pets) == [1, 0, 1]  # A number is never a name.
    with pytest.raises(InputError, match=r"^--labels=dog,cow: no class is called cow; there are "):
        _chosen(["dog", "cow"], pets)
    with pytest.raises(InputError, match=r"^--labels=cat: give whole numbers; the dataset, which "):
        _chosen(["cat"], Data(name="pets"))
    assert _chosen(["2", "0"], Data(name="pets")) == [2, 0]
    named = Data(name="pets", class_names=("Great Dane", "cat"))  # As a run stores them.
    assert _chosen(["cat", "Great Dane"], named) == [1, 0]
    with pytest.raises(InputError, match="no class is called great dane; there are Great Dane, "):
        _chosen(["great dane"], named)


def test_samples_have_the_names_of_their_classes(tmp_path, monkeypatch):
    captions, write = [], pixels.captioned_grid
    monkeypatch.setattr(pixels, "captioned_grid",
                        lambda groups, texts, *a, **k: captions.extend(texts) or write(
                            groups, texts, *a, **k))  # fmt: skip
    names = "--config.data.class_names=ant,Great Dane,c,d,e,f,g,h,i,j"
    flags = ["--labels=Great Dane,ant", "--steps=1", "--count=4"]
    assert sample(tmp_path / "x.png", names, *flags) == 0
    assert captions == ["Great Dane", "ant"] * 2
    assert sample(tmp_path / "y.png", names.removesuffix(",j"), *flags) == 2


@pytest.mark.parametrize(
    ("flag", "name", "words"),
    [
        ("--steps=1,2", "x.npz", "--steps=1,2: several are for a .png grid; give one"),
        ("--steps=1,2", "x", "--steps=1,2: several are for a .png grid; give one"),
        ("--rounding=sideways", "x.npz", f"--rounding=sideways: {ROUNDINGS}"),
        ("--rounding=sideways", "x.png", f"--rounding=sideways: {ROUNDINGS}"),
        ("--guide-ema=main", "x.npz", "--guide-ema=main: it is of --guide=DIR; give that too"),
        ("--guide=nowhere", "x.npz", "guide=nowhere: the guidance scale is 1, which is no "
         "guidance; give another one, --config.sampling.guidance.scale=2"),
        ("--labels=0,random", "x.npz", "--labels=0,random: no class is called random; there are 0, "
         "1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("--labels=1,99999999999", "x.npz", "--labels=1,99999999999: there is no label "
         "99999999999; labels go from 0 to 9, and 10 is the null label"),
        ("--labels=-1", "x.png", "--labels=-1: there is no label -1; labels go from 0 to 9, and 10 "
         "is the null label"),
        ("--labels=--1", "x.png", "--labels=--1: no class is called --1; there are 0, 1, 2, 3, 4, "
         "5, 6, 7, 8, 9"),
        ("--count=99999999999", "x.npz", "flag --count=99999999999: 99999999999 is not an integer "
         "in the range [1, 100000000]"),
    ],
)
def test_invalid_flags_are_refused(tmp_path, capsys, flag, name, words):
    small_network.run()
    capsys.readouterr()
    assert sample(tmp_path / name, flag) == 2
    assert capsys.readouterr().err == f"dmf sample: {words}\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.png", "x.npz"])
def test_a_folder_at_the_place_of_the_file_is_refused_at_once(tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    small_network.run()
    capsys.readouterr()
    assert sample(tmp_path / name, "--count=2", "--steps=1") == 2
    refusal = f"--output={tmp_path}/{name}: it is a folder; give the path of a file"
    assert capsys.readouterr().err == f"dmf sample: {refusal}\n"


@pytest.mark.slow
def test_a_folder_may_have_a_dot_in_its_name(tmp_path):
    output = tmp_path / "samples_cfg1.5"
    assert sample(output, "--count=2", "--steps=1") == 0
    assert sorted(stored(output)) == ["000000.png", "000001.png", "dataset.json"]
