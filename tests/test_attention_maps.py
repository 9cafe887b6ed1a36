"""Attention to words: against x-transformers' own weights, sums, words to positions, overlays."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from inference import SamplingParams, TextToImage
from inference.attention_maps import attention_to_text, overlay, split_words, word_positions
from seq2seq import ClassLabels, EncoderDecoder, FrozenTextEncoder, TextBatch, TextTokenizer
from seq2seq.layers import layer_blocks
from tests import tiny
from tokenloom_common.errors import UserError

LAYOUT = {"layout_kind": "colors", "layout_classes": 27, "layout_grid": (2, 2)}
CASES = {
    "encoder-decoder": (tiny.seq2seq, {}), "encoder-decoder, grouped, layout": (tiny.seq2seq, {"kv_heads": 1, **LAYOUT}),
    "decoder-only": (tiny.decoder_only, {}),
    "decoder-only, sparse, layout": (tiny.decoder_only, {"attention": ("row",), **LAYOUT}),
    "dalle": (tiny.decoder_only, {"predict_text": True, "text_padding": "learned", "begin_of_image": False}),
    "blind": (tiny.decoder_only, {"text_positions": "blind", "begin_of_image": False})}


def inputs(model):
    text = tiny.text_tokenizer().encode(["a red heart", "a large blue apple tree"])
    tokens = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    return text, tokens, torch.randint(0, 27, (2, 4)) if model.config.layout_grid else None


def test_cross_attention_equals_x_transformers_own_weights():
    model = tiny.seq2seq()
    text, tokens, _ = inputs(model)
    found = attention_to_text(model, text, tokens)
    kept = []
    for blocks in layer_blocks(model.decoder, cross_attend=True):
        attend = blocks[1].block.attend
        attend.flash = False  # its plain implementation keeps the weights
        attend.register_forward_hook(lambda module, args, out: kept.append(out[1].post_softmax_attn))
    with torch.no_grad():
        model(*text, tokens)
    expected = torch.stack(kept).mean(dim=(0, 2))
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_attention_lies_on_real_words_only_and_adds_up(name):
    family, changes = CASES[name]
    model = family(**changes)
    text, tokens, layout = inputs(model)
    weights = attention_to_text(model, text, tokens, layout)
    assert weights.shape == (2, 16, tiny.TEXT_LENGTH)
    assert (weights >= 0).all()
    total = weights.sum(dim=-1)
    if isinstance(model, EncoderDecoder):
        assert torch.allclose(total, torch.ones(2, 16), atol=1e-5)
    else:
        assert (total < 1 + 1e-5).all()  # 1 where there is no begin slot and nothing but text to see
        assert total[:, 1:].max() < 0.999
        assert (total > 0.01).all()
    if name != "dalle":  # whose padding is learned and seen
        assert (weights.masked_select(~text.text_mask[:, None, :].expand_as(weights)) == 0).all()
    if name == "blind":
        real = weights[0, :, text.text_mask[0]]
        assert (real - real[:, :1]).abs().max() < 1e-6  # a flat mean of the words, which is what blind means


def test_hooks_leave_the_model_as_it_was():
    model = tiny.decoder_only()
    text, tokens, _ = inputs(model)
    with torch.no_grad():
        before = model(*text, tokens).image
    attention_to_text(model, text, tokens)
    with torch.no_grad():
        assert torch.equal(before, model(*text, tokens).image)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_words_are_found_in_the_pieces_of_each_vocabulary(tmp_path):
    sentencepiece = TextTokenizer.train(tiny.CAPTIONS, 320, 30)
    pieces = sentencepiece.words("a large blue apple tree")
    at = word_positions(sentencepiece, "a large blue apple tree", "Apple Tree")
    assert "".join(pieces[i] for i in at).replace("▁", "") == "appletree"
    bert = FrozenTextEncoder.load(str(tiny.bert_folder(tmp_path / "bert")), 10)
    assert word_positions(bert, "a red heart", "heart") == [3]
    assert word_positions(bert, "heart a heart", "heart") == [1, 3]
    assert word_positions(ClassLabels.collect(["red heart"]), "red heart", "red heart") == [0]


@pytest.mark.parametrize("word", ["star", "", "red star", "ear"])
def test_a_word_that_is_not_there_is_refused(word):
    with pytest.raises(UserError, match="has no word"):
        word_positions(ClassLabels.collect(["red heart"]), "red heart", word)
    with pytest.raises(UserError, match=r"its pieces: .*"):
        word_positions(tiny.text_tokenizer(), "a red heart", word)


class Pieces:
    """A text source of given pieces."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = list(pieces)

    def words(self, caption: str) -> list[str]:
        return self.pieces


@pytest.mark.parametrize(("caption", "pieces", "expected"), [
    ("A  red heart", ["▁a", "▁r", "ed", "▁", "heart", "</s>"], {"A": [0], "red": [1, 2], "heart": [3, 4]}),
    ("red 🐙, blue", ["▁red", "▁", "<0xF0>", "<0x9F>", "<0x90>", "<0x99>", ",", "▁blue", "</s>"],
     {"red": [0], "🐙,": [1, 2, 3, 4, 5, 6], "blue": [7]}),
    ("red heart here", ["▁red", "▁he", "</s>"], {"red": [0], "heart": [1]}),  # cut: no room for the last word
    ("a cat's tail", ["[CLS]", "a", "cat", "'", "s", "tail", "[SEP]"], {"a": [1], "cat's": [2, 3, 4], "tail": [5]}),
    ("one zyx tail", ["[CLS]", "one", "[UNK]", "ta", "##il", "[SEP]"], {"one": [1], "zyx": [2], "tail": [3, 4]}),
    ("a zyxly tail", ["▁a", "▁", "<unk>", "ly", "▁tail", "</s>"], {"a": [0], "zyxly": [1, 2, 3], "tail": [4]}),
    ("red apple, tree", ["<|startoftext|>", "red</w>", "app", "le</w>", ",</w>", "tree</w>", "<|endoftext|>"],
     {"red": [1], "apple,": [2, 3, 4], "tree": [5]}),
    ("red heart", ["red", "Ġhe", "art"], {"red": [0], "heart": [1, 2]}),
    ("red heart", ["red heart"], {"red heart": [0]}),
    ("", ["</s>"], {})])
def test_a_caption_is_split_into_words_with_their_pieces(caption, pieces, expected):
    words = split_words(Pieces(*pieces), caption)
    assert {caption[at.start: at.stop]: positions for at, positions in words} == expected


def test_the_words_of_a_vocabulary_are_those_that_are_found_one_by_one(tmp_path):
    caption = "a large blue apple tree"
    bert = FrozenTextEncoder.load(str(tiny.bert_folder(tmp_path / "bert")), 10)
    for source in (TextTokenizer.train(tiny.CAPTIONS, 320, 30), bert):
        words = split_words(source, caption)
        assert [caption[at.start: at.stop] for at, _ in words] == caption.split()
        assert [positions for _, positions in words] == [word_positions(source, caption, word) for word in caption.split()]


@pytest.mark.parametrize("layout", [False, True])
def test_a_result_shows_where_a_word_is(tmp_path, layout):
    model = TextToImage.from_pretrained(tiny.model_folder(tmp_path / "m", **(LAYOUT if layout else {})), device="cpu")
    result = model.generate("a red heart", num_images=2, params=SamplingParams(guidance_scale=1.0))
    maps = [result.attention("heart", picture) for picture in range(2)]
    assert maps[0].shape == (4, 4)
    assert not torch.equal(*maps)
    text = TextBatch(*model.text_tokenizer.encode(["a red heart"]))
    weights = attention_to_text(model.seq2seq, text, result.image_tokens[1:], result.layouts[1:] if layout else None)
    expected = weights[0][:, word_positions(model.text_tokenizer, "a red heart", "heart")].sum(dim=1)
    assert torch.allclose(maps[1].flatten(), expected, atol=1e-6)
    words = model.word_maps("a red heart", result.image_tokens[1:], result.layouts[1:] if layout else None)
    assert [word.word for word in words] == ["a", "red", "heart"]
    assert torch.equal(words[2].weights, maps[1])
    assert result.attention_overlay("red").size == result.images[0].size
    with pytest.raises(UserError, match="pictures 0 to 1"):
        result.attention("red", 2)


def test_the_overlay_is_bright_where_attention_is_high():
    picture = Image.new("RGB", (32, 32), (120, 120, 120))
    shown = overlay(picture, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert sum(shown.getpixel((2, 2))) > 2 * sum(shown.getpixel((29, 29)))
    assert overlay(picture, torch.zeros(2, 2)).size == (32, 32)
