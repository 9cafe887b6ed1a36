"""Pictures above the limit: JPEGs are read at a fraction of their size, others are refused with advice that can be followed."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests import bad_images, command_line, launching, tiny
from tests.bad_images import BLUE, RED, encode
from tests.command_line import contents
from tokenizer_image import large_images
from tokenizer_image.images import MAX_IMAGE_PIXELS, BadImageError, image_to_pixels, open_image

MIB = 1 << 20


def halves(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Red above blue."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width, height // 2))
    return image.convert(mode)


def resized_header(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header states another size; its pixels end early."""
    at = re.search(rb"\xff[\xc0\xc2]..\x08", data, re.DOTALL).end()
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4:]


run = command_line.run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=["baseline", "progressive", "4:4:4"])
@pytest.mark.parametrize(("size", "limit", "shrunk"), [
    ((1100, 1101), 400_000, (550, 551)), ((2200, 2090), 400_000, (550, 523)), ((4099, 4097), 300_000, (513, 513)),
    ((1100, 1101), 1100 * 1101, (1100, 1101)),
    ((1100, 1100), 1100 * 1100 - 1, (550, 550)), ((1101, 1101), 551 * 551, (551, 551))])
def test_a_jpeg_above_the_limit_is_read_at_the_largest_fraction_below(size, limit, shrunk, options):
    image = open_image(encode(halves(*size), "JPEG", **options), max_pixels=limit)
    assert image.size == shrunk
    assert np.abs(np.array(image.resize((1, 2), Image.Resampling.BOX), dtype=int)[:, 0] - [RED, BLUE]).max() <= 6


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_are_shrunk_too(mode):
    image = open_image(encode(halves(1200, 1100, mode), "JPEG"), max_pixels=500_000)
    assert (image.mode, image.size) == ("RGB", (600, 550))
    assert image.getpixel((9, 9)) != image.getpixel((9, 540))


def test_a_shrunk_jpeg_is_the_one_that_would_be_resized_anyway():
    photo = Image.fromarray(np.asarray(bad_images.photo(1600, 1600), dtype=np.uint8)).resize((1600, 1600))
    data = encode(photo, "JPEG", quality=95)
    whole, shrunk = (image_to_pixels(open_image(data, max_pixels=limit), 64).astype(int)
                     for limit in (MAX_IMAGE_PIXELS, 700_000))
    assert np.abs(whole - shrunk).mean() < 1.5


def test_a_shrunk_jpeg_is_upright_and_of_its_first_picture():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image = open_image(encode(halves(1200, 1100), "JPEG", exif=exif), max_pixels=500_000)
    assert image.size == (550, 600)
    assert abs(image.getpixel((540, 300))[0] - RED[0]) <= 6
    two = BytesIO()
    halves(1200, 1100).save(two, "MPO", save_all=True, append_images=[Image.new("RGB", (1200, 1100), "lime")])
    image = open_image(two.getvalue(), max_pixels=500_000)
    assert image.size == (600, 550)
    assert abs(image.getpixel((300, 10))[0] - RED[0]) <= 6


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_formats_are_refused_with_their_size_and_the_option(format_name):
    data = encode(halves(700, 600), format_name)
    with pytest.raises(BadImageError, match=r"^x: too many pixels: 700 x 600 is over the limit of 300,000; resize it, or raise "
                                            r"the limit \(--data.max_pixels\)$"):
        open_image(data, "x", max_pixels=300_000, limit_name="--data.max_pixels")
    assert open_image(data, max_pixels=420_000).size == (700, 600)


def test_where_no_option_raises_the_limit_none_is_named(run, folder, tmp_path):
    Image.new("1", (6000, 6000)).save(tmp_path / "a.png")
    shown = run("generate", "x", "--layout", tmp_path / "a.png", "--model", folder, "--out", tmp_path / "o", "--device", "cpu")
    assert shown.code == 2
    assert "over the limit of 25,000,000; resize it" in shown.err[0]
    assert "or raise" not in shown.err[0]


@pytest.mark.parametrize("size", [(20_000, 1_300), (900, 900)])
def test_a_strip_is_not_shrunk_below_what_a_model_sees(size):
    with pytest.raises(BadImageError, match="is over the limit"):
        open_image(encode(Image.new("L", size), "JPEG"), max_pixels=size[0] * 250)


def test_bombs_are_refused_from_their_header(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    jpeg = resized_header(encode(halves(64, 64), "JPEG"), 65_535, 65_535)
    progressive = resized_header(encode(halves(64, 64), "JPEG", progressive=True), 30_000, 20_000)
    png = bad_images.raw_png(65_535, 65_535, 8, 2, b"")
    for data in (jpeg, progressive, png):
        for limit in (MAX_IMAGE_PIXELS, 200_000_000):
            with pytest.raises(BadImageError, match="too many pixels: "):
                open_image(data, max_pixels=limit)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "BMP"])
def test_a_raised_limit_goes_beyond_pillows_own_and_leaves_it_alone(monkeypatch, format_name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # as if the picture were that large
    data = encode(halves(700, 600), format_name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data, max_pixels=700 * 600).size == (700, 600)
    assert Image.MAX_IMAGE_PIXELS == 10_000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(BytesIO(data))


def test_what_pillow_itself_refuses_is_advised_to_be_another_format(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(BadImageError, match="more than Pillow reads of this format; resize it, or save it as a JPEG"):
        open_image(encode(halves(700, 600), "WEBP"))


def test_tiles_of_a_picture_beyond_pillows_own_limit_are_cut(run, folder, tmp_path, monkeypatch):
    halves(70, 60).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    shown = run("reconstruct", tmp_path / "a.png", "--tiles", "--model", folder, "--out", tmp_path / "out", "--device", "cpu")
    assert (shown.code, shown.err) == (0, [])


@pytest.mark.long
def test_a_large_jpeg_takes_the_memory_of_its_fraction(tmp_path):
    # whole it would be 64 MB of grey pixels, and 192 of RGB
    Image.new("L", (8_000, 8_000), 90).save(tmp_path / "a.jpg")
    code = ("import resource, sys; from tokenizer_image.images import open_image\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "assert open_image(sys.argv[1], max_pixels=1_100_000).size == (1000, 1000)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jpg")], cwd=launching.REPOSITORY, capture_output=True,
                          env=launching.environment(), check=True, timeout=120)
    assert int(done.stdout) * (1 if sys.platform == "darwin" else 1024) < 40 * MIB


def test_a_cut_jpeg_is_still_truncated():
    data = encode(bad_images.photo(1200, 1100), "JPEG")
    with pytest.raises(BadImageError) as caught:
        open_image(data[: len(data) // 2], max_pixels=500_000)
    assert caught.value.reason == "truncated"


def test_the_decoder_picks_no_other_fraction_than_the_one_asked_for():
    for width in range(1024, 1045):
        with open_image_of(width, 1031) as image:
            assert large_images.shrink_jpeg(image, 600_000)
            assert image.size == (-(-width // 2), 516)


def open_image_of(width: int, height: int) -> Image.Image:
    return large_images.open_image_file(BytesIO(encode(Image.new("L", (width, height)), "JPEG")), ("JPEG",))


# ---- reconstruct


def test_reconstruct_reads_large_jpegs_and_takes_a_limit(run, folder, tmp_path):
    halves(1200, 1100).save(tmp_path / "a.jpg")
    halves(1200, 1100).save(tmp_path / "a.png")
    base = ["--model", folder, "--out", tmp_path / "out", "--device", "cpu", "--max-pixels"]
    assert run("reconstruct", tmp_path / "a.jpg", *base, 500_000).code == 0
    assert run("reconstruct", tmp_path / "a.png", *base, 1_320_000).code == 0
    before = contents(tmp_path / "out")

    shown = run("reconstruct", tmp_path / "a.png", *base, 500_000)
    assert (shown.code, shown.out) == (2, [])
    assert shown.err[0].endswith("1200 x 1100 is over the limit of 500,000; resize it, or raise the limit (--max-pixels)")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_tiles_never_shrink_a_picture(run, folder, tmp_path, kind):
    halves(1200, 1100).save(tmp_path / f"a.{kind}")
    shown = run("reconstruct", tmp_path / f"a.{kind}", "--tiles", "--model", folder, "--out", tmp_path / "out", "--device",
                "cpu", "--max-pixels", 500_000)
    assert shown.code == 2
    assert shown.err[0].endswith("resize it, or raise the limit (--max-pixels)")


@pytest.mark.parametrize(("value", "words"), [("0", "must be at least 1"), ("-3", "must be at least 1"),
                                              ("many", "invalid int")])
def test_a_limit_that_is_none_is_refused_before_the_model_is_loaded(run, tmp_path, value, words):
    shown = run("reconstruct", "a.png", "--model", tmp_path / "nowhere", "--out", tmp_path / "out", f"--max-pixels={value}")
    assert shown.code == 2
    assert "--max-pixels" in shown.err[0]
    assert words in shown.err[0]
