"""What becomes of an image's own mode: 8 bits of red, green and blue."""

import io

import numpy as np
import pytest
from PIL import Image

from acmix.data.sources import as_rgb, check_colour


def glyph(mode):
    """Black on a transparent ground, whose colour is black too."""
    alpha = np.zeros((4, 4), dtype=np.uint8)
    alpha[1:3, 1:3] = 255
    black = Image.new("L", (4, 4))
    image = Image.merge("LA", (black, Image.fromarray(alpha)))
    if mode in ("RGB", "P"):  # one value is transparent
        image = Image.fromarray(255 - alpha).convert(mode)
        image.info["transparency"] = (255, 255, 255) if mode == "RGB" else 255
        return image
    return image.convert(mode)


def stored(image, form):
    file = io.BytesIO()
    image.save(file, form)
    return Image.open(file)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_lies_on_the_background(mode):
    image = stored(glyph(mode), "png")
    assert image.mode == mode
    shown = np.asarray(as_rgb(image))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[1, 1].tolist() == [0, 0, 0]
    assert np.asarray(as_rgb(image, "#102030"))[0, 0].tolist() == [16, 32, 48]


def test_half_transparency_is_mixed():
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert np.unique(np.asarray(as_rgb(half))).tolist() == [127]


def test_opaque_images_stay_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(as_rgb(image, "red")), pixels[..., :3])


@pytest.mark.parametrize("background", ["wite", "#12", "", "12,3,4"])
def test_what_is_no_colour_is_refused(background):
    with pytest.raises(ValueError, match=r"^data.background: expected a colour such as white"):
        check_colour(background)


SIXTEEN = np.full((4, 4), 256 * 77 + 9, dtype=np.uint16)


@pytest.mark.parametrize("form", ["png", "ppm", "tiff"])
def test_sixteen_bits_keep_their_brightness(form):
    image = stored(Image.fromarray(SIXTEEN), form)
    assert np.unique(np.asarray(as_rgb(image))).tolist() == [77]


@pytest.mark.parametrize("value", [-1, 1 << 16])
def test_more_bits_are_refused(value):
    image = Image.fromarray(np.full((2, 2), value, dtype=np.int32))
    with pytest.raises(ValueError, match=f"expected 8 or 16 bits a channel, got .* {value}"):
        as_rgb(image)


def test_floating_point_numbers_are_refused():
    with pytest.raises(ValueError, match="expected 8 or 16 bits a channel, got floating-point"):
        as_rgb(Image.new("F", (2, 2)))
