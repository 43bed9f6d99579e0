"""A reference that is made while a dataset is prepared is that of the crops."""

import functools
import pathlib
import shutil

import image_set
import numpy as np
import pytest
import tiny
import tiny_networks

from dmf.data import prepare
from dmf.evaluation.crop_statistics import CropStatistics

COUNT = 60
FLAGS = ("--resolution=32", "--shard-size=16", "--batch-size=8", "--protocol=adm", "--inception=I")


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    """Networks are tiny ones."""
    tiny_networks.install(monkeypatch)


@functools.cache
def images() -> pathlib.Path:
    """Class folders, one image of which is truncated."""
    folder = tiny.SCRATCH / "images_of_crop_surveys"
    image_set.make(folder, count=COUNT)
    return folder


def run_prepare(output: pathlib.Path, *flags: str) -> int:
    return tiny.dmf("prepare", f"--source={images()}", f"--output={output}/data", *FLAGS,
                    f"--reference={output}/reference.npz", *flags)  # fmt: skip


def statistics(output: pathlib.Path) -> dict[str, np.ndarray]:
    return dict(np.load(output / "reference.npz"))


def check_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Up to the order in which sums were made."""
    assert actual.keys() == expected.keys() == {"mu", "sigma", "mu_s", "sigma_s", "features_pool3"}
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-9, atol=1e-12)
    rows = [sorted(map(tuple, each["features_pool3"].tolist())) for each in (actual, expected)]
    assert rows[0] == rows[1]


def test_it_is_that_of_the_dataset_that_was_made(tmp_path):
    assert run_prepare(tmp_path) == 0
    actual = statistics(tmp_path)
    assert actual["features_pool3"].shape == (COUNT - 1, 6), "all but the one that is truncated"
    assert tiny.dmf("evaluate", f"--images={tmp_path}/data", "--protocol=adm",
                    "--inception=I", "--config.evaluation.chunk_size=8",
                    f"--make-reference={tmp_path}/again.npz") == 0  # fmt: skip
    again = dict(np.load(tmp_path / "again.npz"))
    for name in actual:
        np.testing.assert_allclose(actual[name], again[name], rtol=1e-4, atol=1e-6)


def test_two_processes_make_what_one_makes(tmp_path):
    assert run_prepare(tmp_path / "one") == 0
    for process in (1, 0):
        assert run_prepare(tmp_path / "two", f"--process={process}", "--processes=2") == 0
        assert (tmp_path / "two/reference.npz").exists() == (process == 0)
    check_same(statistics(tmp_path / "two"), statistics(tmp_path / "one"))


@pytest.mark.parametrize("moment", ["before the sums", "between sums and report"])
def test_a_shard_counts_once_however_often_it_is_made(tmp_path, monkeypatch, moment):
    assert run_prepare(tmp_path / "whole") == 0
    finish, write = CropStatistics.finish, prepare.write_json

    def stopped(self, shard):
        if shard == 2:
            raise KeyboardInterrupt
        finish(self, shard)

    def unreported(path, value):
        if path.name == "00002.json":
            raise KeyboardInterrupt
        write(path, value)

    with monkeypatch.context() as patch:
        if moment == "before the sums":
            patch.setattr(CropStatistics, "finish", stopped)
        else:
            patch.setattr(prepare, "write_json", unreported)
        assert run_prepare(tmp_path / "cut") == 130
    # Another number of processes takes the work up.
    for process in (0, 1):
        assert run_prepare(tmp_path / "cut", f"--process={process}", "--processes=2") == 0
    check_same(statistics(tmp_path / "cut"), statistics(tmp_path / "whole"))


def test_sums_that_are_damaged_are_one_line(tmp_path, capsys):
    assert run_prepare(tmp_path) == 0
    (sums,) = (tmp_path / "data/shards").glob("statistics-*.npz")
    sums.write_bytes(b"")
    assert run_prepare(tmp_path) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the sums are damaged" in last
    assert last.endswith("data/shards and run the same command again")
    shutil.rmtree(tmp_path / "data/shards")
    assert run_prepare(tmp_path) == 0


def test_too_few_images_are_found_before_anything_is_written(tmp_path, capsys):
    folder = tmp_path / "few"
    image_set.make(folder, count=6)
    assert tiny.dmf("prepare", f"--source={folder}", f"--output={tmp_path}/data", *FLAGS,
                    f"--reference={tmp_path}/reference.npz") == 2  # fmt: skip
    message = "reference.npz: fid needs more than 6 images (the feature dimension); got 6"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_folder_at_the_place_of_the_reference_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "reference.npz").mkdir()
    assert run_prepare(tmp_path) == 2
    assert "reference.npz: it is a folder; give the path of a file" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
