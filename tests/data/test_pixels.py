"""From arrays to pictures: rounding, the layout of a grid, and a PNG that holds every value."""

import numpy as np
import PIL.Image
import pytest

from dmf.data import pixels
from dmf.errors import InputError


@pytest.mark.parametrize(
    ("value", "level"),
    [(-1.0, 0), (1.0, 255), (-7.0, 0), (9.0, 255), (0.0, 128), (100 / 127.5 - 1, 100),
     (100.49 / 127.5 - 1, 100), (100.51 / 127.5 - 1, 101), (254.6 / 127.5 - 1, 255)],
)
def test_values_round_to_the_nearest_level(value, level):
    assert pixels.to_uint8(np.full((1, 1, 1), value, np.float32)).item() == level


def test_every_level_survives_the_way_to_floats_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(pixels.to_uint8(levels.astype(np.float32) / 127.5 - 1), levels)


def test_a_grid_goes_row_by_row_on_white():
    sheet = pixels.grid(np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), columns=3)
    w = 255
    expected = [
        [w, w, w, w, w, w, w],
        [w, 0, w, 1, w, 2, w],
        [w, w, w, w, w, w, w],
        [w, 3, w, 4, w, w, w],
        [w, w, w, w, w, w, w],
    ]
    np.testing.assert_array_equal(sheet[..., 0], expected)


def test_zoom_repeats_pixels():
    picture = np.array([[[1], [2]]], np.uint8)[None]
    sheet = pixels.grid(picture, columns=1, gap=0, zoom=2)
    np.testing.assert_array_equal(sheet[..., 0], [[1, 1, 2, 2], [1, 1, 2, 2]])


def test_captions_name_groups_and_columns_and_change_no_pixel():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(8, 1).repeat(8, 2)
    names = ["0", "1", "2", "0", "1"]
    sheet = pixels.captioned_grid({"1 step": images, "2 steps": images}, names, 3, zoom=2)[..., 0]
    width, strip, row = 2 * (3 * 9 + 1), 20, 2 * 9  # Captions of classes stand above once.
    alone = pixels.grid(images, 3, zoom=2)[..., 0]
    assert len(sheet) == strip + 4 * row + 2
    # Each group begins a row, so that a column keeps its class.
    for top in (strip, strip + 2 * row):
        np.testing.assert_array_equal(sheet[top : top + 2 * row + 2, -width:], alone)
    left, above = sheet[:, :-width], sheet[:strip]
    assert (above[:, :-width] == 255).all() and (above[:, -width:].min() < 128)
    dark = [left[strip + i * row : strip + (i + 1) * row].min() < 128 for i in range(4)]
    assert dark == [True, False, True, False]


def test_captions_stand_above_each_row_of_other_classes_and_are_cut():
    images = np.zeros((4, 8, 8, 3), np.uint8)
    ones = pixels.captioned_grid({"": images}, ["", "", "", ""], 2)
    rows = pixels.captioned_grid({"": images}, ["0", "1", "2", "3"], 2)
    long = pixels.captioned_grid({"": images}, ["a long name of a class"] * 4, 2)
    assert [len(sheet) - len(ones) for sheet in (ones, rows, long)] == [0, 40, 20]
    assert ones.shape[1:] == rows.shape[1:] == long.shape[1:]


@pytest.mark.parametrize(("side", "zoom"), [(8, 6), (32, 2), (256, 1), (16, 3)])
def test_small_images_are_enlarged(side, zoom):
    assert pixels.zoom_factor(side) == zoom


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_what_was_written(tmp_path, channels):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    pixels.write_png(tmp_path / "picture.png", picture)
    read = np.asarray(PIL.Image.open(tmp_path / "picture.png"))
    np.testing.assert_array_equal(read.reshape(picture.shape), picture)


def test_latents_are_no_picture(tmp_path):
    with pytest.raises(InputError, match="4 channels.*decode"):
        pixels.write_png(tmp_path / "picture.png", np.zeros((2, 2, 4), np.uint8))
    assert not any(tmp_path.iterdir())
