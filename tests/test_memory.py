"""Memory of sampling: predicted bytes are those of real tensors and of a real run, and what cannot fit is refused."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.harness import peak_memory
from inference import LoadedModel, SamplingParams, TextToImage
from inference.decoder.cached_decoder import CachedDecoder
from inference.memory import estimate as memory_module
from inference.memory.available import available_memory
from inference.memory.estimate import (
    DRAWING_BYTES,
    FIRST_USE,
    Workload,
    check_fits,
    check_sampling,
    estimate,
    largest_batch,
)
from inference.memory.meta_device import Alive
from inference.memory.parts import picture_bytes
from inference.memory.sizes import human
from seq2seq import PRESETS, TRANSFORMER_KINDS, TextBatch
from tests import launching, test_bpe_tokenizer, tiny
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.images import float_to_pixels
from tokenizer_image.kinds import PRESETS as TOKENIZERS
from tokenizer_image.kinds import build_tokenizer
from tokenloom_common.errors import UserError

GIB, MIB = 1 << 30, 1 << 20
LAYOUT = {"layout_kind": "classes", "layout_classes": 5, "layout_grid": (2, 3)}
MODELS = {
    "encoder_decoder": lambda: tiny.seq2seq(), "grouped": lambda: tiny.seq2seq(kv_heads=1),
    "layout": lambda: tiny.seq2seq(**LAYOUT), "biases": lambda: tiny.seq2seq(attention_bias=True, norm_placement="sandwich"),
    "features": lambda: tiny.seq2seq(text_vocab_size=None, text_feature_width=24, encoder_layers=0),
    "decoder_only": lambda: tiny.decoder_only(), "no_begin": lambda: tiny.decoder_only(begin_of_image=False),
    "text_predicted": lambda: tiny.decoder_only(predict_text=True, text_padding="learned"),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def preset(name: str, **changes):
    values = {"text_vocab_size": 16_384, "text_length": 64, "codebook_size": 16_384, "grid": (16, 16),
              **PRESETS[name], **changes}
    return TRANSFORMER_KINDS[values.pop("kind")].config_class(**values)


def text(model, captions: int) -> TextBatch:
    config = model.config
    shape = (captions, config.text_length)
    ids = torch.ones(shape, dtype=torch.int64) if config.text_feature_width is None else torch.ones(*shape, 24)
    return TextBatch(ids, torch.ones(shape, dtype=torch.bool))


def drawn_with(model, captions: int, images: int, guided: bool, **options):
    """The real self cache and caption memories of a batch."""
    decoder = CachedDecoder(model, **options)
    groups = [decoder.prefill(text(model, captions), images)]
    if guided:
        groups.append(decoder.prefill(text(model, 1), captions * images))
    return decoder.new_cache(groups), groups


# ---- predicted bytes are those of tensors ----

@pytest.mark.parametrize("guided", [True, False])
def test_the_caches_are_predicted_to_the_byte(model, guided):
    cache, groups = drawn_with(model, captions=2, images=3, guided=guided)
    found = estimate(model.config, None, Workload(pictures=6, captions=2, guided=guided))
    assert found.self_cache == cache.keys.nbytes + cache.values.nbytes
    assert found.caption_memory == sum(part.nbytes for group in groups for part in (*group.keys, *group.values))
    assert found.rows == cache.keys.shape[1]


def test_a_text_that_guidance_leads_from_for_each_caption_is_predicted_to_the_byte(model):
    decoder = CachedDecoder(model)
    groups = [decoder.prefill(text(model, 3), 2) for _ in range(2)]
    found = estimate(model.config, None, Workload(pictures=6, captions=3, unguided_each=True))
    assert found.caption_memory == sum(part.nbytes for group in groups for part in (*group.keys, *group.values))


def test_a_bfloat16_cache_is_half_of_it():
    model = tiny.seq2seq().bfloat16()
    cache, _ = drawn_with(model, captions=1, images=2, guided=True)
    found = estimate(model.config, None, Workload(pictures=2, weights="bfloat16"))
    assert found.self_cache == cache.keys.nbytes + cache.values.nbytes
    assert found.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert estimate(model.config, None, Workload(pictures=2, weights="int8", dtype="bfloat16")).self_cache == found.self_cache
    assert estimate(model.config, None, Workload(pictures=2, weights="int8")).self_cache == 2 * found.self_cache


def test_weights_are_predicted_to_the_byte(model):
    assert estimate(model.config, None, Workload()).weights == sum(parameter.nbytes for parameter in model.parameters())


def test_int8_weights_are_predicted_to_the_byte(model):
    drawn_with(model, 1, 1, guided=False, int8=True)  # which takes the model over
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
            for part in (*model.parameters(), *model.buffers())}
    assert estimate(model.config, None, Workload(weights="int8")).weights == sum(held.values())


@pytest.mark.parametrize("name", ["debug", "vit-debug", "dvae-debug"])
def test_an_image_tokenizer_is_predicted_to_the_byte(name):
    config = TOKENIZERS[name][1]
    tokenizer = build_tokenizer(config)
    held = sum(tensor.nbytes for tensor in (*tokenizer.parameters(), *tokenizer.buffers()))
    assert estimate(tiny.seq2seq().config, config, Workload()).image_tokenizer == held


@pytest.mark.parametrize("config", [
    *(TOKENIZERS[name][1] for name in ("debug", "vit-debug", "dvae-debug")),
    TOKENIZERS["vit-debug"][1].model_copy(update={"resolution": 64}),  # whose attention scores would be most of it
    *(VQGANConfig(resolution=32, channels=32, channel_multipliers=(1, 1), z_channels=32, codebook_size=64, quantizer=quantizer)
      for quantizer in ({"kind": "residual", "depth": 2}, {"kind": "simvq"}, {"kind": "vq"}, {"kind": "gumbel"}))],
    ids=lambda config: f"{config.kind}-{getattr(getattr(config, 'quantizer', None), 'kind', '')}")
def test_decoding_to_pixels_is_predicted_without_numbers_or_chance(config):
    """The same operations with numbers make tensors of the same bytes."""
    state = torch.get_rng_state()
    fixed, each = picture_bytes(config)
    assert torch.equal(state, torch.get_rng_state())
    tokenizer = build_tokenizer(config).eval()
    with torch.no_grad(), Alive(tokenizer) as alive:
        float_to_pixels(tokenizer.decode(torch.zeros(8, *config.grid, dtype=torch.int64)))
    assert 0.99 * alive.peak < fixed + 8 * each < 1.01 * alive.peak + fixed


LARGE_CODEBOOK, LARGE_GRID = {"codebook_size": 20_000}, {"grid": (8, 12)}


@pytest.mark.long
@pytest.mark.parametrize("captions", [1, 8])
@pytest.mark.parametrize(("make", "changes", "nearest"), [
    (tiny.seq2seq, {}, 2.5), (tiny.seq2seq, LARGE_CODEBOOK, 1.25), (tiny.seq2seq, LARGE_GRID, 1.4),
    (tiny.seq2seq, {**LARGE_GRID, "kv_heads": 1}, 1.6), (tiny.decoder_only, LARGE_GRID, 1.2),
    (tiny.decoder_only, {"grid": (16, 16), "attention": ("row",)}, 1.1), (tiny.seq2seq, LAYOUT, 2.5)])
def test_drawing_holds_what_is_predicted(make, changes, nearest, captions):
    """Of everything that drawing 8 pictures makes, the most at once is at most the prediction, and not far below it."""
    words = tiny.text_tokenizer()
    generator = make(text_vocab_size=words.vocab_size, **changes)
    params = SamplingParams(top_k=0, top_p=0.9, min_p=0.01)
    whole = TextToImage(LoadedModel(tiny.vqgan(), generator, words, params, Path()))
    with Alive(generator) as alive:
        whole.sample_tokens(["a red heart"] * captions, num_images=8 // captions)
    predicted = estimate(generator.config, None, Workload(8, captions)).drawing - FIRST_USE
    assert alive.peak <= predicted <= nearest * alive.peak


@pytest.mark.long
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_estimated_at_once(name):
    config = preset(name)
    started = time.process_time()
    found = estimate(config, TOKENIZERS["vq-16"][1], Workload(pictures=4))
    assert time.process_time() - started < 5  # a fifth of a second on an idle machine
    assert found.total > found.weights > 100_000
    assert min(found.self_cache, found.caption_memory, found.working, found.pictures, found.results) > 0
    assert largest_batch(config, TOKENIZERS["vq-16"][1], Workload(), found.total) >= 4


def test_parti_20b_needs_what_its_table_says():
    """Table 1's 64 layers of 64 heads of 64, 256 slots, two rows a picture: 0.54 GB of cache a picture in bfloat16."""
    found = estimate(preset("parti-20b"), None, Workload(pictures=1, weights="bfloat16"))
    assert found.self_cache == 2 * 64 * 64 * 64 * 256 * 2 * 2
    assert 41.0e9 < found.weights < 41.5e9


# ---- the whole ----

def test_drawing_and_decoding_share_their_memory_unless_streamed():
    plain, streamed = (estimate(preset("small"), TOKENIZERS["vq-16"][1], Workload(pictures=4, streamed=on))
                       for on in (False, True))
    assert plain.total == plain.weights + plain.image_tokenizer + max(plain.drawing, plain.pictures) + plain.results
    assert streamed.total - plain.total == min(plain.drawing, plain.pictures)


def test_a_window_is_held_for_every_row():
    one, four = (estimate(preset("small", text_length=1), None, Workload(pictures=2, window=window)) for window in (1, 4))
    each = (2 * 4 + DRAWING_BYTES) * preset("small").codebook_size  # two rows of float32 logits, and what drawing one makes
    assert one.self_cache == four.self_cache
    assert four.working - one.working > 3 * 2 * each


@pytest.mark.parametrize(("prompts", "num_images", "batch_size", "expected"), [
    (1, 1, 32, (1, 1, 1, 1)), (1, 8, 4, (4, 1, 4, 8)), (5, 2, 4, (4, 2, 4, 10)), (3, 20, 32, (20, 1, 32, 60)),
    (2, 2, 100, (4, 2, 4, 4))])
def test_a_request_is_drawn_in_these_batches(monkeypatch, prompts, num_images, batch_size, expected):
    work = Workload.of_request(prompts, num_images, batch_size)
    assert (work.pictures, work.captions, work.decoded, work.kept) == expected


@pytest.mark.parametrize("name", ["small", "small-decoder", "llamagen-b"])
@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("tokenizer", [TOKENIZERS["vq-16"][1], None], ids=["vq-16", "no tokenizer"])
def test_the_largest_batch_fits_and_one_more_does_not(name, loaded, tokenizer):
    config, work = preset(name), Workload(captions=3)

    def needs(pictures: int) -> int:
        found = estimate(config, tokenizer, Workload(pictures, min(3, pictures)))
        return found.beyond_weights if loaded else found.total

    for memory in (3 * GIB, 5 * GIB, needs(7), needs(1)):
        most = largest_batch(config, tokenizer, work, memory, loaded)
        assert needs(most) <= memory < needs(most + 1)
    assert largest_batch(config, tokenizer, work, needs(1) - 1, loaded) == 0


def test_what_does_not_fit_is_refused_with_its_bytes():
    check_fits(10, None, "sampling", "wait")
    check_fits(10, 10, "sampling", "wait")
    with pytest.raises(UserError) as refused:
        check_fits(5 * GIB + 1, 3 * GIB, "sampling 9 pictures", "use fewer")
    assert str(refused.value) == ("sampling 9 pictures needs 5,368,709,121 bytes (5.00 GiB) of memory, and 3,221,225,472 bytes "
                                  "(3.00 GiB) are there; use fewer")


def test_the_refusal_says_how_many_would_fit(monkeypatch):
    config, tokenizer = preset("small"), TOKENIZERS["vq-16"][1]
    work = Workload.of_request(1, 500, 100)
    monkeypatch.setattr(memory_module, "available_memory", lambda device: 2 * GIB)
    with pytest.raises(UserError) as refused:
        check_sampling(config, tokenizer, work, "cpu")
    needs = estimate(config, tokenizer, work)
    fit = largest_batch(config, tokenizer, work, 2 * GIB - needs.results, loaded=True)
    assert f"{needs.beyond_weights:,} bytes" in str(refused.value)
    assert f"--batch-size {fit} (batch_size={fit})" in str(refused.value)
    check_sampling(config, tokenizer, Workload.of_request(1, 500, fit), "cpu")
    streamed = Workload(pictures=100, streamed=True)
    with pytest.raises(UserError, match=r"num_images=\d+$"):
        check_sampling(config, tokenizer, streamed, "cpu")


@pytest.mark.parametrize(("splitting", "each"), [("spaces", True), ("bytes", False)])
def test_a_null_text_of_each_caption_is_counted(tmp_path, monkeypatch, splitting, each):
    text, tokenizer = test_bpe_tokenizer.source(test_bpe_tokenizer.bpe_files(tmp_path), splitting=splitting), tiny.vqgan()
    model = tiny.seq2seq(text_vocab_size=text.vocab_size, text_length=text.config.text_length)
    asked: list[Workload] = []
    monkeypatch.setattr("inference.pipeline.check_sampling", lambda config, tokenizer, work, device: asked.append(work))
    pipeline = TextToImage(LoadedModel(tokenizer, model, text, SamplingParams(guidance_scale=2.0), tmp_path))
    pipeline.generate(["a red heart", "a circle"])
    pipeline.generate(["a red heart", "a circle"], negative_prompt="green")  # one for all
    assert [work.unguided_each for work in asked] == [each, False]


def test_the_refusal_names_other_weights_where_not_one_fits(monkeypatch):
    monkeypatch.setattr(memory_module, "available_memory", lambda device: 20 * MIB)
    with pytest.raises(UserError, match="not even one at a time fits; use bfloat16 or int8 weights, a smaller model"):
        check_sampling(preset("small"), None, Workload(), "cpu")
    with pytest.raises(UserError, match="fits; use a smaller model"):
        check_sampling(preset("small"), None, Workload(weights="int8"), "cpu")


def test_more_pictures_than_memory_keeps_are_refused(monkeypatch):
    monkeypatch.setattr(memory_module, "available_memory", lambda device: 10 * GIB)
    with pytest.raises(UserError, match=r"^keeping all pictures \(10,000,000\) needs 2,622,720,000,000 bytes"):
        check_sampling(tiny.seq2seq().config, TOKENIZERS["vq-16"][1], Workload.of_request(1, 10_000_000, 1), "cpu")


@pytest.mark.parametrize("values", [{"pictures": 0}, {"captions": 0}, {"decoded": 0}, {"kept": 0}, {"window": 0},
                                    {"weights": "int4"}])
def test_an_impossible_workload_is_refused(values):
    with pytest.raises(UserError, match=r"at least 1|unknown precision"):
        Workload(**values)


@pytest.mark.parametrize(("count", "shown"), [(0, "0 bytes"), (1536, "1.50 KiB"), (MIB, "1.00 MiB"), (3 << 39, "1.50 TiB")])
def test_bytes_for_people(count, shown):
    assert human(count) == shown


# ---- what there is ----

def machine(root: Path, files: dict[str, str]) -> Path:
    for name, content in {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable:    1000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(("files", "expected"), [
    ({}, 1_024_000),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/memory.max": "500000\n",
      "sys/fs/cgroup/a/b/memory.current": "1\n", "sys/fs/cgroup/a/memory.current": "200000\n",
      "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 50000\n"}, 350_000),
    ({"proc/self/cgroup": "4:memory:/x\n1:cpu:/\n0::/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "700000\n",
      "sys/fs/cgroup/memory/memory.usage_in_bytes": "600000\n"}, 100_000),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "5000\n", "sys/fs/cgroup/memory.current": "6000\n"}, 0)])
def test_the_memory_there_is_the_least_of_machine_and_control_groups(tmp_path, files, expected):
    assert available_memory("cpu", machine(tmp_path, files)) == expected


def test_a_limit_on_addresses_counts(tmp_path, monkeypatch):
    import resource

    root = machine(tmp_path, {"proc/self/status": "VmSize:\t     300 kB\n"})
    monkeypatch.setattr(resource, "getrlimit", lambda which: (500 * 1024, 500 * 1024))
    assert available_memory("cpu", root) == 200 * 1024


def test_an_unknown_machine_refuses_nothing(tmp_path):
    assert available_memory("cpu", tmp_path) is None
    assert available_memory("meta") is None


def test_this_machine_has_memory():
    assert (available_memory("cpu") or 0) > 50 * MIB


# ---- a real run ----

def sampling_case(pictures: int):
    """Sampling with guidance, 20 M parameters, 16 x 16 tokens: what the child process measures."""
    tokenizer = VQGAN(VQGANConfig(**PICTURES)).eval()
    words = tiny.text_tokenizer()
    generator = tiny.seq2seq(**SIZES, text_vocab_size=words.vocab_size)
    whole = TextToImage(LoadedModel(tokenizer, generator, words, SamplingParams(), Path()))
    return lambda: whole.generate("a red heart", num_images=pictures)


SIZES = {"width": 384, "heads": 6, "head_dim": 64, "decoder_layers": 6, "codebook_size": 1024, "grid": (16, 16)}
PICTURES = {"resolution": 64, "channels": 32, "channel_multipliers": (1, 1, 2), "codebook_size": 1024,
            "attention_resolutions": (), "num_res_blocks": 1}


@pytest.mark.slow
def test_the_peak_of_a_run_is_predicted():
    """Not above the prediction by more than a tenth, and not below half of it where the cache is most of it."""
    measured = peak_memory("tests.test_memory:sampling_case", {"pictures": 8}, "cpu", threads=1) * MIB
    config = tiny.seq2seq(**SIZES).config
    found = estimate(config, VQGANConfig(**PICTURES), Workload(pictures=8))
    predicted = found.total - found.weights - found.image_tokenizer
    assert found.self_cache > predicted / 2
    assert predicted / 2 <= measured <= predicted * 1.1, f"measured {measured:,.0f} bytes, predicted {predicted:,}"


@pytest.mark.slow
def test_a_limit_that_is_too_small_is_noticed_in_a_process_of_its_own():
    """ulimit -v: what is left of it is what can be allocated."""
    code = ("import resource, inference.memory.estimate as m, torch; "
            "size = [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmSize')]"
            "[0] * 1024; resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2); "
            "print(m.available_memory('cpu'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=launching.REPOSITORY, env=launching.environment(), text=True,
                          capture_output=True, timeout=280, check=True)
    assert 0 < int(done.stdout) <= 64 * MIB
