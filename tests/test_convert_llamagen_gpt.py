"""LlamaGen's transformers come in and go out with equal numbers: against plain functions, for classes and for text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference import SamplingParams, TextToImage
from inference.checkpoints import ConvertOptions, convert, export_checkpoint, from_checkpoint
from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.files.weights_file import read_weights
from inference.checkpoints.rules import ConvertedPart, multiplier
from inference.checkpoints.writing import write_converted
from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.projection import MatmulStrategy
from seq2seq import PRESETS, TextBatch, load_text_source, load_transformer
from tests import llamagen_reference as reference
from tests import tiny
from tests.decoder_shapes import cached_with
from tests.llamagen_reference import TEXT, Sizes, make_state, shapes
from tests.test_export_vqgan import bits
from tokenizer_image import VQGAN, codes_to_tokens, pixels_to_float
from tokenloom_common.errors import UserError
from training.evaluation.generator import _loss_sums

CLASSES = Sizes()
GROUPED = Sizes(heads=4, kv_heads=2)
PROMPTS = ["a red heart", "octopus", "a large blue circle"]
TOLERANCE = 3e-5  # 8e-6 seen, of logits with a standard deviation of 1.4
CONTAINERS = {
    "ddp": lambda state: {"model": state, "optimizer": {"state": {}}, "steps": 7},
    "deepspeed": lambda state: {"module": state, "ds_version": "0.10"},
    "state_dict": lambda state: {"state_dict": state},
    "fsdp": lambda state: state,
    "wrapped": lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    "compiled": lambda state: {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
    "fsdp-wrapped": lambda state: {name.replace("layers.", "layers._fsdp_wrapped_module."): t for name, t in state.items()},
    "with-buffers": lambda state: {"model": {**state, "freqs_cis": torch.ones(17, 4, 2), "causal_mask": torch.ones(2, 24, 24),
                                             "layers.0.attention.kv_cache.k_cache": torch.ones(3)}}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders: `vq`, an image tokenizer of 32 codes in 4 x 4; `t5`, a text encoder; `heads`, what the shapes do not say."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.vqgan().save_pretrained(folder / "vq")
    tiny.t5_folder(folder / "t5")
    for heads in (2, 4):
        (folder / f"heads{heads}.yaml").write_text(f"n_head: {heads}\n")
    return folder


def saved(path: Path, sizes: Sizes, container: str = "ddp", **changes: Tensor) -> dict[str, Tensor]:
    """A published file -> its tensors."""
    state = make_state(sizes) | changes
    torch.save(CONTAINERS[container](state), path)
    return state


def options(parts: Path, sizes: Sizes, **changes) -> ConvertOptions:
    given = {"config": parts / f"heads{sizes.heads}.yaml", "image_tokenizer": parts / "vq",
             "text_encoder": None if sizes.features is None else str(parts / "t5"), **changes}
    return ConvertOptions(**given)


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
    sums = _loss_sums(model, pixels, PROMPTS, None)
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
    monkeypatch.setattr("inference.checkpoints.formats.llamagen_gpt.read_weights", lambda *_: weights)
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


# ---- the way back

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
        assert bits(read_weights(alone)) == bits(state)


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


# ---- what is refused

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
    with pytest.raises(UserError, match="it is not a whole transformer of LlamaGen"):
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
