"""A caption's encoder, trained here: embeddings and bidirectional layers."""

# Axes: B batch, T text ids, F width of text features, D width

from __future__ import annotations

import torch
from torch import Tensor, nn

from seq2seq.config import LayersConfig
from seq2seq.layers import embedding_norm, text_stack
from seq2seq.positions import AnglesByDevice, flat_positions


class TextInput(nn.Module):
    """Text ids or a frozen encoder's features -> [B, T, D], with learned positions where the config has them."""

    def __init__(self, config: LayersConfig, padding_ids: int = 0) -> None:
        """padding_ids: ids after the vocabulary that stand for padding at each position."""
        super().__init__()
        self.text_length, width = config.text_length, config.width
        self.embedding: nn.Module
        if config.text_vocab_size is not None:
            self.embedding = nn.Embedding(config.text_vocab_size + padding_ids, width)
        elif config.text_projection == "linear":
            self.embedding = nn.Linear(config.text_feature_width or 0, width, bias=False)
        else:
            self.embedding = nn.Sequential(nn.Linear(config.text_feature_width or 0, width, bias=False),
                                           nn.GELU(approximate="tanh"), nn.Linear(width, width, bias=False))
        self.position = nn.Parameter(torch.empty(config.text_length, width)) if config.learned_positions else None

    def forward(self, text_input: Tensor) -> Tensor:
        """text_input: ids [B, T] int64 or features [B, T, F] -> [B, T, D]. ValueError for another length."""
        if text_input.shape[1] != self.text_length:
            raise ValueError(f"text has {text_input.shape[1]} columns, the model reads {self.text_length}")
        if text_input.is_floating_point():  # a frozen encoder's features are float32 whatever the model is
            text_input = text_input.to(next(self.embedding.parameters()).dtype)
        hidden = self.embedding(text_input)
        return hidden if self.position is None else hidden + self.position


class TextEncoder(nn.Module):
    """Text ids (or a frozen encoder's features) and their mask -> memory [B, T, D]."""

    def __init__(self, config: LayersConfig, layers: int) -> None:
        super().__init__()
        self.config = config
        self.text_input = TextInput(config)
        self.embedding_norm = embedding_norm(config)
        self.layers = text_stack(config, layers) if layers else None
        self._angles = AnglesByDevice()

    def forward(self, text_input: Tensor, text_mask: Tensor) -> Tensor:
        """text_input: ids [B, T] int64 or features [B, T, F]; text_mask [B, T] bool (True = real)."""
        hidden = self.text_input(text_input)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        if self.layers is None:
            return hidden
        rotary = None
        if self.config.rotary != "none":
            config = self.config
            rotary = (self._angles.on(hidden.device, lambda: flat_positions(config.text_length), config.head_dim), 1.0)
        # as an attention mask: given as `mask`, x-transformers also fills padded outputs, which turns bfloat16 into float32
        return self.layers(hidden, attn_mask=text_mask[:, None, None, :], rotary_pos_emb=rotary)
