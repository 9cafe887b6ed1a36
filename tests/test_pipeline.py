"""TextToImage on a tiny model folder: the API, and every way a folder or a call can be wrong."""

from __future__ import annotations

import json
import shutil
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from inference import model_folder as folders
from inference.decoder.cached_decoder import CachedDecoder
from inference.streaming import SHARE, PreviewBudget
from tests import tiny
from tokenloom import SamplingParams, TextToImage
from tokenloom_common.errors import MissingFileError, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder) -> TextToImage:
    return TextToImage.from_pretrained(folder, device="cpu")


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_generate_gives_pictures_tokens_and_seeds(model):
    result = model.generate(["a red heart", "octopus"], num_images=2, seed=5)
    assert [image.size for image in result.images] == [(16, 16)] * 4
    assert result.image_tokens.shape == (4, 16)
    assert result.image_tokens.dtype == torch.int64
    assert result.prompts == ["a red heart"] * 2 + ["octopus"] * 2
    assert result.seeds == [5, 6, 5, 6]
    assert result.params == model.default_params == SamplingParams(top_k=8, guidance_scale=2.0)


def test_tokens_and_pictures_of_the_parts_equal_generate(model):
    result = model.generate("a red heart", num_images=2, seed=3)
    tokens = model.sample_tokens(["a red heart"], num_images=2, seed=3)
    assert torch.equal(tokens, result.image_tokens)
    assert [a.tobytes() for a in model.decode_tokens(tokens)] == [b.tobytes() for b in result.images]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_changes_nothing(model, batch_size):
    prompts = ["a red heart", "octopus", "a blue square"]
    whole = model.sample_tokens(prompts, num_images=3, seed=1)
    assert torch.equal(model.sample_tokens(prompts, num_images=3, seed=1, batch_size=batch_size), whole)


def test_image_i_of_a_prompt_is_seed_plus_i(model):
    four = model.sample_tokens("octopus", num_images=4, seed=10)
    for i in range(4):
        assert torch.equal(model.sample_tokens("octopus", seed=10 + i)[0], four[i])
    assert len(set(map(tuple, four.tolist()))) == 4


def test_stream_grows_to_what_generate_gives(model):
    steps = list(model.stream("octopus", num_images=2, seed=4, every=1))
    assert [step.position for step in steps] == list(range(16))
    assert [step.is_last for step in steps] == [False] * 15 + [True]
    assert torch.equal(steps[-1].image_tokens, model.sample_tokens("octopus", num_images=2, seed=4))
    assert steps[3].preview.size == (16, 16)
    assert steps[-1].preview.tobytes() == model.generate("octopus", seed=4).images[0].tobytes()


def test_a_stream_that_is_left_early_does_no_more_work(model, monkeypatch):
    calls = []
    original = CachedDecoder.decode_one
    monkeypatch.setattr(CachedDecoder, "decode_one", lambda self, *a: calls.append(1) or original(self, *a))
    stream = model.stream("octopus", every=1)
    next(stream)
    stream.close()
    assert len(calls) == 1


@pytest.mark.parametrize("jacobi", [1, 4])
def test_leaving_a_stream_frees_its_cache_at_once(model, monkeypatch, jacobi):
    caches = []
    original = CachedDecoder.new_cache

    def kept(self, groups):
        cache = original(self, groups)
        caches.append(weakref.ref(cache.keys))
        return cache

    monkeypatch.setattr(CachedDecoder, "new_cache", kept)
    stream = model.stream("octopus", every=1, jacobi=jacobi)
    next(stream)
    assert caches[0]() is not None
    stream.close()
    assert caches[0]() is None


def test_a_stream_yields_the_last_step_and_every_so_many_before(model):
    assert [step.position for step in model.stream("octopus", every=5)] == [4, 9, 14, 15]
    assert [step.position for step in model.stream("octopus", every=100)] == [15]
    assert list(model.stream("octopus"))[-1].is_last
    with pytest.raises(UserError, match="every must be a whole number of at least 1, got 0"):
        model.stream("octopus", every=0)


class Clock:
    """Seconds that a test passes by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds
        return seconds


@pytest.mark.parametrize("caller", [0.0, 0.5])
def test_previews_take_at_most_their_share_of_the_time(caller):
    clock = Clock()
    budget = PreviewBudget(clock=clock)
    asked = []
    for done in range(1, 1001):
        clock.wait(0.01)
        if budget.allows(done, 1000):
            with budget.outside():
                budget.spent_on(lambda: clock.wait(0.03))
                clock.wait(caller)
            asked.append(done)
    assert asked[0] == 500
    assert len(asked) == 11  # 3.5 % of 10 s, at 0.03 s each
    assert budget.preview_seconds <= SHARE * budget.decoding_seconds
    assert budget.decoding_seconds == pytest.approx(10)


def test_a_preview_that_is_known_to_take_long_is_not_made(monkeypatch, folder):
    model, seconds = TextToImage.from_pretrained(folder, device="cpu"), {"now": 0.0}
    monkeypatch.setattr("inference.streaming.PreviewBudget", partial(PreviewBudget, clock=lambda: seconds["now"]))
    monkeypatch.setattr("inference.pipeline.time.perf_counter", lambda: seconds["now"])

    def decoded(tokens):
        seconds["now"] += 10.0
        return [None] * len(tokens)

    monkeypatch.setattr(model.pixels, "decode", decoded)
    yielded = []
    for _ in range(2):
        steps = []
        for step in model.stream("octopus"):
            steps.append(step.position)
            assert len(step.previews) == 1
        yielded.append(steps)
    assert yielded == [[7, 15], [15]]  # the first stream finds out at half the tokens


def test_images_are_decoded_one_at_a_time_so_that_a_batch_does_not_round_them(model, monkeypatch):
    at_a_time, decode = [], model.image_tokenizer.decode
    monkeypatch.setattr(model.image_tokenizer, "decode", lambda codes: at_a_time.append(len(codes)) or decode(codes))
    result = model.generate(["a red heart", "octopus"], num_images=2)
    assert at_a_time == [1, 1, 1, 1]
    assert len(result.images) == 4


def test_jacobi_decoding_gives_the_same_pictures(model):
    plain, faster = (model.generate(["a red heart", "octopus"], num_images=2, seed=5, jacobi=jacobi) for jacobi in (1, 6))
    assert torch.equal(plain.image_tokens, faster.image_tokens)
    streamed = list(model.stream("octopus", seed=5, jacobi=6, every=1))
    assert torch.equal(streamed[-1].image_tokens[0], plain.image_tokens[2])
    with pytest.raises(UserError, match="jacobi must be a whole number of at least 1, got 0"):
        model.generate("octopus", jacobi=0)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_every_precision_of_weights_draws_pictures(folder, weights):
    model = TextToImage.from_pretrained(folder, device="cpu", weights=weights)
    result = model.generate("a red heart", num_images=2, seed=1)
    assert result.image_tokens.shape == (2, 16)
    assert result.attention("heart").shape == (4, 4)
    exact = TextToImage.from_pretrained(folder, device="cpu").generate("a red heart", num_images=2, seed=1)
    assert (result.image_tokens == exact.image_tokens).float().mean() > 0.2
    assert model.seq2seq.image_embedding.weight.dtype == (torch.bfloat16 if weights == "bfloat16" else torch.float32)


def test_an_unknown_precision_is_refused(folder):
    with pytest.raises(UserError, match="weights 'fp8': not a precision of weights; choose float32, bfloat16, int8"):
        TextToImage.from_pretrained(folder, device="cpu", weights="fp8")


def test_saving_again_gives_equal_outputs(model, tmp_path):
    parts = model.parts
    folders.save_model_folder(tmp_path / "again", parts.image_tokenizer, parts.seq2seq, parts.text_tokenizer,
                              parts.generation, "# card\n")
    again = TextToImage.from_pretrained(tmp_path / "again", device="cpu").generate("octopus", seed=2)
    before = model.generate("octopus", seed=2)
    assert torch.equal(again.image_tokens, before.image_tokens)
    assert again.images[0].tobytes() == before.images[0].tobytes()


def test_a_model_folder_reads_with_safetensors_and_json_alone(folder):
    from safetensors import safe_open

    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "TextToImage"
    for part in ("tokenizer_image", "seq2seq"):
        assert json.loads((folder / part / "config.json").read_text())["kind"] == index[part]
        with safe_open(folder / part / "model.safetensors", framework="numpy") as file:
            assert len(list(file.keys())) > 10
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".bin", ".ckpt", ".pkl")]


@pytest.mark.parametrize("prompt", ["", "  ", "🎉🐙" * 500, "x" * 10_000, "a\x00b", "\udcff broken", "<null>", "漢字"])
def test_odd_prompts_give_a_picture(model, prompt):
    assert isinstance(model.generate(prompt, seed=0).images[0], Image.Image)


@pytest.mark.parametrize(("call", "words"), [
    (lambda m: m.generate([]), "no prompt"),
    (lambda m: m.generate("x" * 10_001), "10,001 characters"),
    (lambda m: m.generate([b"bytes"]), "must be text, got bytes"),
    (lambda m: m.generate("a", num_images=0), "num_images"),
    (lambda m: m.generate("a", num_images=1.5), "num_images"),
    (lambda m: m.generate("a", seed=-1), "seed"),
    (lambda m: m.generate("a", batch_size=0), "batch_size"),
    (lambda m: next(m.stream("a", num_images=0)), "num_images"),
    (lambda m: m.decode_tokens(torch.zeros(1, 15, dtype=torch.int64)), "15"),
    (lambda m: m.decode_tokens(torch.full((1, 16), 32)), "32"),
    (lambda m: m.decode_tokens(torch.full((1, 16), -1)), "-1"),
    (lambda m: m.decode_tokens(torch.zeros(1, 16)), "float32"),
])
def test_wrong_calls_are_refused_in_words(model, call, words):
    with pytest.raises(ValueError, match=words):
        call(model)


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**values, **changes}.items() if v is not None}))


@pytest.mark.parametrize(("damage", "error", "words"), [
    (lambda f: (f / "model_index.json").unlink(), MissingFileError, "model_index.json is missing"),
    (lambda f: shutil.rmtree(f / "seq2seq"), MissingFileError, "seq2seq/ is missing"),
    (lambda f: (f / "seq2seq" / "config.json").unlink(), MissingFileError, "config.json is missing"),
    (lambda f: (f / "seq2seq" / "model.safetensors").unlink(), MissingFileError, "weights are missing"),
    (lambda f: (f / "seq2seq" / "model.safetensors").write_bytes(b""), UserError, "not a whole safetensors file"),
    (lambda f: (f / "seq2seq" / "model.safetensors").write_bytes(
        (f / "seq2seq" / "model.safetensors").read_bytes()[:-100]), UserError, "not a whole safetensors file"),
    (lambda f: (f / "model_index.json").write_text("{"), UserError, "cannot be read"),
    (lambda f: edit(f / "model_index.json", _class_name="Other"), UserError, "expected 'TextToImage'"),
    (lambda f: edit(f / "model_index.json", schema_version=99), UserError, "schema_version 99"),
    (lambda f: edit(f / "model_index.json", seq2seq="gpt5"), UserError, "unknown"),
    (lambda f: edit(f / "seq2seq" / "config.json", widht=3), UserError, "did you mean 'width'"),
    (lambda f: edit(f / "seq2seq" / "config.json", width=64), UserError, "mis-shaped"),
    (lambda f: edit(f / "seq2seq" / "config.json", width=10**9), UserError, "width"),
    (lambda f: edit(f / "tokenizer_image" / "config.json", z_channels=10**15), UserError, "do not fit"),
    (lambda f: edit(f / "seq2seq" / "config.json", kind="vqgan"), UserError, "expected 'encoder_decoder'"),
    (lambda f: edit(f / "seq2seq" / "config.json", decoder_layers=3), UserError, "missing"),
    (lambda f: edit(f / "seq2seq" / "config.json", decoder_layers=1), UserError, "unexpected"),
    (lambda f: edit(f / "generation_config.json", top_k=-3), UserError, "top_k"),
    (lambda f: edit(f / "text_tokenizer" / "config.json", vocab_size=300), UserError, "pieces"),
])
def test_a_damaged_model_folder_is_named_in_one_line(copy, damage, error, words):
    damage(copy)
    with pytest.raises(error, match=words) as caught:
        TextToImage.from_pretrained(copy, device="cpu")
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_that_do_not_belong_together_are_refused_naming_both(folder, copy):
    shutil.rmtree(copy / "tokenizer_image")
    tiny.vqgan(codebook_size=64).save_pretrained(copy / "tokenizer_image")
    with pytest.raises(UserError, match="codebook size 64, the transformer was trained for 32"):
        TextToImage.from_pretrained(copy, device="cpu")
    shutil.rmtree(copy / "tokenizer_image")
    tiny.vqgan(seed=1).save_pretrained(copy / "tokenizer_image")
    with pytest.raises(UserError, match="fingerprint"):
        TextToImage.from_pretrained(copy, device="cpu")


@pytest.mark.parametrize("name", ["no/such/folder/here", "nothing", "/nonexistent"])
def test_a_missing_folder_is_one_line(name):
    with pytest.raises(MissingFileError, match=name):
        TextToImage.from_pretrained(name, device="cpu")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        TextToImage.from_pretrained(tmp_path / "file", device="cpu")


def test_an_index_cannot_name_files_outside_its_folder(copy):
    index = {"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}}
    (copy / "seq2seq" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the folder"):
        TextToImage.from_pretrained(copy, device="cpu")


def test_a_failed_save_leaves_the_old_folder_as_it_was(copy, monkeypatch):
    before = TextToImage.from_pretrained(copy, device="cpu").sample_tokens("octopus")
    parts = TextToImage.from_pretrained(copy, device="cpu").parts

    def broken(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(folders, "write_pretrained", broken)
    with pytest.raises(OSError, match="No space"):
        folders.save_model_folder(copy, parts.image_tokenizer, parts.seq2seq, parts.text_tokenizer, parts.generation, "")
    assert torch.equal(TextToImage.from_pretrained(copy, device="cpu").sample_tokens("octopus"), before)
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]
