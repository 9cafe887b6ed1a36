"""TextToImage: prompts in, images out.

    model = TextToImage.from_pretrained("demo/model")
    model.generate("a red heart", num_images=4, seed=0).images[0].save("heart.png")
"""

# Axes: B images, N image tokens, L layout tokens, h w code grid, n tokens drawn so far

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from inference.attention_maps import WordMap, attention_map, word_maps, word_positions
from inference.decoder.calibration import build_decoder
from inference.decoder.projection import Precision, check_precision
from inference.generation.batch import Generation, Request
from inference.generation.image_job import ImageJob
from inference.generation.row_buffers import KEPT_TEXTS
from inference.generation.ways import generate_tokens
from inference.hooked import generate_hooked
from inference.hooks.applied import Hooks
from inference.layouts import read_layout
from inference.many import generate_many
from inference.memory.estimate import Workload, check_sampling
from inference.model_folder import LoadedModel, load_model_folder, save_loaded_model
from inference.pixels import PixelDecoder
from inference.requests import (
    PromptRequest,
    SamplingOptions,
    batches,
    check_counts,
    check_options,
    check_prompts,
    encode_request,
    first_seeds,
    is_count,
    text_like,
)
from inference.results import GenerationResult, ManyResult
from inference.sampling import SamplingParams
from inference.scoring.matcher_folder import load_matcher
from inference.scoring.rerank import check_rerank, keep_best
from inference.scoring.scorer import Scorer
from inference.shipped import default_model_folder
from inference.streaming import GenerationStep, stream_steps
from seq2seq import TextBatch
from tokenloom_common.errors import UserError
from tokenloom_common.hub import Pushable


class TextToImage(Pushable):
    """A trained model folder, ready to sample.

    weights: precision of the generator: float32, bfloat16, or int8 (the decoder's matrices alone);
    None leaves them as they are in `parts`. The sampler takes `parts.seq2seq` over: its parameters
    become views of fused matrices.
    """

    def __init__(self, parts: LoadedModel, matcher: Scorer | None = None,
                 weights: Precision | None = None) -> None:
        self.parts = parts
        self.matcher = matcher
        self.image_tokenizer = parts.image_tokenizer
        self.text_tokenizer = parts.text_tokenizer
        self.seq2seq = parts.seq2seq
        self.default_params = parts.generation
        self.device = self.seq2seq.image_embedding.weight.device
        self.weights = weights
        self.decoder = build_decoder(self.seq2seq, weights)
        self.pixels = PixelDecoder(self.image_tokenizer, self.device)
        self._preview_seconds: dict[int, float] = {}  # of the last one, by number of images

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None,
                        device: str | torch.device | None = None, revision: str | None = None,
                        text_encoder: str | None = None, matcher: str | Path | None = None,
                        weights: Precision | None = None) -> TextToImage:
        """Load a local model folder or a hub id; on the GPU if there is one and no device is named.

        folder: None = the model that ships with Tokenloom. revision: branch, tag or commit of a hub
        id (default: main).
        text_encoder: folder or hub id of the frozen text encoder that the model was trained with,
        if it has moved.
        matcher: chooses among candidates for `rerank_from`, see
        `inference.scoring.matcher_folder.load_matcher`.
        weights: float32 (default on the CPU, where bfloat16 is mostly much slower), bfloat16
        (default on CUDA) or int8. UserError for another name.
        """
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_precision(weights)
        scorer = None if matcher is None else load_matcher(matcher, chosen)
        if weights is None:
            weights = "bfloat16" if torch.device(chosen).type == "cuda" else "float32"
        source = default_model_folder() if folder is None else folder
        return cls(load_model_folder(source, chosen, revision, text_encoder), scorer, weights)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the whole model folder, atomically: the parts as they were loaded, with their card.

        UserError if the weights were rounded when they were loaded.
        """
        self.check_savable()
        return save_loaded_model(folder, self.parts)

    def check_savable(self) -> None:
        """Raise UserError unless the weights are those of the parts."""
        if self.weights in ("bfloat16", "int8"):
            raise UserError(
                f"the generator's weights were rounded to {self.weights} when they were loaded; "
                "load the model with weights='float32' to save or push it")

    # ---- sampling

    def generate(self, prompt: str | Sequence[str], num_images: int = 1,
                 params: SamplingParams | None = None, seed: int | Sequence[int] = 0,
                 batch_size: int = 32, negative_prompt: str | None = None, layout: Any = None,
                 rerank_from: int | None = None, matcher: Scorer | None = None,
                 jacobi: int = 1, hooks: Hooks | None = None) -> GenerationResult:
        """Draw num_images images of each prompt.

        Image i of a prompt is drawn with seed + i, whatever shares its batch; a list of seeds gives
        each prompt its own.

        params: the model folder's defaults when None.
        batch_size: images drawn at a time.
        negative_prompt: text of the unconditional branch of guidance, instead of the null caption.
        layout: for models with one, see `inference.layouts.read_layout`; sampled when None.
        rerank_from: draw this many candidates per prompt, with seed + 0, seed + 1, ..., and keep
        the num_images that `matcher` (default: that of from_pretrained) scores highest, best first,
        with their seeds and scores.
        jacobi: tokens worked on at once (`inference.generation.jacobi`), 1 = one after another; the
        tokens are the same, the time is not.
        hooks: expand prompts, refuse prompts and images (`revised_prompts`, `refused` of the
        result).

        UserError for an empty list, a prompt that is not text, num_images or batch_size below 1,
        rerank_from below num_images or without a matcher.
        """
        prompts = check_prompts(prompt)
        seeds = first_seeds(seed, len(prompts), num_images, batch_size)
        scorer = check_rerank(rerank_from, num_images, matcher, self.matcher)
        options = check_options(params, self.default_params, negative_prompt, layout, jacobi)
        if hooks is not None:
            return generate_hooked(self, prompts, seeds, hooks, options, num_images=num_images,
                                   batch_size=batch_size, rerank_from=rerank_from, matcher=matcher)

        drawn = rerank_from or num_images
        tokens, layouts = self._sample(prompts, drawn, options, seeds, batch_size)
        images: list[Image.Image] = []
        # one at a time: sums round in another way in a batch, and a pixel here and there changes
        for own in tokens.split(1):
            images += self.decode_tokens(own)
        result = GenerationResult(
            images, tokens, prompts=[text for text in prompts for _ in range(drawn)],
            seeds=[first + i for first in seeds for i in range(drawn)],
            params=options.params, layouts=layouts, model=self)
        if scorer is None:
            return result
        return keep_best(result, drawn, num_images, scorer)

    def sample_tokens(self, prompts: str | Sequence[str], num_images: int = 1,
                      params: SamplingParams | None = None, seed: int | Sequence[int] = 0,
                      batch_size: int = 32, negative_prompt: str | None = None, layout: Any = None,
                      jacobi: int = 1) -> Tensor:
        """Draw image_tokens [len(prompts) * num_images, N] int64 on the CPU, grouped by prompt."""
        options = check_options(params, self.default_params, negative_prompt, layout, jacobi)
        texts = check_prompts(prompts)
        seeds = first_seeds(seed, len(texts), num_images, batch_size)
        tokens, _ = self._sample(texts, num_images, options, seeds, batch_size)
        return tokens

    def _sample(self, prompts: list[str], num_images: int, options: SamplingOptions,
                seeds: list[int], batch_size: int) -> tuple[Tensor, Tensor | None]:
        """Draw image_tokens [B, N], and layouts [B, L] if the model has them, both on the CPU."""
        largest = Workload.of_request(len(prompts), num_images, batch_size)
        self._check_memory(
            largest.pictures, largest.captions, guided=options.params.guidance_scale != 1,
            kept=largest.kept, decoded=largest.decoded, window=options.jacobi,
            unguided_each=options.negative_prompt is None and self.text_tokenizer.null_each)
        # again, since with rerank_from there are more seeds than were asked for
        for seed in seeds:
            check_counts(num_images, batch_size, seed)
        layouts = read_layout(options.layout, self.seq2seq.config, len(prompts) * num_images)

        token_parts: list[Tensor] = []
        layout_parts: list[Tensor] = []
        for which, images in batches(len(prompts), num_images, batch_size):
            batch_seeds = [seeds[prompt] + i for prompt in which for i in images]
            batch_layout = None
            if layouts is not None:
                first = which.start * num_images + images.start
                batch_layout = layouts[first: first + len(batch_seeds)]
            texts = prompts[which.start: which.stop]
            request = self._request(texts, len(images), options, batch_seeds, batch_layout)
            tokens, layout = generate_tokens(self.decoder, request)
            token_parts.append(tokens.cpu())
            if layout is not None:
                layout_parts.append(layout.cpu())
        return torch.cat(token_parts), torch.cat(layout_parts) if layout_parts else None

    def stream(self, prompt: str, num_images: int = 1, params: SamplingParams | None = None,
               seed: int = 0, negative_prompt: str | None = None, layout: Any = None,
               jacobi: int = 1, every: int | None = None) -> Iterator[GenerationStep]:
        """Yield GenerationSteps, and one after the last token; `step.preview` is the growing image.

        every: yield after so many tokens. None: whenever a preview of every step yielded keeps all
        previews within 5 % of the time (a model's first stream of so many images finds out what one
        costs, by one at half the tokens). Leaving the loop, or closing the iterator, frees the
        cache at once. UserError for `every` below 1.
        """
        texts = check_prompts(prompt)
        check_counts(num_images, num_images, seed)
        if every is not None and not is_count(every):
            raise UserError(f"every must be a whole number of at least 1, got {every!r}")
        options = check_options(params, self.default_params, negative_prompt, layout, jacobi)
        layouts = read_layout(options.layout, self.seq2seq.config, num_images)
        self._check_memory(num_images, captions=1, guided=options.params.guidance_scale != 1,
                           window=jacobi, streamed=True)
        seeds = [seed + i for i in range(num_images)]
        request = self._request(texts, num_images, options, seeds, layouts)
        generation = Generation(self.decoder, request)
        known_seconds = self._preview_seconds.get(num_images, 0.0)
        return stream_steps(generation, every, self.decode_step, known_seconds)

    def generate_many(self, requests: Iterable[PromptRequest],
                      batch_size: int = 32) -> Iterator[ManyResult]:
        """Draw requests with parameters and seeds of their own; yield images as they end.

        The batch has `batch_size` rows (an image under guidance takes two), and a row that becomes
        free goes to the next image at once. The tokens are those of `generate`. UserError for a
        batch size below 1, and for a wrong request when it is read.
        """
        check_counts(1, batch_size, 0)
        # the captions of the rows, the next one, and kept texts; guided=False, since
        # batch_size counts rows, two for a guided image; 1, since each is handed over as it ends
        captions = batch_size + 1 + KEPT_TEXTS
        self._check_memory(batch_size, captions, guided=False, kept=1, decoded=1, streamed=True)
        return generate_many(self, requests, batch_size)

    def image_job(self, request: PromptRequest, name: object = None) -> ImageJob:
        """Encode a request for the scheduler. UserError for what `generate` refuses."""
        texts = check_prompts(request.prompt)
        check_counts(request.num_images, request.num_images, request.seed)
        options = check_options(request.params, self.default_params, request.negative_prompt,
                                request.layout)
        layout = read_layout(request.layout, self.seq2seq.config, request.num_images)
        seeds = [request.seed + i for i in range(request.num_images)]
        encoded = self._request(texts, 1, options, seeds, layout)  # 1: the scheduler repeats it
        return ImageJob(encoded.captions, encoded.unconditional, encoded.params, encoded.seeds,
                        encoded.layout, name)

    def _request(self, texts: list[str], images: int, options: SamplingOptions, seeds: list[int],
                 layout: Tensor | None) -> Request:
        """Encode prompts and unconditional text, and move all that is drawn from to the device."""
        weights = self.seq2seq.image_embedding.weight
        return encode_request(texts, images, options, seeds, layout, self.text_tokenizer, weights)

    def _check_memory(self, pictures: int, captions: int, guided: bool, **others: Any) -> None:
        """Raise UserError, before anything is allocated, for what memory has no room for."""
        is_bfloat16 = self.seq2seq.image_embedding.weight.dtype == torch.bfloat16
        dtype: Any = "bfloat16" if is_bfloat16 else "float32"
        weights = self.weights or dtype
        work = Workload(pictures, captions, guided, weights=weights, dtype=dtype, **others)
        check_sampling(self.seq2seq.config, self.image_tokenizer.config, work, self.device)

    def decode_tokens(self, image_tokens: Tensor) -> list[Image.Image]:
        """image_tokens [B, N] int64 in [0, K) -> B images.

        UserError for another shape, dtype or range.
        """
        return self.pixels.decode(image_tokens)

    def decode_step(self, image_tokens: Tensor) -> list[Image.Image]:
        """Decode image tokens so far [B, n], and remember its time for the next stream's budget."""
        start = time.perf_counter()
        images = self.pixels.decode_partial(image_tokens)
        self._preview_seconds[len(images)] = time.perf_counter() - start
        return images

    def attention_map(self, prompt: str, word: str, image_tokens: Tensor,
                      layout: Tensor | None = None) -> Tensor:
        """Return the attention [h, w] float32 of image_tokens [1, N] (layout [1, L]) to `word`."""
        positions = word_positions(self.text_tokenizer, prompt, word)
        text = self._text(prompt)
        return attention_map(self.seq2seq, text, positions, image_tokens.to(self.device), layout)

    def word_maps(self, prompt: str, image_tokens: Tensor,
                  layout: Tensor | None = None) -> list[WordMap]:
        """Return the attention of one image's tokens to each word of its prompt."""
        return word_maps(self.seq2seq, self.text_tokenizer, self._text(prompt), prompt,
                         image_tokens.to(self.device), layout)

    def _text(self, prompt: str) -> TextBatch:
        return text_like(self.text_tokenizer.encode([prompt]), self.seq2seq.image_embedding.weight)
