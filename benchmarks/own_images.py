"""README, "Your own images", as a new user does it: its commands in a new folder, with their times.

    python -m benchmarks.own_images --folder=DIR

It draws stand-ins for photographs (coloured shapes on smooth backgrounds, of several sizes and
formats) into DIR, runs each command of README there, from `git clone` and the installation on, and
writes the table of the commands and their times to DIR/own_images.md. The samples are those of
DIR/dmf/runs.
"""

import os
import re
import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from benchmarks.machine import machine, start
from dmf.errors import RunError

ROOT = Path(__file__).resolve().parent.parent
# Name of a class, colour, number of corners of its shapes (0: a disc).
IMAGES = (("Great Dane", (40, 70, 200), 4), ("cat", (205, 40, 45), 0), ("Hen", (30, 150, 60), 3),
          ("owl", (240, 205, 40), 5))  # fmt: skip
OTHERS = (("Black Cab", (20, 20, 20), 6), ("Éclair", (150, 60, 170), 3),
          ("bus", (235, 120, 20), 4))  # fmt: skip
FORMATS = ("JPG", "jpeg", "png", "webp")

_FOLDER = flags.DEFINE_string("folder", None, "a new folder", required=True)
_COUNT = flags.DEFINE_integer("count", 150, "images of a class", lower_bound=1)


def commands() -> list[str]:
    """The commands of README, each on one line."""
    _, _, section = (ROOT / "README.md").read_text().partition("### Your own images\n")
    blocks = re.findall(r"```bash\n(.*?)```", section.partition("`--source` may")[0], re.S)
    return "".join(blocks).replace(" \\\n ", "").splitlines()


def draw(folder: Path, classes: Sequence[tuple[str, tuple, int]], count: int) -> None:
    """Writes images of some classes, in a folder of each."""
    rng = np.random.default_rng(0)
    for name, colour, corners in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = picture(rng, colour, corners)
            image.save(folder / name / f"IMG {i:04}.{FORMATS[i % len(FORMATS)]}")


def picture(rng: np.random.Generator, colour: tuple[int, ...], corners: int) -> Image.Image:
    """A shape on a smooth background, of 48 to 300 pixels in height and width."""
    width, height = rng.integers(48, 300, 2).tolist()
    coarse = Image.fromarray(rng.integers(120, 256, (3, 3, 3), np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    radius = min(width, height) * rng.uniform(0.25, 0.4)
    fill = tuple(np.clip(rng.normal(colour, 12), 0, 255).astype(int).tolist())
    circle = (width / 2, height / 2, radius)
    if corners:
        ImageDraw.Draw(image).regular_polygon(circle, corners, rng.uniform(-15, 15), fill)
    else:
        ImageDraw.Draw(image).circle(circle[:2], radius, fill)
    return image


def run(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Runs the commands in a folder; yields each with its seconds, and those of all processors."""
    places = {"URL": str(ROOT), "IMAGES": str(folder / "images"), "OTHERS": str(folder / "others")}
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for number, command in enumerate(commands()):
        shell = " && ".join(["cd dmf"] * (number > 0) + [". .venv/bin/activate"] * (number > 1))
        filled = re.sub(r"\b(URL|IMAGES|OTHERS)\b", lambda found: places[found[0]], command)
        began, before = time.time(), cpu_seconds()
        done = subprocess.run(["bash", "-c", f"{shell or 'true'} && {filled}"], cwd=folder,
                              env=environment, check=False)  # fmt: skip
        if done.returncode:
            raise RunError(f"exit code {done.returncode}: {command}")
        yield command, time.time() - began, cpu_seconds() - before


def cpu_seconds() -> float:
    """Seconds of processors that the ended processes of this one took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(_: Sequence[str]) -> None:
    """Draws the images, runs the commands and writes the table."""
    folder = Path(_FOLDER.value).resolve()
    draw(folder / "images", IMAGES, _COUNT.value)
    draw(folder / "others", OTHERS, _COUNT.value)
    lines = ["| command | seconds | CPU seconds |", "|---|---|---|"]
    for command, seconds, cpu in run(folder):
        lines.append(f"| `{command}` | {seconds:.0f} | {cpu:.0f} |")
        table = "\n".join(lines)
        (folder / "own_images.md").write_text(f"{table}\n\n{machine()}\n")
    print((folder / "own_images.md").read_text())


if __name__ == "__main__":
    start(main)
