"""A run takes from its initial checkpoint what it must share with it, and contradicts it aloud."""

import json
import pathlib
import shutil

import golden_in_context as gic
import jax
import pytest
import tiny
from etils import epath
from ml_collections import ConfigDict

from dmf.checkpoints import load
from dmf.checkpoints.params import write_config_and_card, write_params
from dmf.cli.config_flag import configured
from dmf.default_config import get_config
from dmf.errors import InputError
from dmf.runtime.sharding import make_mesh
from dmf.training import build, initial_checkpoint
from dmf.training.initial_checkpoint import check_same

# A config file made for another flow model.
OTHER = {"model.width": 96, "model.depth": 4, "latents.scale": 0.5,
         "objective.interpolant": "cosine"}  # fmt: skip


@pytest.fixture
def own_run(tmp_path) -> pathlib.Path:
    """A flow model that was trained on data of its own."""
    run = tmp_path / "run"
    shutil.copytree(tiny.flow_run(), run)
    config = json.loads((run / "config.json").read_text())
    config["data"] |= {"name": "mine", "directory": "/data/mine", "classes": [1, 2]}
    config["latents"]["autoencoder"] = "/data/vae"
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_a_checkpoint_of_the_command_line_gives_sizes_latents_and_path():
    init = f"--config.init.checkpoint={tiny.flow_run()}"
    config, taken = configured(tiny.flow_map(OTHER), [init])
    assert (config.model.width, config.model.depth, config.latents.scale) == (32, 2, 1.0)
    assert config.objective.interpolant == "linear"
    assert taken == ["model.depth=2", "model.width=32", "latents.scale=1.0",
                     "objective.interpolant=linear"]  # fmt: skip
    assert (config.model.conditioning, config.model.split_depth) == ("decoupled", 1)
    build.recipe(config, build.mesh(config.mesh))
    check_same(config)


def test_what_the_command_line_gives_is_kept_and_refused_where_it_contradicts():
    init = f"--config.init.checkpoint={tiny.flow_run()}"
    config, taken = configured(tiny.flow_map(OTHER), [init, "--config.model.width=64"])
    assert config.model.width == 64
    assert "model.depth=2" in taken
    with pytest.raises(InputError, match=r"^model.width=64: init.checkpoint=.* has 32; give the"):
        initial_checkpoint.pretrained(config, build.network(config.model), build.mesh(config.mesh))


@pytest.mark.parametrize("field", OTHER)
def test_a_file_that_names_its_checkpoint_keeps_what_it_changes(field):
    given = tiny.flow_map({"init.checkpoint": str(tiny.flow_run()), field: OTHER[field]})
    config, taken = configured(given, [])
    assert config == given
    assert taken == []
    with pytest.raises(InputError, match=f"^{field}={OTHER[field]}: init.checkpoint="):
        check_same(config)


def test_a_run_of_ones_own_gives_its_data(own_run):
    config, _ = configured(tiny.flow_map(), [f"--config.init.checkpoint={own_run}"])
    assert (config.data.name, config.data.directory) == ("mine", "/data/mine")
    assert config.data.classes == (1, 2)
    assert config.data.batch_size == 16
    assert config.latents.autoencoder == "/data/vae"


@pytest.mark.parametrize("overrides", [["data.name=other"], ["data.directory=/other"]])
def test_other_data_are_kept(own_run, overrides):
    flags = [f"--config.{field}" for field in overrides]
    config, _ = configured(tiny.flow_map(), [f"--config.init.checkpoint={own_run}", *flags])
    field, _, value = overrides[0].partition("=")
    assert config.data[field.removeprefix("data.")] == value
    assert config.data.classes == ()


def test_an_export_gives_no_paths(own_run):
    shutil.rmtree(own_run / "checkpoints")
    config, _ = configured(tiny.flow_map(), [f"--config.init.checkpoint={own_run}"])
    assert (config.data.name, config.data.directory) == ("digits", "")
    assert config.latents.autoencoder == ""


def test_other_classes_have_a_new_label_embedding_and_a_line_says_so(capfd):
    init = {"init.checkpoint": str(tiny.flow_run())}
    config = tiny.flow_map(init | {"model.num_classes": 4})
    kept = pretrained_names(tiny.flow_map(init))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(f"{tiny.flow_run()} has no log_variance: initialised anew")
    assert kept - pretrained_names(config) == {"label_embedding"}
    labels, _ = capfd.readouterr().err.splitlines()
    assert labels.endswith("has 10 classes, and this run 4: label_embedding is initialised anew")


def test_as_many_classes_of_other_names_keep_the_embedding_and_a_line_says_so(own_run, capfd):
    fields = json.loads((own_run / "config.json").read_text())
    fields["data"]["class_names"] = list("abcdefghij")
    (own_run / "config.json").write_text(json.dumps(fields))
    for names, lines in ((tuple("abcdefghij"), 0), (tuple("abcdefghix"), 1), ((), 0)):
        config = tiny.config({"init.checkpoint": str(own_run), "data.class_names": names,
                              "latents.autoencoder": "/data/vae"})  # fmt: skip
        assert "label_embedding" in pretrained_names(config)
        assert capfd.readouterr().err.count("as many classes of other names") == lines


def pretrained_names(config: ConfigDict) -> set[str]:
    """The parameters at the top that a run takes from its initial checkpoint."""
    made = build.network(config.model)
    return set(initial_checkpoint.pretrained(config, made, build.mesh(config.mesh)))


def test_a_flow_map_has_the_wide_head_of_its_flow_model():
    config, _ = configured(tiny.flow_map(), [f"--config.init.checkpoint={tiny.flow_run()}"])
    check_same(config)
    config.model.wide_head.depth = 2
    with pytest.raises(InputError, match=r"^model\.wide_head=.*'depth': 2.* has .*'depth': 0"):
        check_same(config)


def test_a_checkpoint_without_a_velocity_head_trains_none(tmp_path):
    """As published files for sampling are; a network for sampling may start from either."""
    with_head, without = (
        load.export_config(gic.network("imf_tiny", velocity_head=head), {},
                           load.config_to_json(get_config())) for head in (True, False)
    )
    config = ConfigDict(with_head)
    config.init.checkpoint = str(tmp_path)
    for its, refused in ((with_head, False), (without, True)):
        (tmp_path / "config.json").write_text(json.dumps({"format": 2, **its}))
        if refused:
            message = f"^init.checkpoint={tmp_path}: it has no velocity head, which this run trains"
            with pytest.raises(InputError, match=message):
                check_same(config)
        config.model.velocity_head = config.model.velocity_head and not refused
        check_same(config)


def test_no_embedding_of_an_in_context_network_may_be_missing(tmp_path):
    """They are not zero at first, as those that a DiT gets in addition."""
    network, params = gic.network("imf_tiny"), dict(gic.params("imf_tiny"))
    del params["interval_embedding"]
    write_params(epath.Path(tmp_path), params)
    write_config_and_card(epath.Path(tmp_path), {}, "", origin="drawn")
    with pytest.raises(InputError, match="interval_embedding"):
        load.load_params(network, tmp_path, "", mesh=make_mesh(devices=jax.devices()[:1]),
                         allow_missing=network.added_by_training)
