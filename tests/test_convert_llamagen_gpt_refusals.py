"""Files, configs and options that are no whole LlamaGen transformer are refused in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from inference import SamplingParams, TextToImage
from inference.checkpoints import ConvertOptions, convert, from_checkpoint
from inference.checkpoints.rules import ConvertedPart
from tests.llamagen_files import CLASSES, make_parts, options, saved
from tests.llamagen_reference import TEXT, Sizes, make_state
from tokenizer_image import VQGAN
from tokenloom_common.errors import UserError


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


def changed(path: Path, sizes: Sizes, change) -> None:
    state = make_state(sizes)
    change(state)
    torch.save({"model": state}, path)


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: s.pop("layers.1.attention.wo.weight"), r"1 missing \(layers.1.attention.wo.weight\)"),
    (lambda s: s.update({"head.bias": torch.ones(3)}), r"1 unexpected \(head.bias\)"),
    (lambda s: s.update({"norm.weight": torch.ones(31)}), r"1 mis-shaped \(norm.weight \[31\], which give \[31\]"),
    (lambda s: s.update({"layers.0.attention.wqkv.weight": torch.ones(97, 32)}), r"wqkv.weight \[97, 32\], which do not go"),
    (lambda s: s.update({"layers.1.feed_forward.w3.weight": torch.ones(95, 32)}), r"w3.weight \[95, 32\] and .*not go"),
    (lambda s: s.update({"tok_embeddings.weight": torch.ones(32)}), r"tok_embeddings.weight is of shape \[32\], expected"),
    (lambda s: s.pop("layers.0.feed_forward.w1.weight"), "lacks layers.0.feed_forward.w1.weight"),
    (lambda s: s.pop("cls_embedding.embedding_table.weight"), "neither cls_embedding.embedding_table.weight nor"),
    (lambda s: s.update({"layers.7.norm.weight": torch.ones(32)}), r"42 missing .* and 37 more\); 1 unexpected"),
    (lambda s: s.update({"layers.9999.norm.weight": torch.ones(32)}), "the shapes say: layers"),
    (lambda s: [s.pop(name) for name in list(s) if name.startswith("layers.")], "lacks layers.0.attention.wqkv")])
def test_files_that_are_not_whole_are_refused_with_what_they_lack(parts, tmp_path, change, words):
    changed(tmp_path / "c2i.pt", CLASSES, change)
    with pytest.raises(UserError, match=words) as caught:
        convert("llamagen-gpt", tmp_path / "c2i.pt", options(parts, CLASSES))
    assert str(tmp_path / "c2i.pt") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("sizes", "changes", "words"), [
    (CLASSES, {"text_encoder": "x"}, "leave --text-encoder out"), (TEXT, {"classes": Path("README.md")}, "leave --classes out"),
    (CLASSES, {"config": None}, "2 layers of width 32 are no published size.*n_head"),
    (CLASSES, {"image_tokenizer": None}, "does not say its grid of codes"),
    (CLASSES, {"image_tokenizer": None, "resolution": 40}, "not a multiple of 16"),
    (CLASSES, {"resolution": 64}, "is for 16 px; convert it with --resolution 64"),
    (CLASSES, {"like_transformers": True}, "--like-transformers is not read"),
    (CLASSES, {"classes": Path("README.md")}, "lines, the transformer 10 classes")])
def test_options_that_do_not_fit_are_refused(parts, tmp_path, sizes, changes, words):
    saved(tmp_path / "model.pt", sizes)
    with pytest.raises(UserError, match=words):
        convert("llamagen-gpt", tmp_path / "model.pt", options(parts, sizes, **changes))


@pytest.mark.parametrize(("text", "words"), [
    ("n_heads: 2", "unknown key 'n_heads'; did you mean 'n_head'"), ("n_head: 3", "3 heads do not divide its width 32"),
    ("n_head: two", "n_head"), ("n_head: 2\nrope_base: 500000", "rope_base 500000"),
    ("n_head: 2\nblock_size: 15", "block_size 15 is not a square"),
    ("n_head: 2\nblock_size: 64", "its grid is 4 x 4, the transformer's is 8 x 8"),
    ("n_head: 2\ndim: 64", "its weights have dim 32, its config says 64"), ("- 2", "expected a mapping")])
def test_wrong_configs_are_refused(parts, tmp_path, text, words):
    saved(tmp_path / "model.pt", CLASSES)
    (tmp_path / "config.yaml").write_text(text + "\n")
    with pytest.raises(UserError, match=words):
        convert("llamagen-gpt", tmp_path / "model.pt", options(parts, CLASSES, config=tmp_path / "config.yaml"))


def test_a_resolution_that_its_config_denies_is_refused(tmp_path):
    saved(tmp_path / "model.pt", CLASSES)
    (tmp_path / "config.yaml").write_text("n_head: 2\nblock_size: 16\n")
    given = {"config": tmp_path / "config.yaml", "image_tokenizer": None}
    with pytest.raises(UserError, match="block_size 16 is 4 x 4 codes, 64 px; leave --resolution out"):
        convert("llamagen-gpt", tmp_path / "model.pt", ConvertOptions(**given, resolution=128))
    for resolution in (None, 64):
        part = convert("llamagen-gpt", tmp_path / "model.pt", ConvertOptions(**given, resolution=resolution))
        assert isinstance(part, ConvertedPart)
        assert part.config.grid == (4, 4)


@pytest.mark.parametrize(("line", "words"), [("Tench", r"line 3: 'Tench' again \(line 1\)"), ("", "line 3: empty")])
def test_wrong_names_of_classes_are_refused(parts, tmp_path, line, words):
    saved(tmp_path / "c2i.pt", CLASSES)
    (tmp_path / "names.txt").write_text("\n".join(["tench", "eel", line, *map(str, range(7))]) + "\n")
    with pytest.raises(UserError, match=words):
        convert("llamagen-gpt", tmp_path / "c2i.pt", options(parts, CLASSES, classes=tmp_path / "names.txt"))


def test_tokenizers_of_another_model_are_refused(parts, tmp_path):
    saved(tmp_path / "t2i.pt", dataclasses.replace(TEXT, features=(6, 20)))
    with pytest.raises(UserError, match="its features are 24 wide, those that the transformer reads 20"):
        convert("llamagen-gpt", tmp_path / "t2i.pt", options(parts, TEXT))
    saved(tmp_path / "c2i.pt", dataclasses.replace(CLASSES, codes=40))
    with pytest.raises(UserError, match=r"has 32 codes, c2i\.pt draws 40"):
        convert("llamagen-gpt", tmp_path / "c2i.pt", options(parts, CLASSES))


def test_other_kinds_of_files_are_refused(parts, tmp_path):
    torch.save({"state_dict": VQGAN.from_pretrained(parts / "vq").state_dict()}, tmp_path / "vq.pt")
    with pytest.raises(UserError, match="no tensor is called tok_embeddings"):
        convert("llamagen-gpt", tmp_path / "vq.pt", options(parts, CLASSES))
    (tmp_path / "text.pt").write_text("no")
    with pytest.raises(UserError, match="not a whole torch checkpoint"):
        convert("llamagen-gpt", tmp_path / "text.pt", options(parts, CLASSES))
    with pytest.raises(UserError, match="no weights of LlamaGen"):
        convert("llamagen-gpt", parts, options(parts, CLASSES))


def test_it_is_a_model_in_memory_too(parts, tmp_path):
    saved(tmp_path / "c2i.pt", CLASSES)
    model = from_checkpoint("llamagen-gpt", tmp_path / "c2i.pt", parts / "heads2.yaml", image_tokenizer=parts / "vq")
    assert isinstance(model, TextToImage)
    assert model.generate("3", params=SamplingParams(top_k=4), seed=1).images[0].size == (16, 16)
