"""Text and image tokens in one sequence: DALL-E, ruDALL-E, minDALL-E, LlamaGen.

    [begin of text, if predicted] [text] [begin of layout, layout] [begin of image] [image tokens]

This is the training graph; sampling reads the same parameters through
`inference/decoder/cached_decoder.py`.
"""

# Axes: B batch, T text ids, F width of text features, N image tokens, n <= N, L layout tokens,
#       P prefix slots, D width, K codebook size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seq2seq.config import DecoderOnlyConfig
from seq2seq.image_transformer import ImageTransformer, TokenLogits
from seq2seq.layers import image_stack
from seq2seq.text_encoder import TextInput


class DecoderOnly(ImageTransformer):
    """Caption and previous image tokens -> logits over the codebook (and over text ids)."""

    kind = DecoderOnlyConfig.kind
    config_class = DecoderOnlyConfig

    def __init__(self, config: DecoderOnlyConfig) -> None:
        super().__init__()
        self.config = config
        self.begin_of_image_slot = config.begin_of_image
        # text id 0 can be predicted only from a slot before it
        self.text_slots = config.text_length + config.predict_text
        self.blind_slots = self.text_slots if config.text_positions == "blind" else 0

        # learned padding: one further id per position, after the vocabulary
        padding_ids = config.text_length if config.text_padding == "learned" else 0
        self.text_input = TextInput(config, padding_ids)
        if config.predict_text:
            text_logits = (config.text_vocab_size or 0) + padding_ids
            self.begin_of_text = nn.Parameter(torch.empty(config.width))
            self.to_text_logits = nn.Linear(config.width, text_logits, bias=False)

        self._build_image_side(config)
        self.decoder = image_stack(config, config.layers, self.prefix_slots, cross_attend=False,
                                   blind_slots=self.blind_slots)
        self._initialise()

    def text_targets(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Return the ids [B, T] that are embedded and predicted.

        Learned padding at position p has the id vocabulary + p.
        """
        if self.config.text_padding == "masked":
            return text_ids
        positions = torch.arange(text_ids.shape[1], device=text_ids.device)
        padding = positions + (self.config.text_vocab_size or 0)
        return torch.where(text_mask, text_ids, padding)

    def embed_prefix(self, text_input: Tensor, text_mask: Tensor,
                     layout_tokens: Tensor | None) -> Tensor:
        """Embed the prefix -> [B, P, D].

        Text ids [B, T] (or features [B, T, F]), text_mask [B, T], layout [B, L] or its beginning.
        """
        if self.config.text_feature_width is None:
            text_input = self.text_targets(text_input, text_mask)
        parts = [self.normed(self.text_input(text_input))]
        if self.config.predict_text:
            begin = self.begin_of_text.expand(len(text_input), 1, -1)
            parts.insert(0, self.normed(begin))
        if layout_tokens is not None:
            parts.append(self.embed_layout(layout_tokens))
        return torch.cat(parts, dim=1)

    def prefix_mask(self, text_mask: Tensor) -> Tensor | None:
        """text_mask [B, T] -> prefix slots that may be seen [B, P]; None if all may."""
        if self.config.text_padding == "learned":
            return None
        # begin of text before the caption, the layout after it
        return F.pad(text_mask, (int(self.config.predict_text), self.layout_slots), value=True)

    def decode(self, text_input: Tensor, text_mask: Tensor, image_tokens: Tensor,
               layout_tokens: Tensor | None = None) -> TokenLogits:
        """Return logits of image tokens 0 .. n, given the tokens [B, n] so far, n < N.

        Text ids [B, T] (or features [B, T, F]), text_mask [B, T], layout [B, L].
        """
        self.check_tokens(image_tokens, layout_tokens)
        prefix = self.embed_prefix(text_input, text_mask, layout_tokens)
        hidden = torch.cat([prefix, self.embed_image(image_tokens)], dim=1)

        mask = self.prefix_mask(text_mask)
        if mask is not None:
            mask = mask[:, None, None, :]  # [B, 1, 1, P], as x-transformers takes it
        hidden = self.decoder(hidden, attn_mask=mask,
                              rotary_pos_emb=self.sequence_angles(hidden.shape[1]))

        text = None
        if self.config.predict_text:
            # slot t, begin of text included, predicts text id t
            text = self.to_text_logits(hidden[:, : self.config.text_length])
        return TokenLogits(*self.split_logits(hidden), text)

    def forward(self, text_input: Tensor, text_mask: Tensor, image_tokens: Tensor,
                layout_tokens: Tensor | None = None) -> TokenLogits:
        """Teacher forcing over a whole sequence.

        Text ids [B, T] (or features [B, T, F]), text_mask [B, T], tokens [B, N], layout [B, L].
        Image logits at i are for token i and see the caption, the layout and the tokens before i;
        text logits at i see the text ids before i.
        """
        return self.decode(text_input, text_mask, image_tokens[:, :-1], layout_tokens)
