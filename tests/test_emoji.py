"""The example that draws emoji: its groups, its fonts, and a flow model of what it drew."""

import pathlib

import matplotlib as mpl
import plugin_files
import pytest
import tiny
from PIL import Image

FILE = tiny.ROOT / "examples" / "emoji.py"


@pytest.fixture
def example():
    """The example as a module."""
    with plugin_files.imported(FILE) as module:
        yield module


def test_ten_groups_hold_each_emoji_once(example):
    """The file has the emoji that the documentation counts."""
    groups = example.read_groups()
    emoji = [each for group in groups.values() for each in group]
    assert list(groups) == sorted(groups) and len(groups) == 10
    assert len(emoji) == len(set(emoji)) == 3655
    assert "\N{GRINNING FACE}" in groups["smileys"] and "\N{DOG FACE}" in groups["animals"]


def test_a_font_that_is_not_there(example, monkeypatch, tmp_path):
    """The message says how to install it."""
    monkeypatch.setattr(example, "FOLDERS", (str(tmp_path),))
    with pytest.raises(SystemExit, match=f"is in none of {tmp_path}; install it .*--font=FILE"):
        example.find_font()


def test_fonts_without_colour_bitmaps(example, tmp_path):
    """A font of outlines and a file that is no font are refused, each in a line."""
    outlines = pathlib.Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    with pytest.raises(SystemExit, match="DejaVuSans.ttf has no colour bitmaps; give Noto"):
        example.open_font(outlines)
    (tmp_path / "font.ttf").write_text("no font")
    with pytest.raises(SystemExit, match="font.ttf cannot be used .*; give NotoColorEmoji.ttf"):
        example.open_font(tmp_path / "font.ttf")


@pytest.mark.slow
def test_the_emoji_become_a_dataset_that_trains(example, tmp_path, capsys):
    """Each command of `launch/emoji.sh`, with three steps of training."""
    try:
        font = example.find_font()
    except SystemExit as error:
        pytest.skip(str(error))
    tiny.script(FILE, f"--output={tmp_path}/emoji", f"--font={font}", timeout=300)
    images = list((tmp_path / "emoji").rglob("*.png"))
    assert len(images) > 3000, "an older font lacks some emoji, and no more"
    colours = Image.open(tmp_path / "emoji/smileys/1f600.png").getcolors(136 * 136)
    assert any(red > green > blue for _, (red, green, blue) in colours), "the face is yellow"
    dataset = f"{tmp_path}/emoji_32"
    assert tiny.dmf("prepare", f"--source={tmp_path}/emoji", f"--output={dataset}",
                    "--resolution=32") == 0
    run = f"{tmp_path}/run"
    assert tiny.dmf("train", f"--config={tiny.ROOT}/configs/emoji_sit.py", f"--workdir={run}",
                    f"--config.data.directory={dataset}", "--config.run.steps=3",
                    "--config.optimizer.warmup_steps=1", "--config.run.sample_every=0",
                    "--config.data.batch_size=16") == 0
    assert tiny.dmf("sample", f"--checkpoint={run}", "--steps=1", "--count=4",
                    "--labels=smileys,food", f"--output={tmp_path}/grid.png") == 0
