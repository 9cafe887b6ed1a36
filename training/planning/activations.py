"""What a micro-batch holds between forward and backward, found by running the trainings' own forwards, losses and backwards on
the meta device and adding up what is alive."""

# Axes: B pictures of a micro-batch, T text ids, F width of text features, N image tokens, L layout tokens, S pixels of a side

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inference.memory.meta_device import Alive, autocast_on_meta, build_on_meta, fused_attention
from inference.scoring.matcher import Matcher, MatcherConfig
from seq2seq import TRANSFORMER_KINDS, DecoderOnly, ImageTransformer, TransformerConfig
from seq2seq.config import LayersConfig
from seq2seq.layers import recompute_activations
from seq2seq.losses import TokenLossConfig, loss_parts, masked_text_loss, region_token_weights
from tokenizer_image import LPIPS, ImageTokenizer, build_tokenizer, tokenizer_loss
from tokenizer_image.adversarial import (
    LeCAM,
    discriminator_objective,
    generator_loss,
    generator_weight,
)
from tokenizer_image.discriminators import build_discriminator
from tokenizer_image.quantizers import Quantizer, QuantizerConfig
from training.config.matcher import MatcherLossConfig
from training.config.tokenizer import TokenizerRunConfig
from training.engine.launch import DTYPES
from training.objectives.matcher import MatcherObjective, batch_accuracy, contrastive_loss

LEARNING_COPIES = {False: 4, True: 5}
"""learn_codebook_by_gradient -> float32 tables of positions x codes that vector-quantize-pytorch 1.32 has for a moment when a
codebook learns (measured: tests/test_activations.py); by gradient, one a codebook stays until backward."""


@dataclass(frozen=True)
class Activations:
    """The course of one micro-batch: `peaks` has, for each gradient that becomes complete, the most bytes alive since the one
    before (that gradient included, earlier ones not), and how many numbers had their gradients by then."""

    peaks: tuple[tuple[int, int], ...]

    def worst(self, held: Callable[[int], int] = lambda numbers: 0) -> tuple[int, int]:
        """(activations, gradients) in bytes where their sum is largest, if `held(numbers)` bytes of gradients stay."""
        return max(((alive, held(done)) for alive, done in self.peaks), key=sum)

    def towards(self, other: Activations, times: int) -> Activations:
        """What follows on a straight line through this one and `other`, `times` their distance from this one."""
        pairs = zip(self.peaks, other.peaks, strict=True)
        return Activations(tuple((one + times * (two - one), done) for (one, done), (two, _) in pairs))


def trace(run: Callable[[], object], parameters: Iterable[nn.Parameter], model: nn.Module, with_dropout: bool = False
          ) -> Activations:
    """Run a micro-batch's forward and backward, each gradient of `parameters` let go as soon as it is complete.

    model: whose tensors count as there before, on the meta device or on another; with_dropout: see fused_attention.
    """
    peaks: list[tuple[int, int]] = []
    done = 0

    def complete(parameter: Tensor) -> None:
        nonlocal done
        peaks.append((alive.peak, done))
        done += parameter.numel()
        parameter.grad = None
        alive.peak = alive.now

    hooks = [parameter.register_post_accumulate_grad_hook(complete) for parameter in parameters]
    with autocast_on_meta(), fused_attention(with_dropout), Alive(model) as alive:
        run()
        peaks.append((alive.peak, done))
    for hook in hooks:
        hook.remove()
    return Activations(tuple(peaks))


def text_on_meta(config: LayersConfig, captions: int) -> tuple[Tensor, Tensor]:
    """Text ids [B, T] (or features [B, T, F]) and their mask [B, T], as a batch has them."""
    shape = (captions, config.text_length)
    mask = torch.empty(shape, dtype=torch.bool, device="meta")
    if config.text_feature_width is not None:
        return torch.empty(*shape, config.text_feature_width, device="meta"), mask
    return torch.empty(shape, dtype=torch.int64, device="meta"), mask


def transformer_model(config: TransformerConfig, precision: str, checkpointing: bool) -> ImageTransformer:
    """A transformer as it is trained, on the meta device."""
    model: ImageTransformer = build_on_meta(TRANSFORMER_KINDS[config.kind], config)
    recompute_activations(model, checkpointing)
    return model.to(DTYPES[precision])


def transformer_step(model: ImageTransformer, loss: TokenLossConfig, count: int, text: tuple[Tensor, Tensor]) -> None:
    """Forward, loss and backward over `count` pictures, as train_seq2seq has them."""
    config, device = model.config, text[1].device
    tokens = torch.zeros(count, config.num_tokens, dtype=torch.int64, device=device)
    layout = torch.zeros(count, config.layout_tokens, dtype=torch.int64, device=device) if config.layout_grid else None
    logits = model(*text, tokens, *([] if layout is None else [layout]))
    weights = None
    if layout is not None and loss.region_weights:
        weights = region_token_weights(layout, config.layout_grid, config.grid, loss.region_weights)
    targets, mask = None, text[1]
    if isinstance(model, DecoderOnly) and config.predict_text:
        targets = model.text_targets(*text)
        mask = mask if config.text_padding == "masked" else torch.ones_like(mask)
    parts = loss_parts(logits, loss, tokens, weights, layout, targets, mask)
    torch.stack([term * weight for term, weight in parts.values()]).sum().backward()


def transformer_activations(config: TransformerConfig, loss: TokenLossConfig, count: int, precision: str, checkpointing: bool,
                            cuda: bool) -> Activations:
    """Of a caption -> token transformer and a micro-batch of `count` pictures."""
    model = transformer_model(config, precision, checkpointing)
    text = text_on_meta(config, count)
    return trace(lambda: transformer_step(model, loss, count, text), model.parameters(), model, with_dropout=cuda)


def matcher_activations(config: MatcherConfig, loss: MatcherLossConfig, count: int, precision: str, checkpointing: bool,
                        cuda: bool) -> Activations:
    """Of a matcher and a micro-batch of `count` pictures; of the hidden words, BERT's 15 % of all text ids."""
    model = build_on_meta(lambda config: MatcherObjective(Matcher(config), loss), config).to(DTYPES[precision])
    recompute_activations(model, checkpointing)
    side, (text, mask) = config.image.resolution, text_on_meta(config.text, count)
    image = torch.empty(count, 3, side, side, device="meta", dtype=DTYPES[precision])
    same = torch.empty(count, count, dtype=torch.bool, device="meta")

    def step() -> None:
        outputs = model(image, text, mask)
        total = contrastive_loss(outputs.embeddings, outputs.scale, same)
        if model.head is not None:  # which words are hidden is not known without numbers
            memory = model.matcher.text_encoder(text, mask).flatten(0, 1)[: max(1, round(0.15 * text.numel()))]
            logits = model.head(memory, model.matcher.text_encoder.text_input.embedding.weight)
            total = total + loss.mlm_weight * masked_text_loss(logits, text.flatten()[: len(logits)])
        total.backward()
        batch_accuracy(outputs.embeddings, same)

    return trace(step, model.parameters(), model, with_dropout=cuda)


def tokenizer_model(config: TokenizerRunConfig, precision: str) -> ImageTokenizer:
    """An image tokenizer as it is trained, on the meta device; its quantizer looks codes up and does not learn."""
    model: ImageTokenizer = build_on_meta(build_tokenizer, config.model)
    if config.train.trained_part == "decoder":
        model.freeze_codes()
    model.gradient_checkpointing = config.train.gradient_checkpointing
    for part in model.modules():  # a codebook that learns looks at its numbers, and there are none
        if isinstance(part, Quantizer) and part.config.kind != "gumbel":
            part.eval()
            if not model.codes_frozen and part.config.kind in ("vq", "residual") and not part.config.raw_search:
                part.register_forward_hook(_LearningCodebook())
    return model.to(DTYPES[precision])


class _LearningCodebook:
    """What a codebook that learns holds beside: tables of all positions against all codes, for a moment or until backward."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def __call__(self, quantizer: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        """A forward hook, whose quantizer looks codes up alone."""
        options: QuantizerConfig = quantizer.config
        shape, device = (inputs[0].numel() // inputs[0].shape[1], quantizer.codebook_size), inputs[0].device
        if options.learn_codebook_by_gradient:
            self.kept = torch.empty(options.depth, *shape, device=device)
        torch.empty(LEARNING_COPIES[options.learn_codebook_by_gradient], *shape, device=device)


def tokenizer_activations(config: TokenizerRunConfig, count: int, precision: str) -> Activations:
    """Of an image tokenizer with its discriminator and perceptual network, and a micro-batch of `count` pictures."""
    parts, step = tokenizer_step(config, count, precision)
    return trace(step, [p for p in parts["model"].parameters() if p.requires_grad], parts)


def tokenizer_step(config: TokenizerRunConfig, count: int, precision: str) -> tuple[nn.ModuleDict, Callable[[], None]]:
    """The networks of a tokenizer's training on the meta device, and a step as train_tokenizer has it."""
    model, side = tokenizer_model(config, precision), config.model.resolution
    parts = nn.ModuleDict({"model": model})
    with torch.device("meta"):
        perceptual = LPIPS(config.loss.perceptual_network) if config.loss.perceptual_weight else None
        lecam = LeCAM(config.adversarial.lecam_decay)
        if config.adversarial.weight:
            parts["adversary"] = build_discriminator(config.adversarial.discriminator, side, config.model.in_channels)
    if perceptual is not None:
        parts["perceptual"] = perceptual
    image = torch.empty(count, config.model.in_channels, side, side, device="meta")

    def step() -> None:
        result = model(image.to(DTYPES[precision]))
        total = tokenizer_loss(result, image, config.loss, perceptual).total
        if "adversary" in parts:
            adversary = parts["adversary"].requires_grad_(False)
            term = generator_loss(adversary(result.reconstruction.float()), config.adversarial.loss)
            total = total + term * generator_weight(config.train.steps, config.adversarial, total, term, model.last_layer)
        total.backward()
        if "adversary" in parts:
            discriminator = parts["adversary"].requires_grad_(True)
            discriminator_objective(discriminator, image, result.reconstruction.float(), config.adversarial.start_step,
                                    config.adversarial, lecam).total.backward()

    return parts, step
