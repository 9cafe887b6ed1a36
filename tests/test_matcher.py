"""The matcher, its folder and its scores; published models in its place."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from inference.scoring.matcher import MAX_SCALE, Matcher, MatcherConfig
from inference.scoring.matcher_folder import (
    MatcherScorer,
    load_matcher,
    load_matcher_folder,
    save_matcher_folder,
)
from seq2seq.losses import mask_text, masked_text_loss
from tests import tiny
from tokenizer_image.images import image_to_pixels, pixels_to_float
from tokenloom_common.config import merge
from tokenloom_common.errors import MissingFileError, UserError
from training.config.matcher import MatcherLossConfig
from training.objectives.matcher import MatcherWithTextHead, contrastive_loss

# ---- the model ----

def test_vectors_have_length_one_and_padding_says_nothing():
    model = tiny.matcher()
    text_ids, mask = tiny.text_tokenizer().encode(tiny.CAPTIONS[:6])
    out = model(torch.rand(6, 3, 16, 16) * 2 - 1, text_ids, mask)
    for part in out:
        assert part.shape == (6, 16)
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(6))
    other = torch.where(mask, text_ids, 7)
    torch.testing.assert_close(model.embed_captions(other, mask), out.text)
    with pytest.raises(ValueError, match=r"the matcher reads \[B, 3, 16, 16\]"):
        model.embed_images(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("features", [False, True])
def test_every_parameter_learns(features):
    changes = {"text_vocab_size": None, "text_feature_width": 6, "layers": 0} if features else {}
    model = tiny.matcher(**changes).train()
    objective = MatcherWithTextHead(model, MatcherLossConfig(mlm_weight=0.0 if features else 0.5))
    text, mask = tiny.text_tokenizer().encode(tiny.CAPTIONS[:12])
    masked: tuple = ()
    if features:
        text = torch.randn(*text.shape, 6)
    else:
        masked = mask_text(text, model.config.text.text_vocab_size, torch.Generator().manual_seed(0))
    out = objective(torch.randn(12, 3, 16, 16), text, mask, *masked)
    loss = contrastive_loss(out.embeddings, out.scale, torch.eye(12, dtype=torch.bool))
    if masked:
        loss = loss + masked_text_loss(out.text_logits, text[masked[1]])
    loss.backward()
    missing = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


IMAGE = {"resolution": 16, "channels": 8, "channel_multipliers": [1, 2], "norm_groups": 4}
IMAGE_CHANGES = {"resolution": 32, "channels": 16, "channel_multipliers": [1, 2, 2], "num_res_blocks": 2, "norm_groups": 2}


@pytest.mark.parametrize("name", IMAGE_CHANGES)
def test_every_field_of_the_image_tower_changes_it(name):
    base = {"text": tiny.matcher().config.text.plain(), "embed_dim": 16}
    models = []
    for image in (IMAGE, {**IMAGE, name: IMAGE_CHANGES[name]}):
        torch.manual_seed(0)
        models.append(Matcher(MatcherConfig.parse({**base, "image": image}, "test")).eval())
    shapes = [{n: tuple(p.shape) for n, p in model.named_parameters()} for model in models]
    if shapes[0] != shapes[1]:
        return
    side = IMAGE_CHANGES["resolution"] if name == "resolution" else 16
    with torch.no_grad():
        small, changed = models[0].image_tower(torch.ones(1, 3, 16, 16)), models[1].image_tower(torch.ones(1, 3, side, side))
    assert not torch.allclose(small, changed)


@pytest.mark.parametrize(("image", "text", "words"), [
    ({"resolution": 18}, {}, "resolution 18 cannot be halved once for each of 2 stages"),
    ({"channels": 6}, {}, "channels 6 x 1 must be a positive multiple of norm_groups 4"),
    ({"channel_multipliers": [0]}, {}, "channels 8 x 0"),
    ({"chanels": 8}, {}, "did you mean 'image.channels'"),
    ({}, {"layers": 0}, "layers 0 leaves the caption's words without their neighbours"),
    ({}, {"heads": 3, "kv_heads": 2}, "kv_heads 2 must divide heads 3")])
def test_impossible_shapes_are_refused(image, text, words):
    base = tiny.matcher().config.plain()
    with pytest.raises(UserError, match=words):
        MatcherConfig.parse(merge(base, {"image": image, "text": text}), "test")


def test_the_temperature_starts_and_ends_where_the_paper_has_it():
    model = tiny.matcher()
    assert float(model.scale.detach()) == pytest.approx(1 / 0.07)
    assert not model.clamp_scale()
    with torch.no_grad():
        model.logit_scale.fill_(5.0)
    assert model.clamp_scale()
    assert float(model.scale.detach()) == pytest.approx(100)
    assert pytest.approx(math.log(100)) == MAX_SCALE


# ---- the folder and the scores ----

@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.matcher_folder(tmp_path_factory.mktemp("matchers") / "m")


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_saving_and_loading_change_nothing(folder):
    model = tiny.matcher()
    scorer = load_matcher(folder, device="cpu")
    assert isinstance(scorer, MatcherScorer)
    assert scorer.matcher.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(scorer.matcher.state_dict()[name], tensor)
    images, captions = tiny.pictures(3), ["a red heart", "octopus"]
    expected = MatcherScorer(model, tiny.text_tokenizer()).scores(images, captions)
    assert torch.equal(scorer.scores(images, captions), expected)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "matcher", "matcher_index.json", "text_tokenizer"]


def test_scores_are_cosines_of_the_towers_and_do_not_depend_on_the_batch(folder):
    scorer = load_matcher_folder(folder)
    images, captions = tiny.pictures(5, side=24), tiny.CAPTIONS[:7]
    pixels = pixels_to_float(numpy.stack([image_to_pixels(image, 16) for image in images]))
    with torch.no_grad():
        out = scorer.matcher(pixels, *scorer.text_source.encode(captions[:5]))
    expected = torch.nn.functional.cosine_similarity(out.image[:, None], out.text[None], dim=-1)
    found = scorer.scores(images, captions)
    assert found.shape == (5, 7)
    torch.testing.assert_close(found[:, :5], expected, atol=1e-6, rtol=0)
    scorer.batch_size = 2
    torch.testing.assert_close(scorer.scores(images, captions), found, atol=1e-6, rtol=0)
    transparent = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    torch.testing.assert_close(scorer.embed_images([transparent]), scorer.embed_images([Image.new("RGB", (16, 16), "white")]))


@pytest.mark.parametrize(("images", "captions", "words"), [
    ([], ["a"], "no picture given"), (tiny.pictures(1), [], "no caption given"),
    (tiny.pictures(1), "a cat", "give a list of captions"), (tiny.pictures(1)[0], ["a"], "give a list of pictures, got Image"),
    (["cat.png"], ["a"], "picture 0 is str, expected a PIL image"),
    (tiny.pictures(1), ["a", b"b"], "caption 1 is bytes, expected text")])
def test_wrong_calls_are_refused_in_words(folder, images, captions, words):
    with pytest.raises(UserError, match=words):
        load_matcher_folder(folder).scores(images, captions)


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**values, **changes}.items() if v is not None}))


@pytest.mark.parametrize(("damage", "error", "words"), [
    (lambda f: (f / "matcher_index.json").unlink(), MissingFileError, "matcher_index.json is missing, so this is not a"),
    (lambda f: shutil.rmtree(f / "matcher"), MissingFileError, "matcher/ is missing"),
    (lambda f: shutil.rmtree(f / "text_tokenizer"), MissingFileError, "text_tokenizer/ is missing"),
    (lambda f: (f / "matcher" / "config.json").unlink(), MissingFileError, "config.json is missing"),
    (lambda f: (f / "matcher" / "model.safetensors").unlink(), MissingFileError, "weights are missing"),
    (lambda f: (f / "matcher" / "model.safetensors").write_bytes(b"cut"), UserError, "not a whole safetensors file"),
    (lambda f: (f / "matcher_index.json").write_text("{"), UserError, "cannot be read"),
    (lambda f: edit(f / "matcher_index.json", _class_name="CLIPModel"), UserError, "expected 'Matcher'"),
    (lambda f: edit(f / "matcher_index.json", schema_version=9), UserError, "schema_version 9"),
    (lambda f: edit(f / "matcher" / "config.json", embed_dim=17), UserError, "2 mis-shaped"),
    (lambda f: edit(f / "matcher" / "config.json", embed_dims=17), UserError, "did you mean 'embed_dim'"),
    (lambda f: edit(f / "matcher" / "config.json", kind="vqgan"), UserError, "holds kind 'vqgan', expected 'matcher'"),
    (lambda f: edit(f / "text_tokenizer" / "config.json", text_length=13), UserError, "text length 13"),
    (lambda f: (f / "text_tokenizer" / "spiece.model").write_bytes(b"no"), UserError, "not a SentencePiece model")])
def test_a_damaged_folder_is_refused_in_one_line(copy, damage, error, words):
    damage(copy)
    with pytest.raises(error, match=words) as caught:
        load_matcher(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(MissingFileError, match="it holds a text-to-image model"):
        load_matcher(tiny.model_folder(tmp_path / "model"))
    with pytest.raises(MissingFileError, match="no such model folder"):
        load_matcher(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has a text tokenizer of its own"):
        load_matcher(folder, text_encoder=str(tmp_path))
    with pytest.raises(UserError, match=r"vocabulary 320.*trained for 321"):
        save_matcher_folder(tmp_path / "x", tiny.matcher(text_vocab_size=321), FixedVocabulary(), "# card\n")
    assert not (tmp_path / "x").exists()


class FixedVocabulary:
    vocab_size, feature_width, config = 320, None, tiny.text_tokenizer().config


# ---- published models ----

def published(folder: Path, kind: str) -> Path:
    """A tiny CLIP or SigLIP as `transformers` saves one, with a tokenizer of words."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = sorted({word for caption in tiny.CAPTIONS for word in caption.split()})
    vocabulary = {name: number for number, name in enumerate(["<pad>", "<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                                         eos_token="</s>").save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(vocabulary), "max_position_embeddings": 8, "bos_token_id": 2, "eos_token_id": 3,
            "pad_token_id": 0, "projection_size": 16}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        model, size = transformers.CLIPModel(config), {"shortest_edge": 16}
        preparation = transformers.CLIPImageProcessor(size=size, crop_size={"height": 16, "width": 16})
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        preparation = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    preparation.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published_folders(tmp_path_factory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    return {kind: published(tmp_path_factory.mktemp("published") / kind, kind) for kind in ("clip", "siglip")}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_scores_of_published_models_are_their_own(published_folders, kind):
    import transformers

    folder = published_folders[kind]
    captions = ["a red heart", "a large blue octopus", "a small yellow apple tree heart heart heart heart"]
    scorer = load_matcher(folder, device="cpu")
    images = tiny.pictures(4, side=40)
    found = scorer.scores(images, captions)
    model = getattr(transformers, {"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]).from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        captions, truncation=True, max_length=8, padding="max_length" if kind == "siglip" else True, return_tensors="pt")
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    mask = {} if kind == "siglip" else {"attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        own = model(input_ids=tokens["input_ids"], pixel_values=pixels, **mask)
    cosines = (own.logits_per_image - (model.logit_bias if kind == "siglip" else 0)) / model.logit_scale.exp()
    torch.testing.assert_close(found, cosines, atol=2e-6, rtol=0)
    assert float(found.std()) > 1e-3
    scorer.batch_size = 1
    torch.testing.assert_close(scorer.scores(images, captions), found, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda f: edit(f / "config.json", model_type="bert"), "which should be an image-text model, 'bert'"),
    (lambda f: (f / "model.safetensors").rename(f / "model.bin"), "no .safetensors weights"),
    (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "no CLIPModel can be loaded"),
    (lambda f: (f / "tokenizer.json").unlink(), "no CLIPModel can be loaded"),
    (lambda f: (f / "preprocessor_config.json").unlink(), "no CLIPModel can be loaded"),
    (lambda f: drop_tensor(f / "model.safetensors", "text_projection.weight"), r"1 tensors are missing \(text_projection"),
])
def test_a_damaged_published_model_is_refused_in_one_line(published_folders, tmp_path, damage, words):
    copied = Path(shutil.copytree(published_folders["clip"], tmp_path / "copy"))
    damage(copied)
    with pytest.raises(UserError, match=words) as caught:
        load_matcher(copied, device="cpu")
    assert "\n" not in str(caught.value)


def drop_tensor(path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path, {"format": "pt"})
