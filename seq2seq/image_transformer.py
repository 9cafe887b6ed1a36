"""The image's side of the sequence, shared by both families of transformers.

    [prefix: text (decoder-only), layout]  [image slots: begin of image, token 0, token 1, ...]

With a begin slot, image slot i predicts token i and has token i's place on the grid. Without one
(published decoder-only models) the prefix's last slot predicts token 0; image slot i holds token i,
has its place, and predicts token i + 1.
A layout in the prefix is begin of layout, then its tokens; all but the last predict the next token.
"""

# Axes: B batch, T text slots, N image tokens, L layout tokens, P prefix slots, D width,
#       K codebook size, d head width

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seq2seq.config import TransformerConfig
from seq2seq.layers import embedding_norm
from seq2seq.positions import AnglesByDevice, flat_positions, grid_positions
from tokenloom_common.pretrained import PretrainedModule


class TokenLogits(NamedTuple):
    """image [B, N, K]; layout [B, L, classes] and text [B, T, text ids], None if not predicted."""

    image: Tensor
    layout: Tensor | None = None
    text: Tensor | None = None


class ImageTransformer(PretrainedModule):
    """Base of the two families. A subclass makes `decoder` and sets the properties of its prefix.

    text_slots: slots of the text in the sequence, 0 if the text is read by cross-attention.
    blind_slots: the first slots, whose queries and keys are zero.
    """

    config: Any
    decoder: Any
    text_slots: int = 0
    blind_slots: int = 0
    begin_of_image_slot: bool = True

    def _build_image_side(self, config: TransformerConfig) -> None:
        width = config.width
        self.image_embedding = nn.Embedding(config.codebook_size, width)
        if self.begin_of_image_slot:
            self.begin_of_image = nn.Parameter(torch.empty(width))
        if config.learned_positions:
            self._make_positions("", config.grid, config.image_positions)

        if config.layout_grid:
            classes = config.layout_classes or 0  # never 0 with a layout; for the type checker
            self.layout_embedding = nn.Embedding(classes, width)
            self.begin_of_layout = nn.Parameter(torch.empty(width))
            self._make_positions("layout_", config.layout_grid, "row_column")
            self.to_layout_logits = nn.Linear(width, classes, bias=False)

        self.embedding_norm = embedding_norm(config)
        self.to_logits = nn.Linear(width, config.codebook_size, bias=False)
        self._angles = AnglesByDevice()

    def _make_positions(self, prefix: str, grid: tuple[int, int], kind: str) -> None:
        """Register learned positions: `position`, or `row_position` and `column_position`."""
        rows, columns = grid
        lengths = {"position": rows * columns}
        if kind == "row_column":  # rows + columns vectors in place of rows * columns
            lengths = {"row_position": rows, "column_position": columns}
        for name, length in lengths.items():
            parameter = nn.Parameter(torch.empty(length, self.config.width))
            self.register_parameter(f"{prefix}{name}", parameter)

    def _initialise(self) -> None:
        """Draw embeddings, positions and output layers from N(0, 0.02), as GPT-2 and LlamaGen do.

        Layers keep x-transformers' own initialisation.
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            is_own = "." not in name  # begin slots and image positions
            is_output = name.split(".")[0].endswith("_logits")
            if is_own or is_output or name.endswith(".position"):
                nn.init.normal_(parameter, std=0.02)

    @property
    def layout_slots(self) -> int:
        """L + 1 with a layout, else 0."""
        return self.config.layout_tokens + 1 if self.config.layout_grid else 0

    @property
    def prefix_slots(self) -> int:
        """P: slots before the image."""
        return self.text_slots + self.layout_slots

    @property
    def image_slots(self) -> int:
        """Image slots of a whole sequence: the last token is never an input."""
        return self.config.num_tokens - (0 if self.begin_of_image_slot else 1)

    def learned_image_positions(self) -> Tensor | None:
        """Learned positions [N, D] in raster order; None without."""
        return self._learned_positions("") if self.config.learned_positions else None

    def _learned_positions(self, prefix: str) -> Tensor:
        flat = getattr(self, f"{prefix}position", None)
        if flat is not None:
            return flat
        rows = getattr(self, f"{prefix}row_position")
        columns = getattr(self, f"{prefix}column_position")
        return (rows[:, None, :] + columns[None, :, :]).flatten(0, 1)  # [h * w, D]

    def embed_image(self, image_tokens: Tensor) -> Tensor:
        """Tokens [B, n] -> inputs of the image slots [B, n (+1 with a begin slot), D]."""
        hidden = self.image_embedding(image_tokens)
        if self.begin_of_image_slot:
            begin = self.begin_of_image.expand(len(image_tokens), 1, -1)
            hidden = torch.cat([begin, hidden], dim=1)

        positions = self.learned_image_positions()
        if positions is not None:
            hidden = hidden + positions[: hidden.shape[1]]  # of a sequence that may end early
        return self.normed(hidden)

    def embed_layout(self, layout_tokens: Tensor) -> Tensor:
        """Layout [B, L] (or its first tokens) -> inputs of the layout slots [B, L + 1, D]."""
        positions = self._learned_positions("layout_")[: layout_tokens.shape[1]]
        hidden = self.layout_embedding(layout_tokens) + positions
        # begin of layout is before the grid: it has no position on it
        begin = self.begin_of_layout.expand(len(layout_tokens), 1, -1)
        return self.normed(torch.cat([begin, hidden], dim=1))

    def normed(self, hidden: Tensor) -> Tensor:
        """Apply the embedding norm, if there is one."""
        return hidden if self.embedding_norm is None else self.embedding_norm(hidden)

    def rotary_angles(self) -> Tensor | None:
        """Angles of the sequence [1, P + image slots, d], float32; None without rotary."""
        if self.config.rotary == "none":
            return None
        return self._angles.on(self.to_logits.weight.device, self._positions, self.config.head_dim)

    def _positions(self) -> Tensor:
        """Coordinates [slots, axes] of the sequence."""
        config = self.config
        if config.rotary == "1d":
            return flat_positions(self.prefix_slots + self.image_slots)

        # text runs along the diagonal, where row = column; the image's grid starts where the text
        # ends, and the layout covers the same area. Blind text is not rotated: the grid then starts
        # at 0 as LlamaGen's does, which is the same but for rounding
        origin = float(self.text_slots - self.blind_slots)
        parts = [flat_positions(self.text_slots).expand(-1, 2)]
        if config.layout_grid:
            row_scale = config.grid[0] / config.layout_grid[0]
            column_scale = config.grid[1] / config.layout_grid[1]
            begin = torch.full((1, 2), origin)
            parts += [begin, grid_positions(config.layout_grid, (row_scale, column_scale)) + origin]
        parts.append(grid_positions(config.grid)[: self.image_slots] + origin)
        return torch.cat(parts)

    def sequence_angles(self, slots: int) -> tuple[Tensor, float] | None:
        """Angles of the first `slots` slots and their scale, as x-transformers takes them."""
        angles = self.rotary_angles()
        return None if angles is None else (angles[:, :slots], 1.0)

    def split_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normed outputs [B, P + n, D] of the sequence -> image logits and layout logits."""
        # without a begin slot, the last slot of the prefix predicts token 0
        first = self.prefix_slots - (0 if self.begin_of_image_slot else 1)
        layout = None
        if self.config.layout_grid:
            # begin of layout predicts layout token 0; the last layout token predicts none
            layout = self.to_layout_logits(hidden[:, self.text_slots: self.prefix_slots - 1])
        return self.to_logits(hidden[:, first:]), layout

    def check_tokens(self, image_tokens: Tensor, layout_tokens: Tensor | None) -> None:
        """ValueError if no slot is left to predict, or the layout has a wrong number of tokens."""
        given, slots = image_tokens.shape[1], self.config.num_tokens
        if given >= slots:
            raise ValueError(f"{given} tokens leave no slot to predict in a grid of {slots}")

        found = 0 if layout_tokens is None else layout_tokens.shape[1]
        wanted = self.config.layout_tokens
        if found != wanted:
            raise ValueError(f"the layout has {found} tokens, the model reads {wanted}")
