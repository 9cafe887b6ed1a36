"""LlamaGen's transformers go out bit for bit; models that its code cannot express are refused."""

from __future__ import annotations

import json

import pytest
import torch

from inference.checkpoints import convert, export_checkpoint
from inference.checkpoints.files.weights_file import read_weights
from inference.checkpoints.formats.llamagen_gpt import LAYOUT
from inference.checkpoints.writing import write_converted
from tests import tiny
from tests.llamagen_files import GROUPED, make_parts, options, saved
from tests.llamagen_reference import TEXT, make_state
from tests.test_export_vqgan import bits
from tokenloom_common.errors import UserError


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize(("sizes", "dtype"), [
    (GROUPED, torch.float32), (GROUPED, torch.float16), (GROUPED, torch.bfloat16), (TEXT, torch.float32),
    (TEXT, torch.bfloat16)])
def test_it_comes_back_bit_for_bit(parts, tmp_path, sizes, dtype):
    state = {name: tensor.to(dtype) for name, tensor in make_state(sizes).items()}
    torch.save({"model": state}, tmp_path / "in.pt")
    write_converted(convert("llamagen-gpt", tmp_path / "in.pt", options(parts, sizes)), tmp_path / "in.pt", tmp_path / "ours")
    out = export_checkpoint("llamagen-gpt", tmp_path / "ours", tmp_path / "out.pt")
    assert bits(torch.load(out, weights_only=True)["model"]) == bits(state)
    assert out.stat().st_size < 1.3 * (tmp_path / "in.pt").stat().st_size  # no tensor drags a larger one along
    if sizes is GROUPED:
        alone = export_checkpoint("llamagen-gpt", tmp_path / "ours" / "seq2seq", tmp_path / "alone.safetensors")
        assert bits(read_weights(alone, LAYOUT).tensors) == bits(state)


TINY = {"text_vocab_size": 11, "text_length": 1, "feedforward_bias": False, "norm_eps": 1e-5, "qk_norm": False,
        "learned_positions": False, "begin_of_image": False, "text_positions": "blind"}


@pytest.mark.parametrize(("changes", "words"), [
    ({"norm_eps": None}, "norm_eps None, only 1e-05"), ({"norm": "layernorm"}, "norm 'layernorm', only 'rmsnorm'"),
    ({"feedforward": "geglu"}, "feedforward 'geglu'"), ({"feedforward_bias": True}, "feedforward_bias True"),
    ({"qk_norm": True}, "qk_norm True"), ({"attention_bias": True}, "attention_bias True"),
    ({"rotary": "1d"}, "rotary '1d', only '2d'"), ({"learned_positions": True}, "learned_positions True"),
    ({"begin_of_image": True}, "begin_of_image True"), ({"text_positions": "seen"}, "text_positions 'seen', only 'blind'"),
    ({"norm_placement": "sandwich"}, "norm_placement 'sandwich'"), ({"embedding_norm": True}, "embedding_norm True"),
    ({"predict_text": True}, "predict_text True"), ({"text_padding": "learned"}, "text_padding 'learned'"),
    ({"text_length": 2}, "text_length 2, only 1"), ({"attention": ("full", "row")}, "attention .'full', 'row', 'full'."),
    ({"grid": (2, 8)}, r"grid \(2, 8\), only a square one"), ({"head_dim": 8}, "head_dim 8, only width / heads = 16"),
    ({"layout_kind": "colors", "layout_classes": 27, "layout_grid": (2, 2), "begin_of_image": True}, "begin_of_image True"),
    ({"text_vocab_size": None, "text_feature_width": 6, "text_length": 6, "text_projection": "linear"}, "text_projection"),
    ({"text_vocab_size": None, "text_feature_width": 6, "text_length": 6, "text_projection": "mlp"}, "give the whole model")])
def test_models_that_it_cannot_express_are_refused_by_the_field(tmp_path, changes, words):
    tiny.decoder_only(**{**TINY, **changes}).save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match=words) as caught:
        export_checkpoint("llamagen-gpt", tmp_path / "ours", tmp_path / "out.pt")
    assert str(tmp_path / "ours") in str(caught.value)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(("name", "value"), [("padding", "right"), ("null_features", False)])
def test_text_that_it_reads_in_another_way_is_refused(parts, tmp_path, name, value):
    saved(tmp_path / "t2i.pt", TEXT)
    write_converted(convert("llamagen-gpt", tmp_path / "t2i.pt", options(parts, TEXT)), tmp_path / "t2i.pt", tmp_path / "ours")
    path = tmp_path / "ours" / "text_tokenizer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UserError, match=f"cannot express {name} {value!r}"):
        export_checkpoint("llamagen-gpt", tmp_path / "ours", tmp_path / "out.pt")


def test_other_kinds_of_models_are_not_exported(tmp_path):
    tiny.seq2seq().save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match="LlamaGen cannot express kind 'encoder_decoder'"):
        export_checkpoint("llamagen-gpt", tmp_path / "ours", tmp_path / "out.pt")
    tiny.model_folder(tmp_path / "whole")
    with pytest.raises(UserError, match="cannot express kind 'encoder_decoder'"):
        export_checkpoint("llamagen-gpt", tmp_path / "whole", tmp_path / "out.pt")
