"""tokenizer_image/tiling.py, on tokenizers small enough to know the answer."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import tiny
from tokenizer_image.tiling import decode_tiled, encode_tiled
from tokenloom_common.errors import UserError

SIDE, CELL = 32, 4  # a tile has 8 x 8 positions
SIZES = [(32, 32), (32, 60), (44, 36), (100, 76), (64, 64)]


class Fake:
    """4 x 4 pixels a position; codes are the rounded mean of their cell, seen through a 3 x 3 window of cells."""

    def __init__(self, depth: int = 1, side: int = SIDE, largest: int = 4, window: int = 3) -> None:
        self.depth, self.grid, self.largest, self.window = depth, (side // CELL, side // CELL * depth), largest, window
        self.config = SimpleNamespace(resolution=side)
        self.batches: list[int] = []

    def _seen(self, batch: Tensor) -> None:
        assert len(batch) <= self.largest
        self.batches.append(len(batch))

    def encode(self, image: Tensor) -> Tensor:
        self._seen(image)
        assert image.shape[2] == image.shape[3] == self.config.resolution
        return self.encode_any(image)

    def encode_any(self, image: Tensor) -> Tensor:
        cells = F.avg_pool2d(image.double().mean(dim=1, keepdim=True), CELL)
        seen = F.avg_pool2d(cells, self.window, stride=1, padding=self.window // 2)  # zeros outside, as convolutions see
        levels = ((seen + 1) * 500).round().long()[:, 0]  # [B, h, w]
        return torch.stack([levels * 10 + d for d in range(self.depth)], dim=3).flatten(2)  # [B, h, w*d]

    def decode(self, codes: Tensor) -> Tensor:
        self._seen(codes)
        assert tuple(codes.shape[1:]) == self.grid
        return self.decode_any(codes)

    def decode_any(self, codes: Tensor) -> Tensor:
        parts = codes.unflatten(2, (-1, self.depth))
        assert torch.equal(parts % 10, torch.arange(self.depth).expand_as(parts))  # a position's codes came together
        levels = (parts[..., 0] // 10).float() / 500 - 1
        pixels = F.interpolate(levels[:, None], scale_factor=CELL, mode="nearest")
        return F.avg_pool2d(pixels, 3, stride=1, padding=1).expand(-1, 3, -1, -1)


def picture(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width)) * 2 - 1


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_local_tokenizer_gives_exactly_the_whole_picture(height, width, depth):
    fake, image = Fake(depth), picture(height, width)
    codes = encode_tiled(fake, image)
    assert codes.shape == (2, height // CELL, width // CELL * depth)
    assert torch.equal(codes, fake.encode_any(image))
    torch.testing.assert_close(decode_tiled(fake, codes), fake.decode_any(codes), rtol=0, atol=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5, 0.7, 0.9])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_pixel_and_code_is_covered_and_weights_sum_to_one(height, width, overlap):
    class Constant(Fake):
        def encode_any(self, image: Tensor) -> Tensor:
            return torch.full((len(image), *self.grid), 7)

        def decode_any(self, codes: Tensor) -> Tensor:
            assert bool((codes == 7).all())
            return torch.full((len(codes), 3, SIDE, SIDE), 0.625)

    fake = Constant()
    codes = encode_tiled(fake, picture(height, width, 1), overlap)
    assert torch.equal(codes, torch.full((1, height // CELL, width // CELL), 7))
    image = decode_tiled(fake, codes, overlap)
    assert image.shape == (1, 3, height, width)
    assert (image - 0.625).abs().max() < 1e-5


def test_codes_come_from_the_tile_where_they_lie_farthest_from_a_border():
    class Numbered(Fake):
        """The code is its distance to the tile's nearest border."""

        def encode_any(self, image: Tensor) -> Tensor:
            place = torch.arange(8)
            near = torch.minimum(place, 7 - place)
            return torch.minimum(near[:, None], near).expand(len(image), -1, -1)

    codes = encode_tiled(Numbered(), picture(32, 56, 1), overlap=0.25)  # tiles start at positions 0 and 6 of 14
    assert codes[0, 3].tolist() == [0, 1, 2, 3, 3, 2, 1, 1, 2, 3, 3, 2, 1, 0]
    assert codes[0, :, 6].tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_no_seam_is_larger_than_a_step_inside_a_tile():
    class Drifting(Fake):
        """Each tile has a shade of its own, as global norms and attention give it, and a gentle slope."""

        def decode_any(self, codes: Tensor) -> Tensor:
            shade = codes.double().mean(dim=(1, 2)).sub(1000).mul(4e-3)
            slope = torch.linspace(0, 0.31, SIDE, dtype=torch.float64)  # 0.01 a pixel
            return (shade[:, None, None, None] + slope).float().expand(-1, 3, SIDE, -1)

    codes = torch.arange(14).mul(30).expand(8, 14)[None].add(800)  # tiles at positions 0 and 6
    image = decode_tiled(Drifting(), codes, overlap=0.25)
    steps = image.diff(dim=3).abs()[0, 0, 0]
    inside = float(steps[4:20].max())
    assert inside == pytest.approx(0.01, abs=1e-6)
    apart = 6 * 30 * 4e-3 - 24 * 0.01  # shade of the second tile less the slope that begins again
    assert float(steps.max()) < inside + apart / 4 + 1e-6  # spread evenly over the 4 pixels in the middle of the overlap


def test_what_lies_nearest_to_a_tiles_border_does_not_show():
    class Framed(Fake):
        """A frame of 2 wrong pixels, where convolutions saw padding."""

        def decode_any(self, codes: Tensor) -> Tensor:
            image = torch.full((len(codes), 3, SIDE, SIDE), -1.0)
            image[..., 2:-2, 2:-2] = 0.5
            return image

    image = decode_tiled(Framed(), torch.zeros(1, 14, 20, dtype=torch.int64), overlap=0.25)  # 8 pixels shared, 2 left out
    assert (image[..., 2:-2, 2:-2] - 0.5).abs().max() < 1e-6
    assert bool((image[..., :2, :] == -1).all())


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_only_batch_size_tiles_are_held_at_a_time(batch_size):
    fake, image = Fake(largest=batch_size), picture(60, 44, 3)
    codes = encode_tiled(fake, image, batch_size=batch_size)
    assert sum(fake.batches) == 3 * 3 * 2
    assert torch.equal(codes, encode_tiled(Fake(), image))
    decode_tiled(fake, codes, batch_size=batch_size)
    assert max(fake.batches) == min(batch_size, 18)


def test_one_tile_is_exactly_encode_and_decode():
    model = tiny.vqgan()
    image = picture(16, 16)
    codes = encode_tiled(model, image)
    assert torch.equal(codes, model.encode(image))
    assert torch.equal(decode_tiled(model, codes), model.decode(codes))


def test_a_vqgan_tiles_pictures_of_any_shape_and_dtype():
    model = tiny.vqgan()
    codes = encode_tiled(model, picture(40, 28, 1))
    image = decode_tiled(model, codes)
    assert codes.shape == (1, 10, 7)
    assert image.shape == (1, 3, 40, 28)
    assert image.abs().max() <= 1
    assert decode_tiled(model.bfloat16(), codes).dtype == torch.bfloat16
    assert encode_tiled(model, picture(40, 28, 0).bfloat16()).shape == (0, 10, 7)
    assert decode_tiled(model, codes[:0]).shape == (0, 3, 40, 28)


@pytest.mark.parametrize(("height", "width", "message"), [
    (33, 62, r"a picture of 33 x 62 .* multiples of 4 x 4 and at least 32 x 32; use 32 x 64"),
    (16, 40, "use 32 x 40"), (31, 31, "use 32 x 32"), (100, 101, "use 100 x 100")])
def test_other_picture_sizes_are_refused_with_the_nearest_valid_one(height, width, message):
    with pytest.raises(UserError, match=message):
        encode_tiled(Fake(), picture(height, width))


def test_other_grids_and_options_are_refused():
    with pytest.raises(UserError, match=r"a grid of codes of 7 x 9 .* use 8 x 9"):
        decode_tiled(Fake(), torch.zeros(1, 7, 9, dtype=torch.int64))
    with pytest.raises(UserError, match="use 8 x 18"):
        decode_tiled(Fake(depth=2), torch.zeros(1, 8, 17, dtype=torch.int64))
    with pytest.raises(UserError, match=r"expected codes \[B, h, w\], got \[1, 64\]"):
        decode_tiled(Fake(), torch.zeros(1, 64, dtype=torch.int64))
    with pytest.raises(UserError, match=r"expected an image \[B, 3, H, W\], got \[3, 32, 32\]"):
        encode_tiled(Fake(), torch.zeros(3, 32, 32))
    for overlap in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"overlap .* is not in \[0, 1\)"):
            encode_tiled(Fake(), picture(32, 32), overlap)
    with pytest.raises(UserError, match="batch_size 0 must be at least 1"):
        decode_tiled(Fake(), torch.zeros(1, 8, 8, dtype=torch.int64), batch_size=0)
