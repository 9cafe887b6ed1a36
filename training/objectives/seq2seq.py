"""The objective of caption -> image tokens."""

# Axes: B batch, T text ids, N image tokens, L layout tokens

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seq2seq import DecoderOnly, ImageTransformer, TransformerConfig
from seq2seq.image_transformer import TokenLogits
from seq2seq.losses import TokenLossConfig, loss_parts, region_token_weights
from tokenloom_common.errors import UserError
from training.config.seq2seq import Seq2SeqRunConfig
from training.data.visits.tokens import TokenBatch
from training.objectives.loss_terms import LossTerms


def seq2seq_loss(forward: Callable[..., TokenLogits], model: ImageTransformer,
                 loss: TokenLossConfig, batch: TokenBatch) -> LossTerms:
    """Run the forward pass of one micro-batch, on the model's device, and return its loss.

    forward: `model` itself, or the engine around it, which training must go through.
    """
    text_input, text_mask = batch.text
    inputs = [text_input, text_mask, batch.input_tokens]
    if batch.layout is not None:
        inputs.append(batch.layout)
    logits = forward(*inputs)

    text_targets = None  # only a decoder-only model predicts its text (DALL-E)
    if isinstance(model, DecoderOnly) and model.config.predict_text:
        text_targets = model.text_targets(text_input, text_mask)
        if model.config.text_padding != "masked":  # learned padding is predicted like text
            text_mask = torch.ones_like(text_mask)

    parts = loss_parts(logits, loss, batch.image_tokens, _region_weights(model, loss, batch.layout),
                       batch.layout, text_targets, text_mask)
    # every part is a mean over its own tokens
    weighted = [term * weight for term, weight in parts.values()]
    terms = {name: term.detach() for name, (term, _) in parts.items()}
    return LossTerms(torch.stack(weighted).sum(), terms)


def _region_weights(model: ImageTransformer, loss: TokenLossConfig,
                    layout: Tensor | None) -> Tensor | None:
    """Return weights [B, N] of the image tokens by their layout class; None if all are equal."""
    if layout is None or not loss.region_weights:
        return None
    return region_token_weights(layout, model.config.layout_grid, model.config.grid,
                                loss.region_weights)


def check_losses(config: Seq2SeqRunConfig, model: TransformerConfig) -> None:
    """Raise UserError for region weights of a layout class that the model does not have."""
    weights = config.loss.region_weights
    if not weights:
        return
    if model.layout_grid is None:
        raise UserError("loss.region_weights weigh image tokens by their layout, and this run has "
                        "none: the token shards need a layout (encode_dataset's layout.kind) and "
                        "use_layout true")
    classes = model.layout_classes or 0
    unknown = [layout_class for layout_class in weights if not 0 <= layout_class < classes]
    if unknown:
        raise UserError(f"loss.region_weights names layout class {unknown[0]}; the layout has 0 "
                        f"to {classes - 1}")
