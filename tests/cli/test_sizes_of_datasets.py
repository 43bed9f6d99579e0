"""A network takes its sizes from its dataset, or from the checkpoint that it starts from."""

import re
import shlex

import numpy as np
import PIL.Image
import plugin_files
import pytest
import tiny
from ml_collections import ConfigDict

from dmf import registry
from dmf.cli.config_flag import configured, resolved
from dmf.cli.train import next_commands
from dmf.data.build import Data, data, dataset_sizes, names_to_store
from dmf.data.datasets import InMemoryDataset
from dmf.errors import InputError
from dmf.models.build import network
from dmf.training import prepared_run

OPEN = {"model.input_size": -1, "model.channels": -1, "model.num_classes": -1, "data.name": ""}


@pytest.fixture(autouse=True)
def _pictures():
    """Registered datasets: fifty pictures of 6 x 6 in colour of four classes, and wide ones."""

    def dataset(width):
        rows = {"x": np.zeros((50, 6, width, 3), np.uint8), "y": np.zeros(50, np.int32)}
        return InMemoryDataset(name="pictures", num_classes=4, rows=rows)

    with plugin_files.registered_components():
        registry.register("dataset", pictures=lambda *, split, directory: dataset(6),
                          wide=lambda *, split, directory: dataset(9))
        yield


def sizes(config: ConfigDict) -> tuple[int, int, int]:
    return config.model.input_size, config.model.channels, config.model.num_classes


def test_sizes_are_those_of_the_dataset(capsys):
    config = tiny.config(OPEN)
    made, _ = configured(config, ["--config.data.name=pictures"])
    assert sizes(made) == (6, 3, 4)
    assert "model.input_size=6, model.channels=3, model.num_classes=4\n" in capsys.readouterr().err
    made, _ = configured(config, ["--config.data.name=pictures", "--config.model.num_classes=0"])
    assert sizes(made) == (6, 3, 0)
    assert sizes(configured(tiny.config(), ["--config.data.name=pictures"])[0]) == (8, 1, 10)


@pytest.mark.parametrize("flags", [[], ["--config.init.checkpoint={}"]])
def test_sizes_and_data_are_those_of_the_initial_checkpoint(flags):
    run = str(tiny.flow_run())
    config = tiny.flow_map(OPEN | {"init.checkpoint": "" if flags else run})
    made, _ = configured(config, [flag.format(run) for flag in flags])
    assert (*sizes(made), made.data.name) == (8, 1, 10, "digits")
    made, _ = configured(config, [*(flag.format(run) for flag in flags),
                                  "--config.data.name=pictures"])
    assert (*sizes(made), made.data.name) == (8, 1, 4, "pictures")


def test_sizes_that_cannot_be_taken_are_one_line():
    for name, message in (("", "^data.directory=: give the directory of a dataset, for example"),
                          ("wide", "^data.name=wide: its samples are 6 x 9, and networks take sq")):
        with pytest.raises(InputError, match=message):
            configured(tiny.config(OPEN | {"data.name": name}), [])
    with pytest.raises(InputError, match="^data.directory=.*docs: give the directory of a dataset"):
        configured(tiny.config(OPEN | {"data.directory": str(tiny.ROOT / "docs")}), [])
    with pytest.raises(InputError, match="^init.checkpoint=/nowhere: it holds no config.json"):
        configured(tiny.config(OPEN | {"init.checkpoint": "/nowhere"}), [])
    with pytest.raises(InputError, match="^model.input_size=-1: .* looked up by the commands"):
        network(tiny.config(OPEN).model)


def test_the_command_that_prepare_prints_trains_a_network_of_these_sizes(tmp_path, capsys):
    for i, name in enumerate(("Great Dane", "cat", "cat")):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        picture = PIL.Image.fromarray(np.full((9 + i, 12, 3), i, np.uint8))
        picture.save(tmp_path / "images" / name / f"{i}.png")
    output = tmp_path / "mine 8"
    assert tiny.dmf("prepare", f"--source={tmp_path}/images", f"--output={output}",
                    "--resolution=8") == 0  # fmt: skip
    command = shlex.split(re.search("next: (.*)", capsys.readouterr().err)[1])
    verb, file, workdir, *overrides = command[1:]
    assert (verb, file, workdir) == ("train", "--config=dmf:images_sit", f"--workdir={output}_sit")
    config = resolved(file.removeprefix("--config="), overrides)
    assert (*sizes(config), config.data.name) == (8, 3, 2, "images")
    assert dataset_sizes(data(config.data)).samples == 3
    assert prepared_run._with_class_names(config).data.class_names == ("Great Dane", "cat")


def test_a_run_stores_names_that_are_names_and_fit():
    for names in (("cat", "7"), ("Great Dane", "Éclair")):
        assert names_to_store(names) == names
    for names in (("0", "1"), ("caf\udce9", "b"), ("a\0", "b"), ("a\nb",), ("",), (),
                  ("a" * 2**17, "b" * 2**17)):  # fmt: skip
        assert names_to_store(names) == ()
    with pytest.raises(InputError, match="^class_names=.*: give names that can be printed"):
        Data(class_names=("a\nb",))


def test_a_flow_model_ends_with_the_command_that_makes_a_flow_map():
    *_, command, evaluate = next_commands(tiny.config(), "runs/a_sit/", [], "dmf:digits_sit")
    assert command == ("dmf train --config=dmf:digits_dmf --workdir=runs/a_dmf "
                       "--config.init.checkpoint=runs/a_sit/")
    assert evaluate == "dmf evaluate --checkpoint=runs/a_sit/"
    file = f"{tiny.ROOT}/configs/images_sit.py"
    assert file.replace("sit", "dmf") in list(next_commands(tiny.config(), "runs/a", [], file))[-2]
    for other in ("dmf:digits_dmf", "dmf:sit", "dmf:sit:b2_sit", ""):
        assert len(list(next_commands(tiny.config(), "runs/a", [], other))) == 2


def test_few_images_are_evaluated_by_their_labels_alone():
    """The distance of pixels needs more images than an image has values."""
    few = {"data.name": "pictures"}
    assert list(next_commands(tiny.config(few), "a", []))[1:] == [
        "dmf evaluate --checkpoint=a --metrics=label_agreement"]
    assert len(list(next_commands(tiny.config(few | {"model.num_classes": 0}), "a", []))) == 1
    for fields in ({"evaluation.protocol": "adm"}, {"evaluation.reference": "x.npz"},
                   {"data.name": "wide"}):  # fmt: skip
        *_, evaluate = next_commands(tiny.config(few | fields), "a", [])
        assert evaluate == "dmf evaluate --checkpoint=a"
