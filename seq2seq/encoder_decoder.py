"""Parti-style encoder-decoder: captions are encoded once, image tokens are decoded one after another.

This is the training graph, built on x-transformers (its only importer); sampling reads the same parameters through
`inference/decoder.py`.
"""

# Axes: B batch, T text ids, N image tokens, n <= N, D width, K codebook size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import Decoder, Encoder

from seq2seq.config import Seq2SeqConfig
from seq2seq.positions import rotary_angles_1d, rotary_angles_2d
from tokenloom_common.pretrained import PretrainedModule


class EncoderDecoder(PretrainedModule):
    """Caption ids and previous image tokens -> logits over the codebook."""

    kind = "encoder_decoder"
    config_class = Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.text_embedding = nn.Embedding(config.text_vocab_size, width)
        self.image_embedding = nn.Embedding(config.codebook_size, width)
        self.begin_of_image = nn.Parameter(torch.empty(width))
        if config.learned_positions:
            self.text_position = nn.Parameter(torch.empty(config.text_length, width))
            self.row_position = nn.Parameter(torch.empty(config.grid[0], width))
            self.column_position = nn.Parameter(torch.empty(config.grid[1], width))
        self.encoder = Encoder(dim=width, depth=config.encoder_layers, heads=config.heads, **_layer_options(config))
        self.decoder = Decoder(dim=width, depth=config.decoder_layers, heads=config.heads, cross_attend=True,
                               **_layer_options(config))
        self.to_logits = nn.Linear(width, config.codebook_size, bias=False)
        # not buffers: casting the model to bfloat16 would round the angles too
        self._angles_by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._initialise()

    def _initialise(self) -> None:
        """Normal 0.02 for embeddings and the output layer, as GPT-2 and LlamaGen; layers keep x-transformers' own."""
        for name in ("text_embedding", "image_embedding", "to_logits"):
            nn.init.normal_(getattr(self, name).weight, std=0.02)
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    def rotary_angles(self) -> tuple[Tensor, Tensor] | None:
        """Angles of text [1, T, d] and image tokens [1, N, d], float32 on the model's device; None without rotary."""
        config, device = self.config, self.to_logits.weight.device
        if config.rotary == "none":
            return None
        if device not in self._angles_by_device:
            image = (rotary_angles_2d(config.grid, config.head_dim) if config.rotary == "2d"
                     else rotary_angles_1d(config.num_tokens, config.head_dim))
            text = rotary_angles_1d(config.text_length, config.head_dim)
            self._angles_by_device[device] = (text.to(device), image.to(device))
        return self._angles_by_device[device]

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """text_ids [B, T] int64, text_mask [B, T] bool (True = real) -> memory [B, T, D]."""
        if text_ids.shape[-1] != self.config.text_length:
            raise ValueError(f"text_ids have {text_ids.shape[-1]} columns, the model reads {self.config.text_length}")
        hidden = self.text_embedding(text_ids)  # [B, T, D]
        if self.config.learned_positions:
            hidden = hidden + self.text_position
        angles = self.rotary_angles()
        # as an attention mask: given as `mask`, x-transformers also fills padded outputs, which turns bfloat16 into float32
        return self.encoder(hidden, attn_mask=text_mask[:, None, None, :], rotary_pos_emb=angles and (angles[0], 1.0))

    def embed_image(self, image_tokens: Tensor) -> Tensor:
        """Tokens [B, n] with n < N -> decoder inputs [B, n+1, D]: the begin slot, then each token, with positions."""
        begin = self.begin_of_image.expand(image_tokens.shape[0], 1, -1)
        hidden = torch.cat([begin, self.image_embedding(image_tokens)], dim=1)  # [B, n+1, D]
        if self.config.learned_positions:
            hidden = hidden + self.image_positions()[: hidden.shape[1]]
        return hidden

    def image_positions(self) -> Tensor:
        """Learned positions [N, D] in raster order: row plus column."""
        return (self.row_position[:, None, :] + self.column_position[None, :, :]).flatten(0, 1)

    def decode(self, memory: Tensor, text_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """memory [B, T, D], text_mask [B, T], tokens so far [B, n] with n < N -> logits [B, n+1, K]."""
        if image_tokens.shape[1] >= self.config.num_tokens:
            raise ValueError(f"{image_tokens.shape[1]} tokens leave no slot to predict in a grid of {self.config.num_tokens}")
        hidden = self.embed_image(image_tokens)
        angles = self.rotary_angles()
        hidden = self.decoder(hidden, context=memory, context_mask=text_mask,
                              rotary_pos_emb=angles and (angles[1][:, : hidden.shape[1]], 1.0))
        return self.to_logits(hidden)

    def forward(self, text_ids: Tensor, text_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Teacher forcing: text_ids [B, T], text_mask [B, T], image_tokens [B, N] -> logits [B, N, K].

        Logits at slot i are for token i and see the caption and the tokens before i.
        """
        memory = self.encode_text(text_ids, text_mask)
        return self.decode(memory, text_mask, image_tokens[:, :-1])


def _layer_options(config: Seq2SeqConfig) -> dict[str, Any]:
    """The dozen of x-transformers' options that this model uses, for encoder and decoder alike."""
    return {
        "use_rmsnorm": config.norm == "rmsnorm",
        "attn_dim_head": config.head_dim,
        "attn_kv_heads": config.kv_heads,
        "attn_qk_rmsnorm": config.qk_norm,
        "attn_flash": True,  # scaled_dot_product_attention: the flash kernel where the device has one
        "attn_project_out": True,  # also with one head, so that every size has the same parameters
        "attn_dropout": config.dropout,
        "ff_glu": config.feedforward == "swiglu",
        "ff_swish": config.feedforward == "swiglu",
        "ff_mult": config.feedforward_multiplier,
        "ff_dropout": config.dropout,
        "verbose": False,
    }
