"""Activations of a micro-batch, measured on the meta device.

The objectives' own forward and backward passes run there, and the bytes alive are added up.
"""

# Axes: B images of a micro-batch, T text ids, F width of text features, N image tokens,
#       L layout tokens, S pixels of a side, M hidden words

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inference.memory.meta_device import Alive, autocast_on_meta, build_on_meta, fused_attention
from inference.scoring.matcher import Matcher, MatcherConfig
from seq2seq import TRANSFORMER_KINDS, ImageTransformer, TextBatch, TransformerConfig
from seq2seq.config import LayersConfig
from seq2seq.layers import recompute_activations
from seq2seq.losses import PREDICTED, TokenLossConfig
from tokenizer_image import LPIPS, ImageTokenizer, build_tokenizer
from tokenizer_image.discriminators import build_discriminator
from tokenizer_image.quantizers import Quantizer, QuantizerConfig
from training.config.matcher import MatcherLossConfig
from training.config.tokenizer import TokenizerRunConfig
from training.data.visits.tokens import TokenBatch
from training.engine.launch import DTYPES
from training.objectives.matcher import MatcherWithTextHead, batch_accuracy, matcher_loss
from training.objectives.seq2seq import seq2seq_loss
from training.objectives.tokenizer import AdversarialTerms, TokenizerObjective

LEARNING_COPIES = {False: 4, True: 5}
"""learn_codebook_by_gradient -> float32 tables [positions, codes] held for a moment in learning.

Measured on vector-quantize-pytorch 1.32 (tests/test_activations.py). By gradient, one table per
codebook stays until backward.
"""


@dataclass(frozen=True)
class Activations:
    """Memory over the course of one micro-batch.

    `peaks` has a pair for each gradient that becomes complete: the most bytes alive since the one
    before (that gradient included, earlier ones not), and the numbers with gradients by then.
    """

    peaks: tuple[tuple[int, int], ...]

    def worst(self, held: Callable[[int], int] = lambda numbers: 0) -> tuple[int, int]:
        """Return (activations, gradients) in bytes where their sum is largest.

        held: numbers that have their gradients -> bytes of gradients that are kept of them.
        """
        return max(((alive, held(done)) for alive, done in self.peaks), key=sum)

    def towards(self, other: Activations, times: int) -> Activations:
        """Extrapolate on the line through this one and `other`: `times` their distance from here.

        Exact where bytes are a constant and a part per image, as nearly all activations are.
        """
        pairs = zip(self.peaks, other.peaks, strict=True)
        return Activations(tuple((one + times * (two - one), done)
                                 for (one, done), (two, _) in pairs))


def trace(run: Callable[[], object], parameters: Iterable[nn.Parameter], model: nn.Module,
          with_dropout: bool = False) -> Activations:
    """Run a micro-batch's forward and backward, and note the bytes alive at each new gradient.

    parameters: each one's gradient is freed as soon as it is complete; which gradients stay depends
    on the ZeRO stage (see `worst`).
    model: its tensors were there before and do not count; on the meta device or on another.
    with_dropout: see fused_attention.
    """
    peaks: list[tuple[int, int]] = []
    done = 0

    def complete(parameter: Tensor) -> None:
        nonlocal done
        peaks.append((alive.peak, done))
        done += parameter.numel()
        parameter.grad = None
        alive.peak = alive.now  # the next pair's peak counts from here

    hooks = [parameter.register_post_accumulate_grad_hook(complete) for parameter in parameters]
    with autocast_on_meta(), fused_attention(with_dropout), Alive(model) as alive:
        run()
        peaks.append((alive.peak, done))  # after the last gradient, or of a forward alone
    for hook in hooks:
        hook.remove()
    return Activations(tuple(peaks))


# ---- transformer

def text_on_meta(config: LayersConfig, captions: int) -> TextBatch:
    """Text ids [B, T] (or features [B, T, F]) and their mask [B, T], as a batch has them."""
    shape = (captions, config.text_length)
    mask = torch.empty(shape, dtype=torch.bool, device="meta")
    if config.text_feature_width is not None:
        return TextBatch(torch.empty(*shape, config.text_feature_width, device="meta"), mask)
    return TextBatch(torch.empty(shape, dtype=torch.int64, device="meta"), mask)


def transformer_model(config: TransformerConfig, precision: str, checkpointing: bool
                      ) -> ImageTransformer:
    """Build a transformer on the meta device as it is trained."""
    model: ImageTransformer = build_on_meta(TRANSFORMER_KINDS[config.kind], config)
    recompute_activations(model, checkpointing)
    return model.to(DTYPES[precision])


def transformer_step(model: ImageTransformer, loss: TokenLossConfig, count: int, text: TextBatch
                     ) -> None:
    """Run forward, loss and backward over `count` images, as train_seq2seq does."""
    config, device = model.config, text.text_mask.device
    tokens = torch.zeros(count, config.num_tokens, dtype=torch.int64, device=device)  # [B, N]
    layout = None
    if config.layout_grid:
        layout = torch.zeros(count, config.layout_tokens, dtype=torch.int64, device=device)
    batch = TokenBatch(text, tokens, tokens, layout)
    seq2seq_loss(model, model, loss, batch).total.backward()


def transformer_activations(config: TransformerConfig, loss: TokenLossConfig, count: int,
                            precision: str, checkpointing: bool, cuda: bool) -> Activations:
    """Measure a caption -> token transformer on a micro-batch of `count` images."""
    model = transformer_model(config, precision, checkpointing)
    text = text_on_meta(config, count)
    return trace(lambda: transformer_step(model, loss, count, text), model.parameters(), model,
                 with_dropout=cuda)


# ---- matcher

def matcher_activations(config: MatcherConfig, loss: MatcherLossConfig, count: int, precision: str,
                        checkpointing: bool, cuda: bool) -> Activations:
    """Measure a matcher on a micro-batch of `count` images.

    BERT's share of all text ids is hidden, which on average is so in training.
    """
    model = build_on_meta(lambda config: MatcherWithTextHead(Matcher(config), loss), config)
    model = model.to(DTYPES[precision])
    recompute_activations(model, checkpointing)

    side = config.image.resolution
    image = torch.empty(count, 3, side, side, device="meta", dtype=DTYPES[precision])
    text, mask = text_on_meta(config.text, count)
    same_caption = torch.empty(count, count, dtype=torch.bool, device="meta")

    inputs: list[Any] = [image, text, mask]
    hidden_words = None
    if model.head is not None:
        count_hidden = max(1, round(PREDICTED * text.numel()))
        hidden_words = torch.empty(count_hidden, dtype=torch.int64, device="meta")  # [M]
        # rows and columns instead of the mask that training has: without numbers, nobody knows how
        # many words a mask hides
        inputs += [text, (torch.empty_like(hidden_words), torch.empty_like(hidden_words))]

    def step() -> None:
        outputs = model(*inputs)
        matcher_loss(outputs, loss, same_caption, hidden_words).total.backward()
        batch_accuracy(outputs.embeddings, same_caption)

    return trace(step, model.parameters(), model, with_dropout=cuda)


# ---- image tokenizer

def tokenizer_model(config: TokenizerRunConfig, precision: str) -> ImageTokenizer:
    """Build an image tokenizer on the meta device as it is trained.

    But its quantizer only looks codes up: one that learns reads numbers, which are not there. A
    hook stands for the memory of learning.
    """
    model: ImageTokenizer = build_on_meta(build_tokenizer, config.model)
    if config.train.trained_part == "decoder":
        model.freeze_codes()
    model.gradient_checkpointing = config.train.gradient_checkpointing

    for part in model.modules():
        if isinstance(part, Quantizer) and part.config.kind != "gumbel":
            # but gumbel's softmax over scores needs no values, so it is measured as it trains
            part.eval()
            has_tables = part.config.kind in ("vq", "residual") and not part.config.raw_search
            if has_tables and not model.codes_frozen:
                part.register_forward_hook(_LearningCodebook())
    return model.to(DTYPES[precision])


class _LearningCodebook:
    """Forward hook that allocates a learning codebook's tables: all positions against all codes."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None
        """Tables that stay until backward."""

    def __call__(self, quantizer: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        options: QuantizerConfig = quantizer.config
        latents = inputs[0]
        table = (latents.numel() // latents.shape[1], quantizer.codebook_size)  # [positions, codes]
        if options.learn_codebook_by_gradient:
            self.kept = torch.empty(options.depth, *table, device=latents.device)
        copies = LEARNING_COPIES[options.learn_codebook_by_gradient]
        torch.empty(copies, *table, device=latents.device)  # freed at once, but part of the peak


def tokenizer_activations(config: TokenizerRunConfig, count: int, precision: str) -> Activations:
    """Measure an image tokenizer, discriminator and perceptual network on `count` images."""
    networks, step = tokenizer_step(config, count, precision)
    # only the tokenizer's gradients leave on the way: the discriminator's stay until its own step
    trained = [parameter for parameter in networks["model"].parameters() if parameter.requires_grad]
    return trace(step, trained, networks)


def tokenizer_step(config: TokenizerRunConfig, count: int, precision: str
                   ) -> tuple[nn.ModuleDict, Callable[[], None]]:
    """Return the networks of a tokenizer's run on the meta device, and a step as it trains them.

    The step has both halves: the tokenizer's, and the discriminator's if there is one.
    """
    model = tokenizer_model(config, precision)
    side, channels = config.model.resolution, config.model.in_channels
    networks = nn.ModuleDict({"model": model})
    perceptual = adversarial = None
    with torch.device("meta"):
        if config.loss.perceptual_weight:
            perceptual = networks["perceptual"] = LPIPS(config.loss.perceptual_network)
        if config.adversarial.weight:
            discriminator = build_discriminator(config.adversarial.discriminator, side, channels)
            networks["discriminator"] = discriminator
            adversarial = AdversarialTerms(config.adversarial, discriminator)
    objective = TokenizerObjective(config.loss, perceptual, adversarial)
    image = torch.empty(count, channels, side, side, device="meta")

    def step() -> None:
        result = model(image.to(DTYPES[precision]))
        # at the last step, where all terms count
        objective(result, image, model.last_layer, config.train.steps).total.backward()
        if adversarial is not None:
            step_with_r1 = config.adversarial.start_step
            loss = adversarial.discriminator_loss(image, result.reconstruction, step_with_r1)
            loss.total.backward()

    return networks, step
