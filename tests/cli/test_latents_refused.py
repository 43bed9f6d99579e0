"""Latents that do not fit together, by whole commands: each ends in one line that says why."""

import pathlib
import re

import diffusers_autoencoders as da
import image_set
import ldm_autoencoder as ldm
import pytest
import tiny
from safetensors.numpy import load_file, save_file

SIDE = 16  # of the images; latents have 8.


def converted(folder: pathlib.Path, name: str, source: pathlib.Path, *flags: str) -> pathlib.Path:
    assert tiny.dmf("convert", source, f"--output={folder / name}", *flags) == 0
    return folder / name


def autoencoders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Three autoencoders of 16 channels: b has another encoder than a, and c another factor."""
    source = da.golden_directory(folder)
    found = {"a": converted(folder, "a", source)}
    weights = source / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"encoder.conv_in.bias": tensors["encoder.conv_in.bias"] + 1}, weights)
    found["b"] = converted(folder, "b", source)
    (folder / "ldm").mkdir()
    save_file(ldm.drawn(ldm.shapes((4, 8, 8), 1, 16)), folder / "ldm/c.safetensors")
    found["c"] = converted(folder, "c", folder / "ldm/c.safetensors", "--groups=2")
    return found


def prepared(folder: pathlib.Path, autoencoder: pathlib.Path, output: str, *flags: str) -> int:
    return tiny.dmf(
        "prepare", f"--source={folder / 'images'}", f"--output={folder / output}", "--nomirror",
        f"--autoencoder={autoencoder}", f"--resolution={SIDE}", "--batch-size=8", *flags,
    )


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_latents_that_do_not_fit_together(tmp_path, capsys):
    image_set.make(tmp_path / "images", count=8, side=SIDE)
    encoded_by = autoencoders(tmp_path)
    assert prepared(tmp_path, encoded_by["a"], "latents_a") == 0
    assert prepared(tmp_path, encoded_by["b"], "latents_b") == 0

    # Shards of two autoencoders in one dataset, and a resolution that an autoencoder cannot take.
    assert prepared(tmp_path, encoded_by["b"], "latents_a") == 2
    assert "latents_a: it holds other work, whose autoencoder_params is " in last_line(capsys)
    assert prepared(tmp_path, encoded_by["c"], "latents_c", "--resolution=18") == 2
    assert last_line(capsys).endswith("resolution=18: the autoencoder takes multiples of 4")

    (tmp_path / "config.py").write_text(
        "import tiny\n\n\ndef get_config():\n"
        "    config = tiny.get_config()\n"
        f"    config.data.directory = '{tmp_path}/latents_a'\n"
        "    config.data.name = 'latents'\n"
        "    config.model.channels, config.model.num_classes = 16, 4\n"
        "    return config\n"
    )
    mixed = tmp_path / "mixed.py"
    mixed.write_text((tmp_path / "config.py").read_text().replace(
        "    return", "    config.data.mixture = {'more': {'name': 'latents', 'directory': "
        f"'{tmp_path}/latents_b'}}}}\n    return"))
    kind = r"an autoencoder of factor {} with 16 latent channels \(encoder \w+\)"
    of_a = kind.format(2)
    for config, flags, message in (
        ("mixed", [], rf"data.mixture.more.directory=\S+: its latents are of {of_a}, and those of "
                      rf"data of {of_a}; mix latents of one$"),
        ("config", [f"latents.autoencoder={encoded_by['b']}"],
         rf"latents.autoencoder=\S+: it is {of_a}, and the latents of data.directory=\S+ are of "),
        ("config", [f"latents.autoencoder={encoded_by['c']}"],
         rf"latents.autoencoder=\S+: it is {kind.format(4)}, and the latents of data.directory="
         rf"\S+ are of {of_a}; give that one$"),
        ("config", ["model.input_size=4"],
         r"data.name=latents: its images have shape \(8, 8, 16\), but config.model takes \(4, 4"),
    ):
        code = tiny.dmf("train", f"--config={tmp_path / config}.py", f"--workdir={tmp_path}/run",
                        *(f"--config.{flag}" for flag in flags))
        line = last_line(capsys)
        assert code == 2
        assert re.search(message, line), line
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_a_part_of_an_autoencoder_alone(part, naming, tmp_path, capsys):
    if naming == "ldm":
        tensors = ldm.drawn(ldm.shapes((4, 8), 1, 3))
    else:
        tensors = load_file(da.golden_directory(tmp_path) / "diffusion_pytorch_model.safetensors")
    source = tmp_path / "part.safetensors"
    save_file({name: tensors[name] for name in tensors if name.startswith(part)}, source)
    assert tiny.dmf("convert", source, f"--output={tmp_path}/out") == 2
    line = last_line(capsys)
    other = {"encoder": "decoder", "decoder": "encoder"}[part]
    assert line.startswith(f"dmf convert: {source}: it holds the {part} of an autoencoder")
    assert line.endswith(f"without its {other}; give the whole autoencoder")
    assert not (tmp_path / "out").exists()
