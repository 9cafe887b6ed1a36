"""Encoder-decoder as Parti's: a caption is encoded once, image tokens are decoded one by one.

This is the training graph; sampling reads the same parameters through
`inference/decoder/cached_decoder.py`.
"""

# Axes: B batch, T text ids, F width of text features, N image tokens, n <= N, L layout tokens,
#       D width, K codebook size

from __future__ import annotations

import torch
from torch import Tensor

from seq2seq.config import Seq2SeqConfig
from seq2seq.image_transformer import ImageTransformer, TokenLogits
from seq2seq.layers import image_stack
from seq2seq.text_encoder import TextEncoder


class EncoderDecoder(ImageTransformer):
    """Caption and previous image tokens -> logits over the codebook."""

    kind = Seq2SeqConfig.kind
    config_class = Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = TextEncoder(config, config.encoder_layers)
        self._build_image_side(config)
        self.decoder = image_stack(config, config.decoder_layers, self.prefix_slots,
                                   cross_attend=True)
        self._initialise()

    def encode_text(self, text_input: Tensor, text_mask: Tensor) -> Tensor:
        """Encode captions -> memory [B, T, D].

        Text ids [B, T] int64 (or features [B, T, F]), text_mask [B, T] bool (True = real).
        """
        return self.text_encoder(text_input, text_mask)

    def decode(self, memory: Tensor, text_mask: Tensor, image_tokens: Tensor,
               layout_tokens: Tensor | None = None) -> TokenLogits:
        """Return logits of image tokens 0 .. n, given the tokens [B, n] so far, n < N.

        memory [B, T, D], text_mask [B, T], layout [B, L].
        """
        self.check_tokens(image_tokens, layout_tokens)
        hidden = self.embed_image(image_tokens)
        if layout_tokens is not None:
            hidden = torch.cat([self.embed_layout(layout_tokens), hidden], dim=1)

        hidden = self.decoder(hidden, context=memory, context_mask=text_mask,
                              rotary_pos_emb=self.sequence_angles(hidden.shape[1]))
        return TokenLogits(*self.split_logits(hidden))

    def forward(self, text_input: Tensor, text_mask: Tensor, image_tokens: Tensor,
                layout_tokens: Tensor | None = None) -> TokenLogits:
        """Teacher forcing over a whole sequence.

        Text ids [B, T] (or features [B, T, F]), text_mask [B, T], tokens [B, N], layout [B, L].
        Image logits at i are for token i and see the caption, the layout and the tokens before i.
        """
        memory = self.encode_text(text_input, text_mask)
        # the last token is a target only
        return self.decode(memory, text_mask, image_tokens[:, :-1], layout_tokens)
