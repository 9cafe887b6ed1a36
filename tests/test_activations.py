"""What a micro-batch keeps: found without numbers, it is to the byte what real training steps keep on the CPU."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inference.memory.meta_device import Alive, fused_attention
from inference.scoring.matcher import Matcher
from seq2seq import TRANSFORMER_KINDS, TextBatch
from seq2seq.layers import recompute_activations
from seq2seq.losses import TokenLossConfig
from tests import tiny
from tokenizer_image.quantizers import QuantizerConfig, build_quantizer
from training.config.matcher import MatcherLossConfig
from training.config.tokenizer import TokenizerRunConfig
from training.engine.launch import DTYPES
from training.objectives.matcher import MatcherWithTextHead, contrastive_loss
from training.planning import activations as module
from training.planning.activations import (
    LEARNING_COPIES,
    Activations,
    matcher_activations,
    tokenizer_activations,
    tokenizer_step,
    trace,
    transformer_activations,
    transformer_step,
)

MODELS = {
    "encoder_decoder": lambda: tiny.seq2seq(dropout=0.1), "grouped": lambda: tiny.seq2seq(kv_heads=1),
    "layout": lambda: tiny.seq2seq(layout_kind="classes", layout_classes=5, layout_grid=(2, 3)),
    "features": lambda: tiny.seq2seq(text_vocab_size=None, text_feature_width=24),
    "decoder_only": lambda: tiny.decoder_only(predict_text=True, attention=("row", "column", "convolution"),
                                              convolution_size=3)}


def text(config, count: int):
    mask = torch.ones(count, config.text_length, dtype=torch.bool)
    if config.text_feature_width:
        return TextBatch(torch.randn(count, config.text_length, config.text_feature_width), mask)
    return TextBatch(torch.ones(count, config.text_length, dtype=torch.int64), mask)


def held(activations: Activations, number: int) -> int:
    return sum(activations.worst(lambda done: number * done))


@pytest.mark.parametrize(("name", "checkpointing", "precision"), [
    *((name, False, "float32") for name in MODELS), ("encoder_decoder", False, "bfloat16"),
    ("encoder_decoder", True, "bfloat16"), ("decoder_only", True, "float32")])
def test_a_transformers_activations_are_those_of_a_real_step(name, checkpointing, precision):
    config = MODELS[name]().config
    loss = TokenLossConfig(text_weight=0.1 if getattr(config, "predict_text", False) else 0.0, z_weight=1e-4)
    real = TRANSFORMER_KINDS[config.kind](config)
    recompute_activations(real, checkpointing)
    real = real.to(DTYPES[precision]).train()
    given = text(config, 3)
    expected = trace(lambda: transformer_step(real, loss, 3, given), real.parameters(), real)
    found = transformer_activations(config, loss, 3, precision, checkpointing, cuda=False)
    number = torch.finfo(DTYPES[precision]).bits // 8
    assert found.worst()[0] == pytest.approx(expected.worst()[0], rel=0.02)
    assert held(found, number) == pytest.approx(held(expected, number), rel=0.02)


def test_checkpointing_keeps_less():
    config = tiny.seq2seq(encoder_layers=4, decoder_layers=4, grid=(8, 8)).config
    whole, recomputed = (transformer_activations(config, TokenLossConfig(), 8, "float32", on, cuda=False).worst()[0]
                         for on in (False, True))
    assert recomputed < whole / 2


def test_dropped_attention_keeps_its_scores_on_a_cpu_alone():
    config = tiny.seq2seq(dropout=0.1, grid=(16, 16), decoder_layers=1).config
    cpu, cuda = (transformer_activations(config, TokenLossConfig(), 2, "float32", False, cuda=on).worst()[0]
                 for on in (False, True))
    assert cpu - cuda > 2 * 2 * 256 * 256 * 4  # B pictures, H heads, N x N scores


def test_activations_grow_in_a_straight_line():
    config = tiny.seq2seq().config
    one, two, many = (transformer_activations(config, TokenLossConfig(), count, "float32", False, cuda=False)
                      for count in (1, 2, 40))
    assert one.towards(two, 39).worst()[0] == pytest.approx(many.worst()[0], rel=0.01)


TOKENIZERS = {
    "vqgan": {"model": {"preset": "debug"}}, "checkpointed": {"model": {"preset": "debug"}, "train": {
        "gradient_checkpointing": True}},
    "adversarial": {"model": {"preset": "debug"}, "loss": {"perceptual_weight": 1.0}, "adversarial": {
        "weight": 0.5, "lecam_weight": 0.1, "r1_weight": 1.0, "discriminator": {"layers": 1}}},
    "stylegan": {"model": {"preset": "debug"}, "adversarial": {"weight": 0.5, "discriminator": {"kind": "stylegan"}}},
    "many codes": {"model": {"preset": "debug", "codebook_size": 8192}},
    "by gradient": {"model": {"preset": "debug", "codebook_size": 8192, "quantizer": {
        "learn_codebook_by_gradient": True, "dead_code_fraction": 0.0}}},
    "residual": {"model": {"preset": "debug", "quantizer": {"kind": "residual", "depth": 2}}},
    "lfq": {"model": {"preset": "debug", "embed_dim": 6, "codebook_size": 64, "quantizer": {"kind": "lfq"}}},
    "simvq": {"model": {"preset": "debug", "quantizer": {"kind": "simvq"}}},
    "raw search": {"model": {"preset": "debug", "codebook_size": 8192, "quantizer": {
        "learn_codebook_by_gradient": True, "raw_search": True, "kmeans_init": False, "dead_code_fraction": 0.0}}},
    "gumbel": {"model": {"preset": "debug", "codebook_size": 2048, "quantizer": {"kind": "gumbel"}}},
    "vit": {"model": {"preset": "vit-debug"}}, "dvae": {"model": {"preset": "dvae-debug"}}}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_image_tokenizers_activations_are_those_of_a_real_step(name, monkeypatch):
    config = TokenizerRunConfig.parse({"run_dir": "-", "data": {"path": "-"}, **TOKENIZERS[name]}, "test")
    found = tokenizer_activations(config, 4, "float32")
    meta_step = tokenizer_step(config, 4, "float32")
    monkeypatch.setattr(module, "tokenizer_model", lambda config, precision: real_tokenizer(config))
    monkeypatch.setattr(module.torch, "device", lambda name: torch.no_grad())  # `with torch.device("meta")` builds for real
    original = torch.empty
    monkeypatch.setattr(module.torch, "empty", lambda *shape, device=None, **options: original(*shape, **options))
    parts, step = tokenizer_step(config, 4, "float32")
    step()  # k-means places the codes
    monkeypatch.undo()
    learning = [parameter for parameter in parts["model"].parameters() if parameter.requires_grad]
    expected = trace(step, learning, parts)
    assert len(meta_step[0]) == len(parts)
    assert found.worst()[0] == pytest.approx(expected.worst()[0], rel=0.1)


def real_tokenizer(config):
    model = module.build_tokenizer(config.model).train()
    model.gradient_checkpointing = config.train.gradient_checkpointing
    return model


@pytest.mark.parametrize("by_gradient", [False, True])
@pytest.mark.parametrize("kind", [{"kind": "vq"}, {"kind": "residual", "depth": 2}])
def test_a_learning_codebook_compares_all_positions_with_all_codes(kind, by_gradient):
    torch.manual_seed(0)
    quantizer = build_quantizer(8, 2048, QuantizerConfig(**kind, learn_codebook_by_gradient=by_gradient)).train()
    latents = torch.randn(2, 8, 32, 32, requires_grad=True)
    quantizer(latents)  # places the codes
    with Alive(nn.ModuleList([quantizer, nn.Linear(1, 1)])) as alive:
        for _ in range(4):  # a table less where no dead code is restarted
            quantizer(latents)
    kept = kind.get("depth", 1) if by_gradient else 0
    assert alive.peak / (4 * 2 * 32 * 32 * 2048) == pytest.approx(LEARNING_COPIES[by_gradient] + kept, rel=0.05)


def test_a_matchers_activations_are_those_of_a_real_step():
    config, loss = tiny.matcher().config, MatcherLossConfig()
    real = MatcherWithTextHead(Matcher(config), loss).train()
    image, same, given = torch.randn(6, 3, 16, 16), torch.eye(6, dtype=torch.bool), text(config.text, 6)

    def step() -> None:
        outputs = real(image, *given)
        contrastive_loss(outputs.embeddings, outputs.scale, same).backward()

    expected = trace(step, real.parameters(), real)
    found = matcher_activations(config, loss, 6, "float32", False, cuda=False)
    assert found.worst()[0] == pytest.approx(expected.worst()[0], rel=0.02)
    hidden = matcher_activations(config, MatcherLossConfig(mlm_weight=1.0), 6, "float32", False, cuda=False)
    assert hidden.worst()[0] > found.worst()[0]


def test_gradients_that_stay_are_counted_with_what_is_alive_then():
    found = Activations(((100, 0), (60, 30), (10, 40)))
    assert found.worst() == (100, 0)
    assert found.worst(lambda done: 2 * done) == (60, 60)
    assert found.worst(lambda done: 90) == (100, 90)


def test_attention_is_torchs_own_again():
    before = F.scaled_dot_product_attention
    with fused_attention():
        assert F.scaled_dot_product_attention is not before
        heads = torch.randn(1, 2, 4, 8)
        assert torch.equal(F.scaled_dot_product_attention(heads, heads, heads), before(heads, heads, heads))
    assert F.scaled_dot_product_attention is before


@pytest.mark.parametrize(("function", "measure"), [
    ("seq2seq.loss_parts", lambda: transformer_activations(
        tiny.seq2seq().config, TokenLossConfig(), 2, "float32", False, False)),
    ("matcher.contrastive_loss",
     lambda: matcher_activations(tiny.matcher().config, MatcherLossConfig(), 2, "float32", False, False)),
    ("tokenizer.tokenizer_loss", lambda: tokenizer_activations(
        TokenizerRunConfig.parse({"run_dir": "-", "data": {"path": "-"}, **TOKENIZERS["vqgan"]}, "test"), 2, "float32"))])
def test_what_a_loss_keeps_shows_in_the_plan_by_itself(function, measure, monkeypatch):
    before, kept, size = measure().worst()[0], [], 1 << 24
    module_name, name = function.split(".")
    original = getattr(importlib.import_module(f"training.objectives.{module_name}"), name)

    def with_more(*args, **options):
        kept.append(torch.empty(size, dtype=torch.int8, device="meta"))
        return original(*args, **options)

    monkeypatch.setattr(f"training.objectives.{function}", with_more)
    assert measure().worst()[0] == before + size
