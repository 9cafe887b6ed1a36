"""FLOPs of training: counted on models without memory, checked against arithmetic by hand and against a real run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from seq2seq import DecoderOnlyConfig, Seq2SeqConfig
from tests import tiny
from tokenizer_image import IMAGE_TOKENIZERS, PRESETS, VQGANConfig, build_tokenizer
from training.config.transformer import read_settings
from training.engine.gpus import PEAK_FLOPS, known_gpu, peak_flops, training_flops
from training.planning.flops import forward_flops, matcher_forward_flops, tokenizer_forward_flops

SHAPE = {"text_vocab_size": 320, "text_length": 12, "codebook_size": 32, "grid": (4, 4), "width": 32, "heads": 2,
         "head_dim": 16, "feedforward": "gelu", "feedforward_multiplier": 4.0}


class SpeltOut(TorchFunctionMode):
    """Attention as its two products: torch's counter has no formula for the CPU's kernel. Masks are left out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, key, value = args
            groups = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
            return (query @ key.mT).softmax(-1) @ value
        return func(*args, **(kwargs or {}))


def counted_for_real(model, *inputs) -> int:
    """The same count over real numbers."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), SpeltOut():
        model(*inputs)
    return counter.get_total_flops()


def text(captions: int = 1):
    return torch.ones(captions, 12, dtype=torch.int64), torch.ones(captions, 12, dtype=torch.bool)


def test_an_encoder_decoder_by_hand():
    """T 12 text ids, N 16 image slots, width 32, inner width 128, 32 codes; a product of n x a by a x b is 2 n a b."""
    encoder = 4 * (2 * 12 * 32 * 32) + 2 * (2 * 12 * 12 * 32) + 2 * (2 * 12 * 32 * 128)  # projections, attention, feed-forward
    own = 4 * (2 * 16 * 32 * 32) + 2 * (2 * 16 * 16 * 32)  # what the mask hides is multiplied too
    cross = 2 * (2 * 16 * 32 * 32) + 2 * (2 * 12 * 32 * 32) + 2 * (2 * 16 * 12 * 32)  # keys and values are the caption's
    decoder = own + cross + 2 * (2 * 16 * 32 * 128)
    logits = 2 * 16 * 32 * 32
    assert encoder + decoder + logits == 911_360
    assert forward_flops(Seq2SeqConfig(**SHAPE, encoder_layers=1, decoder_layers=1)) == 911_360
    assert forward_flops(Seq2SeqConfig(**SHAPE, encoder_layers=2, decoder_layers=3)) == 2 * encoder + 3 * decoder + logits


def test_a_decoder_only_model_by_hand():
    """28 slots: the 12 of the text see one another, the 16 of the image see all 28."""
    layer = 4 * (2 * 28 * 32 * 32) + 2 * 2 * 32 * (12 * 12 + 16 * 28) + 2 * (2 * 28 * 32 * 128)
    assert forward_flops(DecoderOnlyConfig(**SHAPE, layers=1)) == layer + 2 * 16 * 32 * 32 == 796_672


@pytest.mark.long
@pytest.mark.parametrize("make", [
    tiny.seq2seq, tiny.decoder_only, lambda: tiny.seq2seq(kv_heads=1),
    lambda: tiny.decoder_only(attention=("convolution", "column"), convolution_size=3, predict_text=True)])
def test_transformers_count_as_they_run(make):
    model = make()
    assert forward_flops(model.config) == counted_for_real(model, *text(), torch.ones(1, 16, dtype=torch.int64))


def test_a_layout_and_text_features_are_counted():
    layout = {"layout_kind": "classes", "layout_classes": 5, "layout_grid": (2, 3)}
    model, tokens = tiny.seq2seq(**layout), torch.ones(1, 16, dtype=torch.int64)
    assert forward_flops(model.config) == counted_for_real(model, *text(), tokens, torch.ones(1, 6, dtype=torch.int64))
    frozen = tiny.seq2seq(text_vocab_size=None, text_feature_width=24)
    features = torch.ones(1, 12, 24)
    assert forward_flops(frozen.config) == counted_for_real(frozen, features, text()[1], tokens)
    assert forward_flops(frozen.config) - forward_flops(tiny.seq2seq().config) == 2 * 12 * 24 * 32


@pytest.mark.parametrize("quantizer", [
    {"kind": "vq"}, {"kind": "residual", "depth": 2}, {"kind": "fsq", "levels": (3, 3, 3, 3)}, {"kind": "lfq"},
    {"kind": "simvq"}, {"learn_codebook_by_gradient": True, "raw_search": True, "kmeans_init": False, "dead_code_fraction": 0}])
def test_image_tokenizers_count_as_they_run(quantizer):
    codes = {"fsq": 81, "lfq": 16}.get(quantizer.get("kind"), 32)
    config = VQGANConfig.parse({**tiny.vqgan().config.plain(), "codebook_size": codes, "quantizer": quantizer}, "test")
    model = build_tokenizer(config).eval()
    assert tokenizer_forward_flops(config) == counted_for_real(model, torch.zeros(1, 3, 16, 16)) > 6e6


def test_gumbel_counts_the_draw_of_training():
    """All codes are scored for the loss and again, in blocks, for the code; a sample weighs all rows."""
    config = VQGANConfig.parse({**tiny.vqgan().config.plain(), "quantizer": {"kind": "gumbel"}}, "test")
    scores = 2 * 16 * 4 * 32  # 16 positions, 4 numbers of a latent, 32 codes
    model = build_tokenizer(config)
    assert tokenizer_forward_flops(config) == counted_for_real(model.train(), torch.zeros(1, 3, 16, 16))
    assert tokenizer_forward_flops(config) == counted_for_real(model.eval(), torch.zeros(1, 3, 16, 16)) + scores


@pytest.mark.parametrize("kind", IMAGE_TOKENIZERS)
def test_every_family_of_image_tokenizers_is_counted(kind):
    config = next(config for family, config in PRESETS.values() if family == kind)
    pixels = config.resolution**2
    assert tokenizer_forward_flops(config) > 100 * pixels


def test_a_matcher_counts_both_towers():
    model = tiny.matcher()
    assert matcher_forward_flops(model.config) == counted_for_real(model, torch.zeros(1, 3, 16, 16), *text())


@pytest.mark.long
def test_the_largest_preset_is_counted_without_its_memory():
    """20.5 billion numbers. Of a layer, projections and feed-forward see 1,024 image slots, keys and values of the caption 128
    text slots, as the text encoder does; attention in blocks of 128 queries adds little to these."""
    config = read_settings({"preset": "parti-20b"}).build(
        {"text_vocab_size": 16_000, "text_length": 128, "codebook_size": 8192, "grid": (32, 32)})
    square = 2 * 4096**2
    products = 64 * (4 + 2 + 8) * square * 1024 + (64 * 2 + 16 * 12) * square * 128 + 2 * 4096 * 8192 * 1024
    assert products == 32_229_434_589_184
    assert 1 < forward_flops(config) / products < 1.02


def test_backward_is_twice_forward():
    model = tiny.seq2seq()
    with FlopCounterMode(display=False) as counter, SpeltOut():
        model(*text(), torch.ones(1, 16, dtype=torch.int64)).image.sum().backward()
    assert counter.get_total_flops() == training_flops(forward_flops(model.config))


def test_counting_leaves_autocast_as_it_was():
    before = torch.autocast.__init__
    forward_flops(tiny.seq2seq(width=48).config)
    assert torch.autocast.__init__ is before
    with pytest.raises(RuntimeError), torch.autocast("meta"):
        pass


@pytest.mark.parametrize(("name", "entry"), [
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"),
    ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100-PCIE-40GB", "A100"), ("NVIDIA L4", "L4"),
    ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("Tesla V100-SXM2-16GB", "V100"),
    ("Tesla V100-PCIE-32GB", "V100 PCIe"), ("NVIDIA B200", "B200"), ("h100", "H100"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA L40", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("", None)])
def test_gpus_are_known_by_the_names_that_torch_gives(name, entry):
    assert known_gpu(name) == entry


def test_every_entry_is_found_by_its_own_name():
    assert [known_gpu(name) for name in PEAK_FLOPS] == list(PEAK_FLOPS)


def test_peak_of_a_precision():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 156e12  # TF32
    assert peak_flops("Tesla V100-SXM2-16GB", "bfloat16") is None
    assert peak_flops("Apple M4", "bfloat16") is None
