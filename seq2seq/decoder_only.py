"""Text and image tokens in one sequence: DALL-E, ruDALL-E, minDALL-E, LlamaGen.

    [begin of text, where text is predicted]  [text]  [begin of layout, layout]  [begin of image]  [image tokens]

This is the training graph; sampling reads the same parameters through `inference/decoder/cached_decoder.py`.
"""

# Axes: B batch, T text ids, F width of text features, N image tokens, n <= N, L layout tokens, D width, K codebook size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seq2seq.config import DecoderOnlyConfig
from seq2seq.image_transformer import ImageTransformer, TokenLogits
from seq2seq.layers import image_stack
from seq2seq.text_encoder import TextInput


class DecoderOnly(ImageTransformer):
    """Caption and previous image tokens -> logits over the codebook, and over text ids where text is predicted."""

    kind = DecoderOnlyConfig.kind
    config_class = DecoderOnlyConfig

    def __init__(self, config: DecoderOnlyConfig) -> None:
        super().__init__()
        self.config = config
        self.begin_of_image_slot = config.begin_of_image
        self.text_slots = config.text_length + config.predict_text
        padding_ids = config.text_length if config.text_padding == "learned" else 0
        self.text_input = TextInput(config, padding_ids)
        if config.predict_text:
            self.begin_of_text = nn.Parameter(torch.empty(config.width))
            self.to_text_logits = nn.Linear(config.width, (config.text_vocab_size or 0) + padding_ids, bias=False)
        self._build_image_side(config)
        self.blind_slots = self.text_slots if config.text_positions == "blind" else 0
        self.decoder = image_stack(config, config.layers, self.prefix_slots, cross_attend=False, blind_slots=self.blind_slots)
        self._initialise()

    def text_targets(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Ids [B, T] as embedded and predicted: with learned padding, padding at position p is the id vocabulary + p."""
        if self.config.text_padding == "masked":
            return text_ids
        padding = torch.arange(text_ids.shape[1], device=text_ids.device) + (self.config.text_vocab_size or 0)
        return torch.where(text_mask, text_ids, padding)

    def embed_prefix(self, text_input: Tensor, text_mask: Tensor, layout_tokens: Tensor | None) -> Tensor:
        """Text ids [B, T] (or features [B, T, F]), text_mask [B, T], layout [B, L] (or its first tokens) -> [B, P, D]."""
        if self.config.text_feature_width is None:
            text_input = self.text_targets(text_input, text_mask)
        parts = [self.normed(self.text_input(text_input))]
        if self.config.predict_text:
            parts.insert(0, self.normed(self.begin_of_text.expand(len(text_input), 1, -1)))
        if layout_tokens is not None:
            parts.append(self.embed_layout(layout_tokens))
        return torch.cat(parts, dim=1)

    def prefix_mask(self, text_mask: Tensor) -> Tensor | None:
        """text_mask [B, T] -> which prefix slots are seen [B, P]; None where all are."""
        if self.config.text_padding == "learned":
            return None
        return F.pad(text_mask, (int(self.config.predict_text), self.layout_slots), value=True)

    def decode(self, text_input: Tensor, text_mask: Tensor, image_tokens: Tensor,
               layout_tokens: Tensor | None = None) -> TokenLogits:
        """Text ids [B, T] (or features [B, T, F]), text_mask [B, T], tokens so far [B, n] with n < N, layout [B, L] ->
        logits of tokens 0 .. n."""
        self.check_tokens(image_tokens, layout_tokens)
        hidden = torch.cat([self.embed_prefix(text_input, text_mask, layout_tokens), self.embed_image(image_tokens)], dim=1)
        mask = self.prefix_mask(text_mask)
        hidden = self.decoder(hidden, attn_mask=None if mask is None else mask[:, None, None, :],
                              rotary_pos_emb=self.sequence_angles(hidden.shape[1]))
        text = self.to_text_logits(hidden[:, : self.config.text_length]) if self.config.predict_text else None
        return TokenLogits(*self.split_logits(hidden), text)

    def forward(self, text_input: Tensor, text_mask: Tensor, image_tokens: Tensor,
                layout_tokens: Tensor | None = None) -> TokenLogits:
        """Teacher forcing: text ids [B, T] (or features [B, T, F]), text_mask [B, T], image_tokens [B, N], layout [B, L].

        Image logits at i are for token i and see the caption, the layout and the tokens before i; text logits at i see the
        text ids before i.
        """
        return self.decode(text_input, text_mask, image_tokens[:, :-1], layout_tokens)
