"""Results of generation: images with their tokens, seeds and parameters."""

# Axes: B images, N image tokens, L layout tokens, h w code grid

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from inference.attention_maps import overlay
from inference.hooks.applied import Refusal
from inference.sampling import SamplingParams
from tokenloom_common.errors import UserError


class AttentionSource(Protocol):
    """A model that can compute attention maps of its images; `TextToImage` is one."""

    def attention_map(self, prompt: str, word: str, image_tokens: Tensor,
                      layout: Tensor | None) -> Tensor:
        """Return the attention [h, w] of image_tokens [1, N] to `word` of the prompt."""
        ...


@dataclass(frozen=True)
class ManyResult:
    """One image of request number `request`, or the `reason` in one line why there is none.

    image_tokens [N] int64 and layout [L] int64 (of models with one) are on the CPU.
    """

    request: int
    index: int
    prompt: str
    seed: int
    params: SamplingParams
    negative_prompt: str | None = None
    image: Image.Image | None = None
    image_tokens: Tensor | None = None
    layout: Tensor | None = None
    reason: str | None = None


@dataclass(frozen=True)
class GenerationResult:
    """B images with all that is needed to draw them again.

    image_tokens: LongTensor [B, N] on the CPU. prompts, seeds: one per image. params: as used.
    revised_prompts: one per image, None where the prompt itself was drawn.
    layouts: LongTensor [B, L] of models with a layout, given or sampled.
    scores: one per image where a matcher chose among candidates.
    refused: prompts and images that a safety filter refused; these images are not in the result.
    """

    images: list[Image.Image]
    image_tokens: Tensor
    prompts: list[str]
    seeds: list[int]
    params: SamplingParams
    layouts: Tensor | None = None
    # for `attention` alone: which object drew the images is no part of the result
    model: AttentionSource | None = field(default=None, repr=False, compare=False)
    scores: list[float] | None = None
    revised_prompts: list[str | None] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.revised_prompts:
            object.__setattr__(self, "revised_prompts", [None] * len(self.prompts))

    def drawn_prompt(self, picture: int = 0) -> str:
        """Return the text that an image was drawn from: its revised prompt, or its prompt."""
        revised = self.revised_prompts[picture]
        return self.prompts[picture] if revised is None else revised

    def keep(self, pictures: list[int]) -> GenerationResult:
        """Return the result with some of its images, in the order given."""
        rows = torch.tensor(pictures, dtype=torch.long)
        layouts = None if self.layouts is None else self.layouts[rows]
        scores = None if self.scores is None else [self.scores[row] for row in pictures]
        return replace(
            self, images=[self.images[row] for row in pictures], layouts=layouts, scores=scores,
            image_tokens=self.image_tokens[rows], prompts=[self.prompts[row] for row in pictures],
            seeds=[self.seeds[row] for row in pictures],
            revised_prompts=[self.revised_prompts[row] for row in pictures])

    def attention(self, word: str, picture: int = 0) -> Tensor:
        """Return how much each token of an image attended to `word` of its prompt, [h, w] float32.

        The mean over layers and heads. UserError for a word or an image that is not there.
        """
        if self.model is None:
            raise UserError("this result does not know its model; "
                            "ask the result that TextToImage.generate returned")
        if not 0 <= picture < len(self.image_tokens):
            last = len(self.image_tokens) - 1
            raise UserError(f"picture {picture}: the result holds pictures 0 to {last}")
        own = slice(picture, picture + 1)  # a batch of one
        layout = None if self.layouts is None else self.layouts[own]
        return self.model.attention_map(self.drawn_prompt(picture), word, self.image_tokens[own],
                                        layout)

    def attention_overlay(self, word: str, picture: int = 0) -> Image.Image:
        """Return the image under its `attention` to a word: reddish where that is high."""
        return overlay(self.images[picture], self.attention(word, picture))
