"""The trained encoder of captions: embeddings and bidirectional layers."""

# Axes: B batch, T text ids, F width of text features, D width

from __future__ import annotations

import torch
from torch import Tensor, nn

from seq2seq.config import LayersConfig
from seq2seq.layers import embedding_norm, text_stack
from seq2seq.positions import AnglesByDevice, flat_positions


class TextInput(nn.Module):
    """Text ids or a frozen encoder's features -> [B, T, D], learned positions included."""

    def __init__(self, config: LayersConfig, padding_ids: int = 0) -> None:
        """padding_ids: ids after the vocabulary that stand for padding at each position."""
        super().__init__()
        self.text_length = config.text_length
        self.embedding = _text_embedding(config, padding_ids)
        shape = (config.text_length, config.width)  # filled by the model around it
        self.position = nn.Parameter(torch.empty(shape)) if config.learned_positions else None

    def forward(self, text_input: Tensor) -> Tensor:
        """Ids [B, T] int64 or features [B, T, F] -> [B, T, D]. ValueError for another T."""
        columns = text_input.shape[1]
        if columns != self.text_length:
            raise ValueError(f"text has {columns} columns, the model reads {self.text_length}")
        # a frozen encoder's features are float32 whatever the model is
        if text_input.is_floating_point():
            text_input = text_input.to(next(self.embedding.parameters()).dtype)

        hidden = self.embedding(text_input)
        return hidden if self.position is None else hidden + self.position


def _text_embedding(config: LayersConfig, padding_ids: int) -> nn.Module:
    """A table for ids; one matrix or an MLP for features."""
    width = config.width
    if config.text_vocab_size is not None:
        return nn.Embedding(config.text_vocab_size + padding_ids, width)

    # the config has one of the two; `or 0` is for the type checker
    projection = nn.Linear(config.text_feature_width or 0, width, bias=False)
    if config.text_projection == "linear":
        return projection
    # LlamaGen's caption MLP, whose published weights need its GELU
    return nn.Sequential(projection, nn.GELU(approximate="tanh"),
                         nn.Linear(width, width, bias=False))


class TextEncoder(nn.Module):
    """Text ids (or a frozen encoder's features) and their mask -> memory [B, T, D]."""

    def __init__(self, config: LayersConfig, layers: int) -> None:
        super().__init__()
        self.config = config
        self.text_input = TextInput(config)
        self.embedding_norm = embedding_norm(config)
        # none over a frozen encoder's features, which have their context already
        self.layers = text_stack(config, layers) if layers else None
        self._angles = AnglesByDevice()

    def forward(self, text_input: Tensor, text_mask: Tensor) -> Tensor:
        """Ids [B, T] int64 or features [B, T, F], text_mask [B, T] bool -> memory [B, T, D]."""
        hidden = self.text_input(text_input)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        if self.layers is None:
            return hidden

        # as `mask`, x-transformers would also zero padded outputs, and turn bfloat16 into float32
        attention_mask = text_mask[:, None, None, :]  # [B, 1, 1, T]
        return self.layers(hidden, attn_mask=attention_mask,
                           rotary_pos_emb=self._rotary_angles(hidden.device))

    def _rotary_angles(self, device: torch.device) -> tuple[Tensor, float] | None:
        """Angles of the text and their scale, as x-transformers takes them."""
        if self.config.rotary == "none":
            return None
        length = self.config.text_length
        angles = self._angles.on(device, lambda: flat_positions(length), self.config.head_dim)
        return angles, 1.0
