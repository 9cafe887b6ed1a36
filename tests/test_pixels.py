"""From image tokens to pixels: the same whatever is decoded beside them, and empty where nothing is drawn."""

from __future__ import annotations

import pytest
import torch

from inference.pixels import PixelDecoder, fill_tokens
from tests import tiny
from tests.test_tokenizer_contract import CONFIGS
from tokenizer_image import build_tokenizer
from tokenizer_image.neutral import neutral_tokens


def test_pixels_do_not_depend_on_what_is_decoded_beside_them(monkeypatch):
    decoder = PixelDecoder(tiny.vqgan(), torch.device("cpu"))
    decode, batches = decoder.image_tokenizer.decode, []
    monkeypatch.setattr(decoder.image_tokenizer, "decode", lambda codes: batches.append(len(codes)) or decode(codes))
    # 16 x 16 px: from 128 images on, the tokenizer takes another layout of memory
    tokens = torch.randint(0, 32, (130, 16), generator=torch.Generator().manual_seed(0))
    together = decoder.decode(tokens)
    assert set(batches) == {1}  # this tiny network may round alike in any batch; larger ones do not
    for number in (0, 7, 129):
        [alone] = decoder.decode(tokens[number: number + 1])
        assert alone.tobytes() == together[number].tobytes()


def test_what_is_not_drawn_is_filled_with_the_neutral_code():
    neutral = torch.arange(10, 16)
    assert fill_tokens(torch.tensor([[1, 2], [3, 4]]), neutral).tolist() == [[1, 2, 12, 13, 14, 15], [3, 4, 12, 13, 14, 15]]
    assert fill_tokens(torch.arange(6)[None], neutral).tolist() == [list(range(6))]

    decoder = PixelDecoder(tiny.vqgan(), torch.device("cpu"))
    tokens = torch.randint(0, 32, (1, 16), generator=torch.Generator().manual_seed(0))
    [partial], [empty] = decoder.decode_partial(tokens[:, :4]), decoder.decode_partial(tokens[:, :0])
    whole = torch.cat([tokens[:, :4], neutral_tokens(tiny.vqgan())[None, 4:]], dim=1)
    assert partial.tobytes() == decoder.decode(whole)[0].tobytes() != empty.tobytes()


def test_the_neutral_code_is_nearest_to_the_mean_of_what_training_saw():
    tokenizer = tiny.vqgan()
    book = tokenizer.quantizer.vq._codebook
    vectors = tokenizer.codebook
    counts = torch.zeros(32)
    counts[[3, 9]] = torch.tensor([2.0, 30.0])
    book.cluster_size.copy_(counts[None])
    mean = (2 * vectors[3] + 30 * vectors[9]) / 32
    nearest = int((vectors - mean).norm(dim=1).argmin())
    assert neutral_tokens(tokenizer).tolist() == [nearest] * 16
    book.cluster_size.zero_()  # codes that learned by gradient are not counted
    nearest = int((vectors - vectors.mean(dim=0)).norm(dim=1).argmin())
    assert neutral_tokens(tokenizer).tolist() == [nearest] * 16


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tokenizer_has_neutral_tokens_that_it_can_decode(name):
    tokenizer = build_tokenizer(CONFIGS[name]).eval()
    tokens = neutral_tokens(tokenizer)
    assert tokens.shape == (tokenizer.num_tokens,)
    assert len(set(tokens.tolist())) <= tokenizer.depth
    images = PixelDecoder(tokenizer, torch.device("cpu")).decode(tokens[None])
    assert images[0].size == (CONFIGS[name].resolution,) * 2


def test_the_depths_of_a_residual_quantizer_add_up():
    tokenizer = build_tokenizer(CONFIGS["vqgan-residual"]).eval()
    with torch.no_grad():
        for depth, layer in enumerate(tokenizer.quantizer.layers):
            torch.manual_seed(depth)
            layer.vq._codebook.embed.copy_(torch.randn_like(layer.vq._codebook.embed) * 0.1**depth)  # coarse to fine
            layer.vq._codebook.cluster_size.fill_(0)
            layer.vq._codebook.cluster_size[0, 5 + depth] = 1
    assert neutral_tokens(tokenizer)[:4].tolist() == [5, 6, 5, 6]
