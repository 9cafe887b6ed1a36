"""Results of generation: images with their tokens, seeds and parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image
from torch import Tensor

from inference.attention_maps import overlay
from inference.sampling import SamplingParams
from tokenloom_common.errors import UserError


class AttentionModel(Protocol):
    """A model that can say where its image tokens attended to; `TextToImage` is one."""

    def attention_map(self, prompt: str, word: str, image_tokens: Tensor, layout: Tensor | None) -> Tensor:
        """Attention [h, w] of image tokens [1, N] to `word` of the prompt."""
        ...


@dataclass(frozen=True)
class ManyResult:
    """One picture of request number `request`: image_tokens [N] int64 on the CPU, or in one line the reason for none."""

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
    """images: B pictures; image_tokens: LongTensor [B, N] on the CPU; seeds and prompts: one a picture; params: as used;
    layouts: LongTensor [B, L] of models with a layout, given or sampled; scores: one a picture where a matcher chose."""

    images: list[Image.Image]
    image_tokens: Tensor
    prompts: list[str]
    seeds: list[int]
    params: SamplingParams
    layouts: Tensor | None = None
    model: AttentionModel | None = field(default=None, repr=False, compare=False)
    scores: list[float] | None = None

    def attention(self, word: str, picture: int = 0) -> Tensor:
        """How much each image token of a picture attended to `word` of its prompt, [h, w] float32: the mean over layers and
        heads. UserError when the prompt has no such word, or there is no such picture."""
        if self.model is None:
            raise UserError("this result does not know its model; ask the result that TextToImage.generate returned")
        if not 0 <= picture < len(self.image_tokens):
            raise UserError(f"picture {picture}: the result holds pictures 0 to {len(self.image_tokens) - 1}")
        layout = None if self.layouts is None else self.layouts[picture: picture + 1]
        return self.model.attention_map(self.prompts[picture], word, self.image_tokens[picture: picture + 1], layout)

    def attention_overlay(self, word: str, picture: int = 0) -> Image.Image:
        """The picture with `attention` over it: bright and reddish where its tokens attended to the word most."""
        return overlay(self.images[picture], self.attention(word, picture))
