"""tokenizer_image/images.py: every kind of picture is read right or refused with a reason."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests import bad_images
from tests.bad_images import BLUE, RED
from tokenizer_image import images
from tokenizer_image.images import BadImageError, image_to_pixels, open_image
from tokenloom_common.errors import MissingFileError, UserError


def near(found: tuple, expected: tuple, tolerance: int = 6) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", bad_images.REFUSED)
def test_bad_picture_is_refused_with_its_reason_in_one_line(name):
    data, reason = bad_images.REFUSED[name]
    with pytest.raises(BadImageError) as caught:
        open_image(data, "shard.tar/cat.png")
    assert caught.value.reason == reason
    message = str(caught.value)
    assert message.startswith("shard.tar/cat.png: ")
    assert "\n" not in message
    assert "; " in message  # what is wrong; what to do
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("name", bad_images.ACCEPTED)
def test_odd_picture_becomes_8_bit_rgb(name):
    image = open_image(bad_images.ACCEPTED[name])
    assert image.mode == "RGB"
    assert image_to_pixels(image, 8).shape == (8, 8, 3)


def test_path_is_read_and_named_in_messages(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(bad_images.encode(bad_images.photo(), "PNG"))
    bad.write_bytes(bad_images.text_file())
    assert np.array_equal(np.array(open_image(str(good))), np.array(bad_images.photo()))
    with pytest.raises(BadImageError, match=r"bad\.png: not an image"):
        open_image(bad)
    with pytest.raises(MissingFileError, match=r"gone\.png: no such file"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="not a file"):
        open_image(tmp_path)


def test_size_limit_is_checked_before_decoding(monkeypatch):
    def decoded(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", decoded)
    with pytest.raises(BadImageError, match="6000 x 6000"):
        open_image(bad_images.small_bomb())
    with pytest.raises(BadImageError, match="too many pixels"):
        open_image(bad_images.encode(bad_images.photo(), "PNG"), max_pixels=40 * 24 - 1)


def test_a_picture_of_exactly_the_limit_is_read():
    assert open_image(bad_images.encode(bad_images.photo(), "PNG"), max_pixels=40 * 24).size == (40, 24)


def test_exif_rotation_is_applied():
    image = open_image(bad_images.rotated_jpeg())
    assert image.size == (24, 40)
    assert near(image.getpixel((2, 20)), BLUE)
    assert near(image.getpixel((21, 20)), RED)


def test_animation_gives_its_first_frame():
    assert near(open_image(bad_images.animated("GIF")).getpixel((8, 8)), RED)
    assert near(open_image(bad_images.animated("WEBP")).getpixel((8, 8)), RED)


def test_transparency_goes_over_white():
    half = tuple(round((value * 128 + 255 * 127) / 255) for value in RED)
    image = open_image(bad_images.half_transparent_png())
    assert near(image.getpixel((0, 0)), half, 1)
    assert image.getpixel((1, 0)) == (255, 255, 255)
    image = open_image(bad_images.palette_png())
    assert image.getpixel((0, 0)) == RED
    assert image.getpixel((1, 0)) == (255, 255, 255)
    image = open_image(bad_images.grey_alpha_png())
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((1, 0)) == (255, 255, 255)


def test_16_bit_is_scaled_not_clipped():
    grey = open_image(bad_images.grey16_png())
    assert [grey.getpixel((column, 0))[0] for column in range(4)] == [0, 64, 128, 255]
    assert open_image(bad_images.rgb16_png()).getpixel((0, 0)) == (128, 0, 255)


def test_16_bit_grey_keeps_its_transparent_value_white():
    image = Image.fromarray(np.array([[0, 16384]], dtype=np.uint16))
    image.info["transparency"] = 16384
    assert np.array(images.to_rgb(image))[0, :, 0].tolist() == [0, 255]


def test_float_pictures_are_clipped_to_bytes():
    values = np.array([[-3.0, 127.6, 300.0, np.nan]], dtype=np.float32)
    assert np.array(images.to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_cmyk_keeps_its_colours():
    assert near(open_image(bad_images.cmyk_jpeg()).getpixel((8, 8)), RED, 8)


def test_reading_never_tolerates_truncation_globally():
    from PIL import ImageFile

    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_resize_takes_the_centre_square_with_antialiasing():
    stripes = np.zeros((40, 120, 3), dtype=np.uint8)
    stripes[:, 40:80:2] = 255  # the centre square: columns 0, 255, 0, 255 ...
    pixels = image_to_pixels(Image.fromarray(stripes), 10)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (10, 10, 3)
    assert np.abs(pixels[:, 2:-2].astype(int) - 127).max() < 25  # a resize without antialiasing gives 0 or 255
    same = bad_images.photo(16, 16)
    assert np.array_equal(image_to_pixels(same, 16), np.array(same))
    wide = bad_images.photo(40, 16)
    assert np.array_equal(image_to_pixels(wide, 16), np.array(wide)[:, 12:28])


def test_all_256_values_survive_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).view(1, 16, 16, 3)
    image = images.pixels_to_float(pixels)
    assert image.shape == (1, 3, 16, 16)
    assert image.dtype == torch.float32
    assert image.min() == -1.0
    assert image.max() == 1.0
    assert torch.equal(images.float_to_pixels(image), pixels)
    assert torch.equal(images.pixels_to_float(pixels.numpy()), image)


def test_out_of_range_floats_are_clamped():
    image = torch.tensor([-7.0, 7.0, float("nan")]).view(1, 3, 1, 1)
    assert images.float_to_pixels(image).flatten().tolist() == [0, 255, 128]


def test_axes_go_where_they_belong():
    pixels = torch.arange(2 * 3 * 4 * 3, dtype=torch.uint8).view(2, 3, 4, 3)
    image = images.pixels_to_float(pixels)
    assert image.shape == (2, 3, 3, 4)
    assert image[1, 2, 0, 3] == pixels[1, 0, 3, 2] / 127.5 - 1


@pytest.mark.parametrize("wrong", [torch.zeros(1, 4, 4, 3), torch.zeros(4, 4, 3, dtype=torch.uint8),
                                   torch.zeros(1, 3, 4, 4, dtype=torch.uint8)])
def test_wrong_pixels_are_refused(wrong):
    with pytest.raises(ValueError, match="expected uint8 pixels"):
        images.pixels_to_float(wrong)


def test_wrong_images_are_refused():
    with pytest.raises(ValueError, match="expected a float image"):
        images.float_to_pixels(torch.zeros(1, 4, 4, 3))


def test_pixels_become_pictures_and_a_sheet():
    pixels = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    pixels[2] = torch.tensor(RED)
    pictures = images.pixels_to_images(pixels)
    assert [picture.size for picture in pictures] == [(8, 8)] * 3
    sheet = images.image_grid(pictures, columns=2, gap=1)
    assert sheet.size == (17, 17)
    assert sheet.getpixel((0, 16)) == RED
    assert sheet.getpixel((16, 16)) == (255, 255, 255)
    with pytest.raises(ValueError, match="at least 1 picture"):
        images.image_grid([], 2)
