"""A caption's encoder, trained here: embeddings and bidirectional layers."""

# Axes: B batch, T text ids, F width of text features, D width

from __future__ import annotations

from torch import Tensor, nn

from seq2seq.config import TransformerConfig
from seq2seq.image_transformer import TextInput
from seq2seq.layers import text_stack


class TextEncoder(nn.Module):
    """Text ids (or a frozen encoder's features) and their mask -> memory [B, T, D]."""

    def __init__(self, config: TransformerConfig, layers: int) -> None:
        super().__init__()
        self.text_input = TextInput(config)
        self.embedding_norm = nn.LayerNorm(config.width) if config.embedding_norm else None
        self.layers = text_stack(config, layers) if layers else None

    def forward(self, text_input: Tensor, text_mask: Tensor, angles: Tensor | None) -> Tensor:
        """text_input: ids [B, T] int64 or features [B, T, F]; text_mask [B, T] bool (True = real); angles [1, T, d] or None."""
        hidden = self.text_input(text_input)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        if self.layers is None:
            return hidden
        # as an attention mask: given as `mask`, x-transformers also fills padded outputs, which turns bfloat16 into float32
        rotary = None if angles is None else (angles, 1.0)
        return self.layers(hidden, attn_mask=text_mask[:, None, None, :], rotary_pos_emb=rotary)
