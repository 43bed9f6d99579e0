"""Runs and exports of an earlier dmf: each verb says what to do, and doing it works."""

import json
import pathlib

import golden_values as gv
import jax
import numpy as np
import pytest
import tiny
import tiny_exports
from safetensors.numpy import save_file
from test_convert import refused

from dmf.checkpoints import load
from dmf.checkpoints.convert import namings

REMEDY = "export it with that dmf as --format=safetensors, and bring it in with dmf convert"
# As an earlier dmf wrote it, shortened; "pattern" and "float32" have other names now.
CONFIG = {
    "seed": 3,
    "model": {
        "input_size": 8, "channels": 4, "patch_size": 2, "depth": 4, "width": 48, "heads": 4,
        "mlp_ratio": 4.0, "num_classes": 10, "conditioning": "decoupled", "split_depth": 2,
        "pattern": "split", "embedded_times": ["t", "t-r"], "learned_variance": True,
        "dtype": "bfloat16", "float32": ["residual"],
    },
    "data": {"name": "imagenet_latents_256", "directory": "/home/someone/latents"},
    "latents": {"autoencoder": "", "scale": 0.25, "shift": 0.5, "mean": [], "std": []},
    "objective": {
        "name": "decoupled_mean_flow", "interpolant": "cosine", "time": {"name": "logit_normal"},
        "work": {"shared": True, "null_parts": 0}, "bins": 0,
    },
    "accumulation": 2,
    "sampling": {"sampler": {"name": "ctm", "gamma": 0.25}, "shift": 1.5, "steps": [3]},
}  # fmt: skip


@pytest.fixture
def old_run(tmp_path) -> pathlib.Path:
    folder = tmp_path / "old"
    (folder / "checkpoints/8/average_main").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"format": 1, **CONFIG}))
    return folder


@pytest.mark.parametrize("verb", ["sample", "evaluate", "export"])
def test_what_reads_a_checkpoint_says_what_to_do(old_run, capsys, verb):
    for directory in (old_run, old_run / "checkpoints/8"):
        output = old_run.parent / "out.png"
        assert tiny.dmf(verb, f"--checkpoint={directory}", f"--output={output}") == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last == (f"dmf {verb}: checkpoint={directory}: an earlier dmf wrote it (format 1); "
                        f"{REMEDY}")


def test_a_run_that_starts_from_it_says_what_to_do(old_run, tmp_path, capsys):
    workdir = tmp_path / "new"
    flags = f"--config={tiny.CONFIG}", f"--workdir={workdir}"
    assert tiny.dmf("train", *flags, f"--config.init.checkpoint={old_run}") == 2
    assert f"checkpoint={old_run}: an earlier dmf" in capsys.readouterr().err
    assert not workdir.exists()


def test_a_run_of_it_is_not_resumed(old_run, capsys):
    before = (old_run / "config.json").read_text()
    assert tiny.dmf("train", f"--config={tiny.CONFIG}", f"--workdir={old_run}") == 2
    assert capsys.readouterr().err.strip() == (
        f"dmf train: workdir={old_run}: an earlier dmf wrote it (format 1); {REMEDY}"
    )
    assert (old_run / "config.json").read_text() == before


def test_convert_asks_for_safetensors(old_run, tmp_path, capsys):
    assert REMEDY in refused(capsys, tmp_path, old_run)


def test_a_safetensors_export_is_to_be_converted(old_run, capsys):
    """Also one of today: `dmf sample` does not read it."""
    (old_run / "model.safetensors").write_bytes(b"")
    arguments = f"--checkpoint={old_run}", f"--output={old_run}.png"
    for format_, reason in ((1, "an earlier dmf wrote it (format 1)"), (2, "model.safetensors")):
        stored = load.config_to_json(tiny.config()) | {"format": format_}
        (old_run / "config.json").write_text(json.dumps(stored))
        assert tiny.dmf("sample", *arguments) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert reason in last and last.endswith("; bring it in with dmf convert")


def old_file(folder: pathlib.Path, config=CONFIG) -> pathlib.Path:
    """A safetensors file as an earlier dmf wrote it."""
    path = folder / "old.safetensors"
    tensors = gv.load("dmf_tiny").below("params")
    save_file(tensors, path, metadata={"dmf.config": json.dumps(config)})
    return path


def test_its_safetensors_file_is_converted(tmp_path, capsys):
    output = tmp_path / "new"
    assert tiny.dmf("convert", old_file(tmp_path), f"--output={output}") == 0
    log = capsys.readouterr().err
    assert "an earlier dmf: model, data, latents, sampling, objective.interpolant are kept" in log
    network, config, params = load.load_network(output)
    assert (network.split_depth, network.heads, network.dtype) == (2, 4, "bfloat16")
    assert (network.block_times, network.float32_parts) == ("split", ("residual",))
    assert (config.latents.scale, config.latents.shift) == (0.25, 0.5)
    assert config.sampling.sampler.to_dict() == {"name": "ctm", "gamma": 0.25}
    assert (config.sampling.shift, config.objective.interpolant) == (1.5, "cosine")
    assert (config.data.name, config.data.directory) == ("imagenet_latents_256", "")
    kernel = gv.load("dmf_tiny").below("params")["blocks.1.mlp.fc1.weight"].T
    np.testing.assert_array_equal(params["blocks"]["mlp"]["in"]["kernel"][1], kernel)


def test_what_is_not_kept_of_it_is_said(tmp_path, capsys):
    latents = CONFIG["latents"] | {"autoencoder": "/home/someone/vae"}
    config = CONFIG | {"latents": latents, "sampling": {"sheft": 2.0}}
    output = tmp_path / "new"
    assert tiny.dmf("convert", old_file(tmp_path, config), f"--output={output}") == 0
    log = capsys.readouterr().err
    assert "model, data, latents, objective.interpolant are kept" in log
    assert "sampling.sheft=2.0: Sampling has no such field" in log
    assert "give it with --autoencoder" in log


@pytest.mark.parametrize("section", ["latents", "sampling", "data", "objective"])
def test_a_config_without_a_section_is_refused(tmp_path, capsys, section):
    config = {name: value for name, value in CONFIG.items() if name != section}
    line = refused(capsys, tmp_path, old_file(tmp_path, config))
    assert f"states a config without {section}" in line


def test_its_autoencoder_is_converted(tmp_path):
    """It was one of the encoders; now autoencoders are a kind of their own."""
    network, params = tiny_exports.AUTOENCODER, tiny_exports.params(tiny_exports.AUTOENCODER)
    fields = {"widths": [8, 8, 8], "layers_per_block": 1, "groups": 4, "channels": 3}
    tensors = namings.to_named_tensors(network, params, namings.naming_of(network))
    metadata = {"dmf.config": json.dumps({"encoder": {"name": "autoencoder", **fields}})}
    save_file(tensors, tmp_path / "vae.safetensors", metadata=metadata)
    assert tiny.dmf("convert", tmp_path / "vae.safetensors", f"--output={tmp_path}/vae") == 0
    converted, restored = load.load_autoencoder(tmp_path / "vae")
    assert converted == network
    jax.tree.map(np.testing.assert_array_equal, restored, params)
