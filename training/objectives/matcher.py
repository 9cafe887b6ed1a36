"""The objectives of a matcher: find the caption of each image, predict hidden words."""

# Axes: B batch, S side in pixels, E width of the shared space, T text ids, M hidden ids, D width, V
# vocabulary

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.scoring.matcher import Embeddings, Matcher
from seq2seq.losses import masked_text_loss
from training.config.matcher import MatcherLossConfig
from training.objectives.loss_terms import LossTerms


def contrastive_loss(embeddings: Embeddings, scale: Tensor, same_caption: Tensor) -> Tensor:
    """Symmetric cross entropy in nats of telling partners from the others of the batch -> scalar
    float32.

    embeddings: of B images and their B captions; scale: 1 / temperature; same_caption [B, B] bool,
    True on the diagonal and wherever two rows have the same caption, which makes each a right
    answer for the other. A row with several right answers is asked for an equal share of each:
    UniCL (Yang et al. 2022, https://arxiv.org/abs/2204.03610), and where all captions differ the
    loss of Radford et al. 2021.
    """
    logits = scale * embeddings.image @ embeddings.text.T  # [B images, B captions]
    # rows of one caption have the same sum, so that one matrix of shares is right in both
    # directions
    share = same_caption / same_caption.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, share) + F.cross_entropy(logits.T, share)) / 2


@torch.no_grad()
def batch_accuracy(embeddings: Embeddings, same_caption: Tensor) -> Tensor:
    """Share of images whose best caption in the batch is right -> scalar float32."""
    # without the scale, which does not change the order
    best = (embeddings.image @ embeddings.text.T).argmax(dim=1, keepdim=True)  # [B, 1]
    return same_caption.gather(1, best).float().mean()


class MaskedTextHead(nn.Module):
    """BERT's head (Devlin et al. 2019): hidden words' memory -> logits by the tied embedding."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, memory: Tensor, embedding: Tensor) -> Tensor:
        """memory [M, D], embedding [V, D] -> logits [M, V]."""
        hidden = self.norm(F.gelu(self.dense(memory)))
        return F.linear(hidden, embedding, self.bias)


class MatcherOutputs(NamedTuple):
    """Embeddings, 1 / temperature, and logits [M, V] of the hidden words, row by row, if any."""

    embeddings: Embeddings
    scale: Tensor
    text_logits: Tensor | None = None


class MatcherWithTextHead(nn.Module):
    """The matcher and the head that only its training needs, as one module for the engine."""

    def __init__(self, matcher: Matcher, loss: MatcherLossConfig) -> None:
        super().__init__()
        self.matcher = matcher
        text = matcher.config.text
        self.head = MaskedTextHead(text.width,
                                   text.text_vocab_size or 0) if loss.mlm_weight else None

    def forward(self, image: Tensor, text_input: Tensor, text_mask: Tensor,
                hidden_ids: Tensor | None = None,
                predicted: Tensor | tuple[Tensor, Tensor] | None = None) -> MatcherOutputs:
        """image [B, 3, S, S]; text ids [B, T] (or features) and text_mask [B, T]; hidden_ids [B, T]
        as from `mask_text`; predicted: which of them, as a mask [B, T] or as rows [M] and columns
        [M]."""
        embeddings = self.matcher(image, text_input, text_mask)
        logits = None
        # a second pass through the text tower: the first one reads the whole caption
        if self.head is not None and hidden_ids is not None and predicted is not None:
            encoder = self.matcher.text_encoder
            memory = encoder(hidden_ids, text_mask)[predicted]  # [M, D]
            logits = self.head(memory, encoder.text_input.embedding.weight)
        return MatcherOutputs(embeddings, self.matcher.scale, logits)


def matcher_loss(outputs: MatcherOutputs, loss: MatcherLossConfig, same_caption: Tensor,
                 hidden_words: Tensor | None) -> LossTerms:
    """Return the loss of one micro-batch.

    same_caption [B, B]: see contrastive_loss; hidden_words [M]: their true ids.
    """
    contrastive = contrastive_loss(outputs.embeddings, outputs.scale, same_caption)
    total = loss.contrastive_weight * contrastive
    terms = {"contrastive": contrastive.detach()}
    if outputs.text_logits is not None:
        assert hidden_words is not None, "words were hidden, so their ids are known"
        words = masked_text_loss(outputs.text_logits, hidden_words)
        total = total + loss.mlm_weight * words
        terms["words"] = words.detach()
    return LossTerms(total, terms)
