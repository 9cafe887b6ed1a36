"""TextToImage: prompts in, pictures out.

    model = TextToImage.from_pretrained("demo/model")
    model.generate("a red heart", num_images=4, seed=0).images[0].save("heart.png")
"""

# Axes: B pictures, N image tokens, h w code grid

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from inference.decoder import CachedDecoder
from inference.generate import decode_steps, generate_tokens
from inference.model_folder import LoadedModel, load_model_folder
from inference.sampling import SamplingParams
from tokenizer_image.grid import tokens_to_codes
from tokenizer_image.images import float_to_pixels, pixels_to_images
from tokenloom_common.errors import UserError

MAX_PROMPT_CHARACTERS = 10_000
MAX_SEED = (1 << 63) - 1  # of the last picture; what a torch generator takes


@dataclass(frozen=True)
class GenerationResult:
    """images: B pictures; image_tokens: LongTensor [B, N] on the CPU; seeds and prompts: one a picture; params: as used."""

    images: list[Image.Image]
    image_tokens: Tensor
    prompts: list[str]
    seeds: list[int]
    params: SamplingParams


class GenerationStep:
    """One position of a stream: `position` (0 .. N-1), `image_tokens` [B, position+1] so far, `is_last`, `preview`."""

    def __init__(self, model: TextToImage, image_tokens: Tensor, total: int) -> None:
        self._model = model
        self.image_tokens = image_tokens
        self.position = image_tokens.shape[1] - 1
        self.total = total

    @property
    def is_last(self) -> bool:
        """Whether the picture is complete."""
        return self.position == self.total - 1

    @property
    def previews(self) -> list[Image.Image]:
        """The pictures so far, decoded when asked for; positions not yet drawn repeat the last token."""
        missing = self.total - self.image_tokens.shape[1]
        filled = torch.cat([self.image_tokens, self.image_tokens[:, -1:].expand(-1, missing)], dim=1)
        return self._model.decode_tokens(filled)

    @property
    def preview(self) -> Image.Image:
        """The first picture so far."""
        return self.previews[0]


class TextToImage:
    """A trained model folder, ready to sample."""

    def __init__(self, parts: LoadedModel) -> None:
        self.parts = parts
        self.image_tokenizer = parts.image_tokenizer
        self.text_tokenizer = parts.text_tokenizer
        self.seq2seq = parts.seq2seq
        self.default_params = parts.generation
        self.device = self.seq2seq.to_logits.weight.device
        self._decoder = CachedDecoder(self.seq2seq)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None,
                        revision: str | None = None) -> TextToImage:
        """Load a local model folder or a hub id; on the GPU when there is one and no device is named."""
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_model_folder(folder, chosen, revision))

    def generate(self, prompt: str | Sequence[str], num_images: int = 1, params: SamplingParams | None = None,
                 seed: int = 0, batch_size: int = 32) -> GenerationResult:
        """Prompts -> num_images pictures each. Picture i of a prompt is drawn with seed + i, whatever shares its batch.

        params: the model folder's defaults when None. batch_size: pictures decoded at a time.
        UserError for an empty list, a prompt that is not text, num_images or batch_size below 1.
        """
        prompts = check_prompts(prompt)
        _check_params(params)
        used = params or self.default_params
        tokens = self.sample_tokens(prompts, num_images=num_images, params=used, seed=seed, batch_size=batch_size)
        images = [picture for part in tokens.split(batch_size) for picture in self.decode_tokens(part)]
        seeds = [seed + i for _ in prompts for i in range(num_images)]
        return GenerationResult(images, tokens, [p for p in prompts for _ in range(num_images)], seeds, used)

    def sample_tokens(self, prompts: str | Sequence[str], num_images: int = 1, params: SamplingParams | None = None,
                      seed: int = 0, batch_size: int = 32) -> Tensor:
        """Prompts -> image_tokens [len(prompts) * num_images, N] int64 on the CPU, a prompt's pictures in a row."""
        texts = check_prompts(prompts)
        check_counts(num_images, batch_size, seed)
        _check_params(params)
        used = params or self.default_params
        parts = []
        for first in range(0, len(texts), max(1, batch_size // num_images)):
            some = texts[first: first + max(1, batch_size // num_images)]
            for start in range(0, num_images, batch_size):  # more pictures of one prompt than fit a batch
                count = min(batch_size, num_images - start)
                seeds = [seed + start + i for _ in some for i in range(count)]
                parts.append(self._run(some, count, used, seeds))
        return torch.cat(parts)

    def stream(self, prompt: str, num_images: int = 1, params: SamplingParams | None = None,
               seed: int = 0) -> Iterator[GenerationStep]:
        """Yield a GenerationStep after every token; `step.preview` is a picture that grows, decoded only when asked for."""
        texts = check_prompts(prompt)
        check_counts(num_images, num_images, seed)
        _check_params(params)
        captions, null = self._encode(texts)
        seeds = [seed + i for i in range(num_images)]
        drawn: list[Tensor] = []
        for ids in decode_steps(self._decoder, captions, null, num_images, params or self.default_params, seeds):
            drawn.append(ids)
            yield GenerationStep(self, torch.stack(drawn, dim=1).cpu(), self.seq2seq.config.num_tokens)

    @torch.inference_mode()
    def decode_tokens(self, image_tokens: Tensor) -> list[Image.Image]:
        """image_tokens [B, N] int64 in [0, K) -> B pictures. UserError for another shape, dtype or range."""
        if not isinstance(image_tokens, Tensor):
            raise UserError(f"image_tokens must be a tensor, got {type(image_tokens).__name__}")
        codes = tokens_to_codes(image_tokens.to(self.device), self.image_tokenizer.grid)
        return pixels_to_images(float_to_pixels(self.image_tokenizer.decode(codes)))

    def _run(self, texts: list[str], images: int, params: SamplingParams, seeds: list[int]) -> Tensor:
        captions, null = self._encode(texts)
        return generate_tokens(self._decoder, captions, null, images, params, seeds).cpu()

    def _encode(self, texts: list[str]):
        captions, null = self.text_tokenizer.encode(texts), self.text_tokenizer.null_caption()
        return tuple(type(batch)(*(part.to(self.device) for part in batch)) for batch in (captions, null))


def check_prompts(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several -> a list. UserError for none, for what is not text, and for more than 10,000 characters."""
    if isinstance(prompt, str):
        prompts = [prompt]
    elif isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise UserError(f"a prompt must be text, got {type(prompt).__name__}")
    else:
        prompts = list(prompt)
    if not prompts:
        raise UserError("no prompt given")
    for text in prompts:
        if not isinstance(text, str):
            raise UserError(f"a prompt must be text, got {type(text).__name__}")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise UserError(f"a prompt has {len(text):,} characters, the limit is {MAX_PROMPT_CHARACTERS:,}; shorten it")
    return prompts


def _check_params(params: object) -> None:
    if params is not None and not isinstance(params, SamplingParams):
        raise UserError(f"params must be SamplingParams, got {type(params).__name__}")


def check_counts(num_images: int, batch_size: int, seed: int) -> None:
    for name, value, least in (("num_images", num_images, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if seed + num_images - 1 > MAX_SEED:
        raise UserError(f"seed must be at most {MAX_SEED} for the last picture too, got {seed} for {num_images}")
