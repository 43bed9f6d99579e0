"""The statistics of latents that lie beside an autoencoder or cached latents scale the latents."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny
from etils import epath
from safetensors.numpy import save_file
from test_pytorch_files import code, tensor, write_zip

from dmf.checkpoints.convert import source_files
from dmf.checkpoints.latent_statistics import read_statistics
from dmf.cli.config_flag import configured
from dmf.errors import InputError
from dmf.models.build import latents
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.training import prepared_run

STATISTICS = pathlib.Path(tiny.ROOT / "tests/golden/latents_stats.pt")
SCALING = LatentScaling(mean=(0.5, -1.0, 0.25), std=(2.0, 0.5, 4.0))


@pytest.fixture
def cache(tmp_path) -> pathlib.Path:
    """A folder of cached latents with their statistics."""
    rows = {"latents": np.zeros((2, 3, 8, 8), "f"), "labels": np.array([0, 9])}
    save_file(rows, tmp_path / "latents_rank00_shard000.safetensors")
    shutil.copy(STATISTICS, tmp_path)
    return tmp_path


def test_a_file_of_pytorch_is_read():
    """It was written by PyTorch."""
    assert read_statistics(STATISTICS) == SCALING
    assert read_statistics(STATISTICS.parent) is None


def of_parts(**parts) -> bytes:
    """The operations that push a dictionary of tensors, which start at the value 1."""
    return b"}" + b"".join(code(key) + code(part) + b"s" for key, part in parts.items())


def three(*shape: int, offset: int = 1) -> bytes:
    shape = shape or (3,)
    return tensor(shape, tuple(np.cumprod((1, *shape[:0:-1]))[::-1].tolist()), offset)


@pytest.mark.parametrize("structure", [
    of_parts(mean=three()), of_parts(mean=three(), std=3.0), code([1]), three(),
    of_parts(mean=three(2, 2), std=three(2, 2)), of_parts(mean=three(), std=three(2)),
    of_parts(mean=three(), std=three(offset=0)),  # A standard deviation of 0.
    of_parts(mean=three(0), std=three(0)),
])  # fmt: skip
def test_other_contents(structure, tmp_path):
    path = write_zip(tmp_path / "latents_stats.pt", structure)
    with pytest.raises(InputError, match="^.*latents_stats.pt: it must hold a finite mean and a"):
        read_statistics(path)
    write_zip(path, of_parts(mean=three(1, 3, 1, 1), std=three(3, 1, 1, offset=2)))
    assert read_statistics(path) == LatentScaling(mean=(1.0, 2.0, 3.0), std=(2.0, 3.0, 4.0))


def test_they_scale_the_latents_of_the_autoencoder_beside_them(tmp_path):
    (tmp_path / "vae.pt").write_bytes(b"")
    shutil.copy(STATISTICS, tmp_path)
    found = source_files.find(str(tmp_path))
    assert [path.name for path in found.weights] == ["vae.pt"]
    assert found.config == {"latents_mean": list(SCALING.mean), "latents_std": list(SCALING.std)}
    (tmp_path / "config.json").write_text(json.dumps({"scaling_factor": 2.0}))
    assert source_files.find(str(tmp_path / "vae.pt")).config == {"scaling_factor": 2.0}


def test_they_are_downloaded_with_an_autoencoder_of_the_hub(tmp_path, monkeypatch):
    def download(source, repository, file, *, revision=None, needed=True):
        path = epath.Path(tmp_path / repository / file)
        return path if needed or path.exists() else None

    monkeypatch.setattr(source_files, "download", download)
    (tmp_path / "someone/vae").mkdir(parents=True)
    (tmp_path / "someone/vae/vae.pt").write_bytes(b"")
    assert source_files.find("hf:someone/vae/vae.pt").config == {}
    shutil.copy(STATISTICS, tmp_path / "someone/vae")
    assert source_files.find("hf:someone/vae/vae.pt").config["latents_std"] == [2.0, 0.5, 4.0]


def configured_latents(cache, *overrides: str, **fields):
    flags = [f"--config.{field}" for field in (f"data.directory={cache}", *overrides)]
    return latents(configured(tiny.config(fields), flags)[0].latents)


def test_a_run_takes_them_from_the_cache(cache, capsys):
    assert configured_latents(cache, **{"latents.scale": 0.18215}).scaling == SCALING
    assert capsys.readouterr().err == (f"from latents_stats.pt in data.directory={cache}: "
                                       "latents.mean and latents.std of 3 channels\n")
    by_hand = {"latents.mean": (1.0,) * 3, "latents.std": (1.0,) * 3}
    assert configured_latents(cache, **by_hand).mean == (1.0,) * 3
    assert configured_latents(cache, "latents.scale=2.0").scaling == LatentScaling(scale=2.0)
    (cache / "latents_stats.pt").unlink()
    assert configured_latents(cache).scaling == LatentScaling()
    assert not capsys.readouterr().err


def test_another_scaling_than_theirs_is_said(cache, capfd):
    config = tiny.config({"data.directory": str(cache), "data.name": "cache"})
    prepared_run._report_scaling(config)
    assert capfd.readouterr().err.strip() == (
        "latents.scale=1.0, latents.shift=0.0: latents_stats.pt in data.directory states a mean "
        "and a standard deviation of each channel")
    config.latents.update(scale=1.0, mean=(1.0,) * 3, std=(3.0,) * 3)
    prepared_run._report_scaling(config)
    assert not capfd.readouterr().err, "other images of the same autoencoder"
    config.latents.std = (1.0,) * 3
    prepared_run._report_scaling(config)
    assert "states a mean that is more than a standard deviation" in capfd.readouterr().err
