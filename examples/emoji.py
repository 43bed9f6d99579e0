"""Draws emoji in colour as a folder of class folders, which `dmf prepare` makes a dataset of.

    python examples/emoji.py --output=runs/emoji
    dmf prepare --source=runs/emoji --output=runs/emoji_32 --resolution=32
    dmf train --config=configs/emoji_sit.py --workdir=runs/emoji_sit
    dmf train --config=configs/emoji_dmf.py --workdir=runs/emoji_dmf

The font is Noto Color Emoji (SIL Open Font License) with bitmaps, as Debian and Ubuntu have it in
the package `fonts-noto-color-emoji`; `--font=FILE` names it where it is not found. The ten classes
are the groups of `emoji_groups.txt`.
"""

import argparse
import pathlib

from PIL import Image, ImageDraw, ImageFont, features

GROUPS = pathlib.Path(__file__).with_name("emoji_groups.txt")
FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
FONT = "NotoColorEmoji.ttf"
BITMAP_SIZE = 109  # the one size of the font's bitmaps, which are 136 pixels wide
IMAGE_SIZE = 136


def find_font() -> pathlib.Path:
    """Returns the font's file in the folders where systems have their fonts."""
    for folder in FOLDERS:
        for path in sorted(pathlib.Path(folder).expanduser().rglob(FONT)):
            return path
    raise SystemExit(
        f"{FONT} is in none of {', '.join(FOLDERS)}; install it (Debian, Ubuntu: apt install "
        "fonts-noto-color-emoji), or give it by --font=FILE"
    )


def open_font(path: pathlib.Path) -> ImageFont.FreeTypeFont:
    """Returns the font, of which one emoji was drawn in colour."""
    if not features.check("raqm"):
        raise SystemExit("Pillow was built without raqm, which joins code points to one emoji")
    try:
        font = ImageFont.truetype(path, BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)
        colours = draw("\N{GRINNING FACE}", font).getcolors(IMAGE_SIZE**2)
    except OSError as error:
        raise SystemExit(f"--font: {path} cannot be used ({error}); give {FONT}") from error
    if all(red == green == blue for _, (red, green, blue) in colours):
        raise SystemExit(f"--font: {path} has no colour bitmaps; give {FONT} with bitmaps")
    return font


def draw(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Returns an emoji on white, [136, 136] RGB."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    centre = (IMAGE_SIZE / 2, IMAGE_SIZE / 2)
    ImageDraw.Draw(image).text(centre, emoji, font=font, embedded_color=True, anchor="mm")
    return image


def read_groups() -> dict[str, list[str]]:
    """Returns the emoji of each group."""
    lines = (line.split(": ") for line in GROUPS.read_text().splitlines() if line[0] != "#")
    return {
        name: ["".join(chr(int(point, 16)) for point in emoji.split("-")) for emoji in row.split()]
        for name, row in lines
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--font", type=pathlib.Path, help=f"{FONT}, where it is not found")
    flags = parser.parse_args()
    font = open_font(flags.font or find_font())
    one = font.getlength("\N{GRINNING FACE}")
    for group, emoji in read_groups().items():
        folder = flags.output / group
        folder.mkdir(parents=True, exist_ok=True)
        # The font joins the sequences that it has; the others would be drawn side by side.
        drawn = [each for each in emoji if font.getlength(each) == one]
        for each in drawn:
            draw(each, font).save(folder / ("-".join(f"{ord(point):x}" for point in each) + ".png"))
        print(f"{group}: {len(drawn)} of {len(emoji)} emoji")
    print(f"next: dmf prepare --source={flags.output} --output={flags.output}_32 --resolution=32")


if __name__ == "__main__":
    main()
