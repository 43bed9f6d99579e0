"""README, "Your own images": from a folder of images to a grid of samples, as its commands go."""

import json
import re
import shlex

import numpy as np
import PIL.Image
import pytest
import tiny

# Small enough for a test; the commands are otherwise those that are printed.
SMALL = ("--config.model.depth=5", "--config.model.width=16", "--config.model.heads=2",
         "--config.data.batch_size=8", "--config.run.steps=2",
         "--config.sampling.steps=1")  # fmt: skip


def draw(folder, names, suffix) -> None:
    """Writes images of several sizes in class folders."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(names * 4):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + 5 * i, 40, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / name / f"Photo {i}{suffix}")


@pytest.mark.slow
def test_each_command_prints_the_next_one_to_a_picture_of_ones_own_images(tmp_path, capfd):
    def run(command: str, *more: str) -> list[str]:
        """Runs a command line; returns the command lines that it prints as the next ones."""
        _, verb, *arguments = shlex.split(command)
        assert tiny.dmf(verb, *arguments, *more) == 0
        return re.findall("next: (.*)", printed(capfd))

    draw(tmp_path / "My Photos", ["Great Dane", "cat", "Éclair"], ".JPG")
    (train,) = run(f"dmf prepare '--source={tmp_path}/My Photos' --output={tmp_path}/mine_8 "
                   "--resolution=8")
    sample, flow_map, evaluate = run(train, *SMALL)
    assert "--metrics=label_agreement" in evaluate
    assert run(sample, "--labels=cat,Great Dane", "--count=4") == []
    assert (tmp_path / "mine_8_sit" / "samples.png").exists()
    stored = json.loads((tmp_path / "mine_8_sit" / "config.json").read_text())
    assert stored["data"]["class_names"] == ["Great Dane", "cat", "Éclair"]
    assert stored["model"]["num_classes"] == 3

    # From that flow model to another one of other classes, and from there to a flow map.
    draw(tmp_path / "others", ["owl", "Barn Owl"], ".png")
    (train,) = run(f"dmf prepare --source={tmp_path}/others --output={tmp_path}/others_8 "
                   "--resolution=8")
    assert tiny.dmf(*shlex.split(train)[1:], f"--config.init.checkpoint={tmp_path}/mine_8_sit",
                    *SMALL[-3:]) == 0  # fmt: skip
    told = printed(capfd)
    assert "has 3 classes, and this run 2: label_embedding is initialised anew" in told
    _, flow_map, _ = re.findall("next: (.*)", told)
    sample, evaluate = run(flow_map, *SMALL[-3:])
    run(sample, "--labels=Barn Owl", "--count=2")
    run(evaluate, "--steps=1", "--count=8")
    stored = json.loads((tmp_path / "others_8_dmf" / "config.json").read_text())
    assert stored["data"]["class_names"] == ["Barn Owl", "owl"]
    assert (stored["model"]["conditioning"], stored["model"]["width"]) == ("decoupled", 16)
    # Its export knows the names where the images are not at hand.
    run(f"dmf export --checkpoint={tmp_path}/others_8_dmf --output={tmp_path}/export")
    (tmp_path / "others_8").rename(tmp_path / "moved")
    run(f"dmf sample --checkpoint={tmp_path}/export --output={tmp_path}/x.png --labels=owl "
        "--steps=1 --count=2")


def printed(capfd) -> str:
    """What was printed to standard error."""
    return capfd.readouterr().err
