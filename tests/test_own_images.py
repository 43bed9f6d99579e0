"""README, "Your own images": its commands lead from a folder of images to samples."""

import json
import re
import shlex

import pytest
import tiny

from benchmarks import own_images
from benchmarks.own_images import IMAGES, OTHERS

# Small enough for a test; the commands are otherwise those of README.
SMALL = ("--config.data.batch_size=8", "--config.run.steps=2", "--config.sampling.steps=1")
NARROW = ("--config.model.depth=5", "--config.model.width=16", "--config.model.heads=2")


def test_ten_commands_lead_to_a_picture():
    commands = own_images.commands()
    assert len(commands) <= 10
    assert commands[0].startswith("git clone ")
    assert commands[-1].startswith("dmf sample ")
    verbs = [shlex.split(command)[1] for command in commands if command.startswith("dmf ")]
    assert verbs == ["prepare", "train", "sample", "prepare", "train", "train", "sample"]


def test_each_drawn_image_can_be_prepared(tmp_path):
    own_images.draw(tmp_path / "images", OTHERS, 1)
    assert tiny.dmf("prepare", f"--source={tmp_path}/images", f"--output={tmp_path}/out",
                    "--resolution=8", "--unreadable=fail") == 0  # fmt: skip


@pytest.mark.slow
def test_the_commands_of_readme_run_and_print_what_comes_next(tmp_path, monkeypatch, capfd):
    own_images.draw(tmp_path / "IMAGES", IMAGES, 4)
    own_images.draw(tmp_path / "OTHERS", OTHERS, 4)
    monkeypatch.chdir(tmp_path)
    told = []
    for command in own_images.commands()[3:]:
        verb, *flags = shlex.split(command)[1:]
        flags += {"train": SMALL, "sample": ["--count=4"]}.get(verb, ())
        is_first = verb == "train" and not any("init.checkpoint" in flag for flag in flags)
        assert tiny.dmf(verb, *flags, *NARROW * is_first) == 0
        told.append(capfd.readouterr().err)
    following = [re.findall("next: (.*)", text) for text in told]
    assert following[0] == ["dmf train --config=dmf:images_sit --workdir=runs/mine_sit "
                            "--config.data.directory=runs/mine"]  # fmt: skip
    assert following[1][1] == ("dmf train --config=dmf:images_dmf --workdir=runs/mine_dmf "
                               "--config.init.checkpoint=runs/mine_sit")
    assert shlex.join(shlex.split(own_images.commands()[8])) == following[4][1]
    assert "has 4 classes, and this run 3: label_embedding is initialised anew" in told[4]
    assert tiny.dmf(*shlex.split(following[5][-1])[1:], "--steps=1", "--count=8") == 0
    stored = json.loads((tmp_path / "runs/others_dmf/config.json").read_text())
    assert stored["data"]["class_names"] == sorted(name for name, _, _ in OTHERS)
    assert (stored["model"]["conditioning"], stored["model"]["width"]) == ("decoupled", 16)
    # Its export knows the names where the images are not at hand.
    assert tiny.dmf("export", "--checkpoint=runs/others_dmf", "--output=runs/export") == 0
    (tmp_path / "runs/others").rename(tmp_path / "moved")
    assert tiny.dmf("sample", "--checkpoint=runs/export", "--output=x.png", "--labels=Black Cab",
                    "--steps=1", "--count=2") == 0  # fmt: skip
