"""Datasets of latents say which autoencoder they are of, and another one is refused."""

import json

import numpy as np
import pytest
import tiny
from absl import flags as absl_flags
from etils import epath

from dmf.checkpoints import load
from dmf.cli import prepare as cli
from dmf.data import build, prepare
from dmf.data.datasets import InMemoryDataset
from dmf.data.latent_origin import SETTINGS_FILE, check_same_origin, latent_origin, origin_of
from dmf.data.shard_writer import PrepareSettings
from dmf.errors import InputError
from dmf.models import AutoencoderKL
from dmf.models.build import network
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.training import prepared_run

SCALING = LatentScaling(scale=1.5305, shift=0.0609)
SD3 = AutoencoderKL(latent_channels=16, widths=(32,) * 4, quant_conv=False, post_quant_conv=False,
                    default_scaling=SCALING)


def params(encoder: float, decoder: float = 0.0):
    return {"encoder": {"bias": np.float32([encoder])}, "decoder": {"bias": np.float32([decoder])}}


def dataset(folder, encoder: float = 0.0):
    """The directory of a dataset whose latents are of an autoencoder."""
    folder.mkdir(exist_ok=True)
    record = {"settings": {}, "latents": origin_of(SD3, params(encoder)).to_json()}
    (folder / SETTINGS_FILE).write_text(json.dumps(record))
    return folder


def test_a_dataset_says_what_its_latents_are(tmp_path):
    origin = latent_origin(dataset(tmp_path))
    assert origin == origin_of(SD3, params(0))
    assert origin[1:] == (8, 16, SCALING)


@pytest.mark.parametrize("text", [
    "{", "[]", "{}", '{"latents": 3}', '{"latents": {"encoder": "a"}}',
    '{"latents": {"encoder": 1, "factor": 8, "latent_channels": 4, "scaling": {}}}',
    '{"latents": {"encoder": "a", "factor": 8, "latent_channels": 4, "scaling": {"scale": -1}}}',
])  # fmt: skip
def test_a_record_that_says_nothing(tmp_path, text):
    (tmp_path / SETTINGS_FILE).write_text(text)
    assert latent_origin(tmp_path) is None
    assert latent_origin("") is None


def latent_space(monkeypatch, directory, *of: float):
    """The latent space of a network with the latents of `directory` and an autoencoder `of`."""
    monkeypatch.setattr(load, "load_autoencoder", lambda directory: (SD3, params(*of)))
    return load.load_latent_space(tiny.config({
        "model.channels": 16, "latents.autoencoder": "vae", "data.directory": str(directory),
    }))


def test_another_autoencoder_than_that_of_the_latents_is_refused(tmp_path, monkeypatch):
    """Another decoder of the same latents is none."""
    directory = dataset(tmp_path / "latents", encoder=1)
    assert latent_space(monkeypatch, directory, 1.0, 5.0)[0].autoencoder == SD3
    assert latent_space(monkeypatch, tmp_path, 2.0), "nothing says what these latents are"
    kind = r"an autoencoder of factor 8 with 16 latent channels \(encoder \w+\)"
    message = (rf"^latents.autoencoder=vae: it is {kind}, and the latents of data.directory=\S+ "
               rf"are of {kind}; give that one$")
    with pytest.raises(InputError, match=message):
        latent_space(monkeypatch, directory, 2.0)


def test_training_refuses_another_autoencoder_even_where_it_decodes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "load_autoencoder", lambda directory: (SD3, params(2.0)))
    config = tiny.config({
        "model.channels": 16, "latents.autoencoder": "vae", "run.sample_every": 0,
        "data.directory": str(dataset(tmp_path, encoder=1)),
    })  # fmt: skip
    with pytest.raises(InputError, match="^latents.autoencoder=vae: it is an autoencoder of fact"):
        prepared_run._check_autoencoder(config)
    config.run.sample_every = 2
    prepared_run._check_autoencoder(config)  # SampleGridCallback loads it.


def test_a_mixture_of_latents_of_two_autoencoders_is_refused(tmp_path):
    parts = {"data": str(dataset(tmp_path / "a")), "data.mixture.b": str(dataset(tmp_path / "b")),
             "data.mixture.images": ""}
    check_same_origin(parts)
    check_same_origin({"data": ""})
    dataset(tmp_path / "b", encoder=1)
    with pytest.raises(InputError, match=r"^data.mixture.b.directory=\S+: .* of data of an a"):
        check_same_origin(parts)


def test_the_parts_of_a_mixture_are_compared(tmp_path, monkeypatch):
    rows = {"x": np.zeros((2, 8, 8, 1), np.uint8), "y": np.zeros(2, np.int32)}
    opened = InMemoryDataset(name="black", num_classes=10, rows=rows)
    monkeypatch.setattr(build, "_open", lambda *arguments: opened)
    folders = [dataset(tmp_path / name, i) for i, name in enumerate("ab")]
    settings = build.Data(directory=str(folders[0]), mixture={
        "b": build.MixturePart(name="latents", directory=str(folders[1])),
    })
    with pytest.raises(InputError, match="mix latents of one$"):
        build.dataset(settings, network(tiny.config().model))


def test_another_scaling_than_the_stated_one_is_said(tmp_path, capfd):
    config = tiny.config({"data.directory": str(dataset(tmp_path)), "latents.shift": 0.0609})
    prepared_run._report_scaling(config)
    line = capfd.readouterr().err.strip()
    assert line.startswith("latents.scale=1.0, latents.shift=0.0609: the autoencoder of data.d")
    assert line.endswith(str(SCALING))
    config.latents.scale = 1.5305
    prepared_run._report_scaling(config)
    assert not capfd.readouterr().err


def test_the_command_that_trains_has_the_scaling():
    values = absl_flags.FlagValues()
    cli._define(values)
    values(["prepare", "--output=out", "--autoencoder=vae"])
    command = cli._next_command(values, PrepareSettings(resolution=32, autoencoder=SD3), 10)
    assert command.endswith("--config.latents.autoencoder=vae --config.latents.scale=1.5305 "
                            "--config.latents.shift=0.0609")
    assert "--config.model.channels=16 " in command


def test_a_preparation_of_an_earlier_version_resumes(tmp_path):
    """Its settings lack the fields of the autoencoder that are new."""
    old = {"settings": {"resolution": 8, "autoencoder": {"channels": 3}}}
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(old))

    def claim(autoencoder: dict | None) -> None:
        settings = {"resolution": 8, "autoencoder": autoencoder}
        prepare._claim(epath.Path(tmp_path), {"settings": settings})

    claim({"channels": 3, "quant_conv": True})
    for other in ({"channels": 1, "quant_conv": True}, None):
        with pytest.raises(InputError, match="whose autoencoder is {'channels': 3} and not"):
            claim(other)
