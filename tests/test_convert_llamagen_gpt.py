"""LlamaGen's transformers give the logits of plain functions, for classes and for text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference import SamplingParams, TextToImage
from inference.checkpoints import ConvertOptions, convert
from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.files.weight_choice import ChosenWeights
from inference.checkpoints.rules import ConvertedPart, multiplier
from inference.checkpoints.writing import write_converted
from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.projection import MatmulStrategy
from seq2seq import PRESETS, TextBatch, load_text_source, load_transformer
from tests import llamagen_reference as reference
from tests.decoder_shapes import cached_with
from tests.llamagen_files import CLASSES, CONTAINERS, GROUPED, make_parts, options, saved
from tests.llamagen_reference import TEXT, Sizes, make_state, shapes
from tokenizer_image import codes_to_tokens, pixels_to_float
from tokenloom_common.errors import UserError
from training.evaluation.real_images import caption_loss_sums

PROMPTS = ["a red heart", "octopus", "a large blue circle"]
TOLERANCE = 3e-5  # 8e-6 seen, of logits with a standard deviation of 1.4


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


def loaded(parts: Path, path: Path, sizes: Sizes) -> TextToImage:
    converted = convert("llamagen-gpt", path, options(parts, sizes))
    assert isinstance(converted, ConvertedModel)
    return converted.load()


def left_features(parts: Path, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """What LlamaGen's script makes of captions with transformers' own T5: features [B, T, F] and which are real [B, T]."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "t5")
    model = transformers.T5EncoderModel.from_pretrained(parts / "t5").eval()
    found = tokenizer(prompts, max_length=6, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        features = model(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).last_hidden_state
    rows, mask = [], found["attention_mask"].flip(-1)
    for row, count in zip(features, found["attention_mask"].sum(dim=1).tolist(), strict=True):
        rows.append(torch.cat([row[count:], row[:count]]))
    return torch.stack(rows) * mask[..., None], mask.bool()


def tokens(sizes: Sizes, rows: int) -> Tensor:
    return torch.randint(sizes.codes, (rows, sizes.side**2), generator=torch.Generator().manual_seed(3))


def assert_equal_logits(model: TextToImage, text: TextBatch, expected: Tensor, image_tokens: Tensor) -> None:
    """Of the training graph and of both ways to decode, at every step."""
    assert expected.std() > 0.3
    with torch.no_grad():
        found = [model.seq2seq(*text, image_tokens).image]
    for strategy in (MatmulStrategy(), MatmulStrategy(native_to=64)):
        decoder = CachedDecoder(model.seq2seq, matmul=strategy)
        found.append(cached_with(decoder, text, image_tokens))
    difference = max(float((each - expected).abs().max()) for each in found)
    print(f"equality: logits within {difference:.1e}, standard deviation {expected.std():.1f}")  # shown by pytest -rP
    assert difference < TOLERANCE


# ---- equal numbers

@pytest.mark.parametrize("sizes", [CLASSES, GROUPED], ids=["plain", "grouped"])
def test_a_transformer_of_classes_gives_the_logits_of_plain_functions(parts, tmp_path, sizes):
    state = saved(tmp_path / "c2i.pt", sizes)
    model = loaded(parts, tmp_path / "c2i.pt", sizes)
    image_tokens, real = tokens(sizes, 3), torch.ones(3, 1, dtype=torch.bool)
    text = model.text_tokenizer.encode(["7", "0", ""])
    prefix = reference.class_prefix(state, torch.tensor([7, 0, 10]))
    assert_equal_logits(model, text, reference.logits(state, sizes, prefix, real, image_tokens[:, :-1]), image_tokens)
    null = reference.class_prefix(state, torch.tensor([10, 10]))
    expected = reference.greedy(state, sizes, prefix[:2], null, real[:2], 3.0)
    greedy = SamplingParams(temperature=0, guidance_scale=3.0)
    assert torch.equal(model.sample_tokens(["7", "0"], params=greedy), expected)
    assert len(expected.unique()) > 4


def test_a_transformer_of_text_gives_the_logits_of_plain_functions(parts, tmp_path):
    state = saved(tmp_path / "t2i.pt", TEXT)
    model = loaded(parts, tmp_path / "t2i.pt", TEXT)
    image_tokens, (features, real) = tokens(TEXT, 3), left_features(parts, PROMPTS)
    assert real.sum(dim=1).tolist() == [4, 2, 5]
    text = model.text_tokenizer.encode(PROMPTS)
    assert torch.equal(text.text_mask, real)
    prefix = reference.text_prefix(state, features)
    expected = reference.logits(state, TEXT, prefix, real, image_tokens[:, :-1])
    assert_equal_logits(model, text, expected, image_tokens)
    without = reference.text_prefix(state, state["cls_embedding.uncond_embedding"].expand(3, -1, -1))
    unguided = reference.logits(state, TEXT, without, real, image_tokens[:, :-1])
    assert_equal_logits(model, model.text_tokenizer.null_for(text), unguided, image_tokens)
    assert (unguided - expected).abs().max() > 0.1


@pytest.mark.long
def test_guided_pictures_of_text_equal_those_of_plain_functions(parts, tmp_path):
    """In a batch, alone, in a queue; loaded from the folder that convert writes."""
    state = saved(tmp_path / "t2i.pt", TEXT)
    converted = convert("llamagen-gpt", tmp_path / "t2i.pt", options(parts, TEXT))
    assert [note.split(";")[0] for note in converted.notes] == [
        "grid 4 x 4: the image tokenizer's", "captions are read as they are given"]
    write_converted(converted, tmp_path / "t2i.pt", tmp_path / "ours")
    model = TextToImage.from_pretrained(tmp_path / "ours", "cpu")
    assert (model.default_params.guidance_scale, model.default_params.top_k) == (7.5, 1000)
    features, real = left_features(parts, PROMPTS)
    prefix = reference.text_prefix(state, features)
    null = reference.text_prefix(state, state["cls_embedding.uncond_embedding"].expand(3, -1, -1))
    expected = reference.greedy(state, TEXT, prefix, null, real, 7.5)
    assert len(set(map(tuple, expected.tolist()))) == 3
    greedy = SamplingParams(temperature=0, guidance_scale=7.5)
    assert torch.equal(model.sample_tokens(PROMPTS, params=greedy), expected)
    assert torch.equal(model.sample_tokens(PROMPTS[1], params=greedy)[0], expected[1])
    twice = model.sample_tokens(PROMPTS, num_images=2, params=greedy)
    assert torch.equal(twice, expected.repeat_interleave(2, dim=0))
    print(f"equality: guided tokens {expected.numel()} of {expected.numel()}")
    model.save_pretrained(tmp_path / "again")
    again = load_text_source(tmp_path / "again" / "text_tokenizer")
    assert torch.equal(again.null_features, state["cls_embedding.uncond_embedding"])
    from inference.requests import PromptRequest

    queued = model.generate_many([PromptRequest(prompt, params=greedy) for prompt in PROMPTS], batch_size=4)
    drawn = {result.request: result.image_tokens for result in queued}
    assert torch.equal(torch.stack([drawn[number] for number in range(3)]), expected)
    fixed = reference.greedy(state, TEXT, prefix, null, torch.ones_like(real), 7.5)
    assert not torch.equal(fixed, expected)  # the mask of the caption matters


def test_a_caption_is_measured_against_the_features_of_none_under_its_mask(parts, tmp_path):
    """As in guidance: nats of the pictures' tokens with and without their captions."""
    state = saved(tmp_path / "t2i.pt", TEXT)
    model = loaded(parts, tmp_path / "t2i.pt", TEXT)
    pixels = torch.randint(256, (3, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image_tokens = codes_to_tokens(model.image_tokenizer.encode(pixels_to_float(pixels)))
    features, real = left_features(parts, PROMPTS)
    expected = []
    for each in (features, state["cls_embedding.uncond_embedding"].expand(3, -1, -1)):
        found = reference.logits(state, TEXT, reference.text_prefix(state, each), real, image_tokens[:, :-1])
        expected.append(torch.nn.functional.cross_entropy(found.transpose(1, 2), image_tokens, reduction="none").sum(dim=0))
    sums = caption_loss_sums(model, pixels, PROMPTS, None)
    assert (sums - torch.stack(expected)).abs().max() < 1e-4
    assert (sums[0] - sums[1]).abs().max() > 0.01


@pytest.mark.parametrize(("sizes", "container"), [*((CLASSES, name) for name in CONTAINERS), (TEXT, "deepspeed")])
def test_every_container_gives_the_same_tensors(parts, tmp_path, sizes, container):
    state = saved(tmp_path / "model.pt", sizes, container)
    for kind in ("llamagen-gpt", None):
        converted = convert(kind, tmp_path / "model.pt", options(parts, sizes))
        assert isinstance(converted, ConvertedModel)
        assert torch.equal(converted.seq2seq.tensor("image_embedding.weight"), state["tok_embeddings.weight"])
    inner = converted.seq2seq.tensor("decoder.layers.1.1.ff.0.proj.weight")
    gate, value = state["layers.0.feed_forward.w1.weight"], state["layers.0.feed_forward.w3.weight"]
    assert torch.equal(inner, torch.cat([value, gate]))


def test_a_hub_wrappers_folder_says_its_heads_and_grid(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(make_state(GROUPED), folder / "model.safetensors")
    args = {"dim": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "block_size": 16, "vocab_size": 32, "cls_token_num": 1}
    for values in (args, {"config": args}):
        (folder / "config.json").write_text(json.dumps(values))
        part = convert("llamagen-gpt", folder)
        assert (part.config.heads, part.config.kv_heads, part.config.grid) == (4, 2, (4, 4))
    assert part.notes == ("without --image-tokenizer this is a transformer alone, which cannot be sampled from",)
    (folder / "config.json").write_text(json.dumps({**args, "n_layer": 3}))
    with pytest.raises(UserError, match="its weights have n_layer 2, its config says 3"):
        convert("llamagen-gpt", folder)


def test_without_tokenizers_a_transformer_comes_alone(parts, tmp_path):
    saved(tmp_path / "t2i.pt", TEXT)
    for changes, lacking in (({"text_encoder": None}, "--text-encoder"),
                             ({"image_tokenizer": None, "resolution": 64}, "--image-tokenizer")):
        part = convert("llamagen-gpt", tmp_path / "t2i.pt", options(parts, TEXT, **changes))
        assert isinstance(part, ConvertedPart)
        assert part.config.grid == (4, 4)
        assert any(lacking in note for note in part.notes)
        assert any("uncond_embedding" in note for note in part.notes)
    write_converted(part, tmp_path / "t2i.pt", tmp_path / "ours")
    assert load_transformer(tmp_path / "ours").config == part.config


def test_classes_get_their_names(parts, tmp_path):
    saved(tmp_path / "c2i.pt", CLASSES)
    names = ["tench", "goldfish", *(f"thing {number}" for number in range(8))]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    model = convert("llamagen-gpt", tmp_path / "c2i.pt", options(parts, CLASSES, classes=tmp_path / "names.txt"))
    assert model.text_tokenizer.config.classes == tuple(names)
    assert model.text_tokenizer.encode(["Goldfish", "1", ""]).text_input.flatten().tolist() == [1, 1, 10]
    assert convert("llamagen-gpt", tmp_path / "c2i.pt", options(parts, CLASSES)).text_tokenizer.config.classes[9] == "9"


# ---- sizes

PUBLISHED = {  # layers, heads, width, inner width -> parameters for 16,384 codes: of 1,000 classes, or of 120 x 2048 features
    "b": (12, 12, 768, 2048, 110_888_448, None), "l": (24, 16, 1024, 2816, 342_910_976, None),
    "xl": (36, 20, 1280, 3584, 774_699_520, 777_678_080), "xxl": (48, 24, 1536, 4096, 1_410_972_672, None),
    "xxxl": (48, 40, 2560, 6912, 3_893_027_840, None), "1b": (22, 32, 2048, 5632, 1_199_616_000, None),
    "3b": (24, 32, 3200, 8704, 3_096_659_200, None), "7b": (32, 32, 4096, 11008, 6_614_589_440, None)}


def test_there_is_a_preset_of_each_published_size():
    assert {name.removeprefix("llamagen-") for name in PRESETS if name.startswith("llamagen")} == set(PUBLISHED)


QUICK = [("b", None), ("xl", (120, 2048)), ("7b", None)]


@pytest.mark.parametrize(("name", "features"), [
    pytest.param(name, features, marks=[] if (name, features) in QUICK else [pytest.mark.slow])
    for name in PUBLISHED for features in (None, (120, 2048))])
def test_published_sizes_are_known_by_their_shapes(tmp_path, monkeypatch, name, features):
    layers, heads, width, inner, of_classes, of_text = PUBLISHED[name]
    sizes = Sizes(width, heads, heads, layers, inner, 16_384, 16, 1001, features)
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes(sizes).items()}
    monkeypatch.setattr("inference.checkpoints.formats.llamagen_gpt.read_weights", lambda *_: ChosenWeights(weights))
    (tmp_path / "x.pt").touch()
    part = convert("llamagen-gpt", tmp_path / "x.pt", ConvertOptions(resolution=256))
    preset = {key: value for key, value in PRESETS[f"llamagen-{name}"].items() if key != "kind"}
    assert {key: getattr(part.config, key) for key in preset} == preset
    count = sum(parameter.numel() for parameter in part.built_on_meta().parameters())
    null = 0 if features is None else 120 * 2048
    assert count == sum(tensor.numel() for tensor in weights.values()) - null
    wanted = of_classes if features is None else of_text
    assert wanted is None or count == wanted


@pytest.mark.parametrize(("inner", "width"), [(8704, 3200), (2730, 1024), (11008, 4096), (6912, 2560), (96, 32), (7, 3)])
def test_the_inner_width_is_hit_exactly(inner, width):
    assert int(width * multiplier(inner, width)) == inner
    assert all(int(1280 * multiplier(number, 1280)) == number for number in range(1, 5000, 7))
