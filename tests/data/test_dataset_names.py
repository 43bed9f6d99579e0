"""Which dataset a directory holds, and names that contradict it."""

import numpy as np
import pytest
import tiny
from test_datasets import open_dataset_of

from dmf.cli.config_flag import configured
from dmf.data.datasets import open_dataset, stored_name
from dmf.errors import InputError


@pytest.mark.parametrize("fields", [
    {"data.directory": "typo"},
    {"data.mixture": {"more": {"name": "digits", "directory": "typo", "weight": 1.0}}},
], ids=["data", "mixture"])
def test_a_directory_that_is_not_there_is_refused_and_not_made(fields, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = r"^data\.(mixture\.more\.)?directory=typo: there is no such directory"
    with pytest.raises(InputError, match=message):
        open_dataset_of(tiny.config(fields))
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_a_dataset_is_read_from_its_directory(prepared, tmp_path):
    (tmp_path / "cache/00000").mkdir(parents=True)
    np.save(tmp_path / "cache/00000/a.npy", np.zeros((8, 4, 4), np.float32))
    names = {f"{prepared}/squares/1.2.3": "squares", f"{tmp_path}/cache": "cache", prepared: ""}
    assert {place: stored_name(place) for place in names} == names
    for place, name in names.items():
        config, _ = configured(tiny.get_config(), [f"--config.data.directory={place}"])
        assert config.data.name == (name or "digits")


def test_a_name_that_contradicts_the_dataset_is_refused(prepared):
    given = [f"--config.data.directory={prepared}/squares/1.2.3", "--config.data.name=digits"]
    with pytest.raises(InputError, match=r"^data.name=digits: data.directory=.* holds squares"):
        configured(tiny.get_config(), given)
    config, _ = configured(tiny.get_config(), [given[0], "--config.data.name=squares:1.2.3"])
    assert config.data.name == "squares:1.2.3"


def test_the_digits_are_not_written_into_a_directory_of_latents(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "latents").mkdir()
    np.save(tmp_path / "latents/0.npy", np.zeros((8, 4, 4), np.float32))
    for place in ("~/latents", f"{tmp_path}/latents"):
        message = "^data.name=digits: .*/latents holds cached latents; give the name cache for them"
        with pytest.raises(InputError, match=message):
            open_dataset_of(tiny.config({"data.directory": place}))
    assert [path.name for path in (tmp_path / "latents").iterdir()] == ["0.npy"]


def test_cached_latents_without_a_directory_name_the_field():
    with pytest.raises(InputError, match="^data.directory=: there is no such folder or .zip: give"):
        open_dataset_of(tiny.config({"data.name": "cache"}))


def test_imagenet_without_data_says_how_it_is_prepared():
    with pytest.raises(InputError, match=r"^name=imagenet_latents_256: .* dmf prepare makes one"):
        open_dataset("imagenet_latents_256")
