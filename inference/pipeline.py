"""TextToImage: prompts in, pictures out.

    model = TextToImage.from_pretrained("demo/model")
    model.generate("a red heart", num_images=4, seed=0).images[0].save("heart.png")
"""

# Axes: B pictures, N image tokens, L layout tokens, h w code grid

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from inference.attention_maps import attention_to_text, word_positions
from inference.decoder.calibration import _decoder
from inference.decoder.projection import Precision, check_precision
from inference.generation.batch import Generation, Request
from inference.generation.image_job import ImageJob
from inference.generation.row_buffers import KEPT_UNCONDITIONAL
from inference.generation.ways import generate_tokens, token_steps
from inference.layouts import read_layout
from inference.many import generate_many
from inference.memory.estimate import Workload, check_sampling
from inference.model_folder import LoadedModel, load_model_folder, save_loaded_model
from inference.requests import (
    PromptRequest,
    _check_params,
    _Options,
    _seeds,
    check_counts,
    check_prompts,
)
from inference.results import GenerationResult, ManyResult
from inference.sampling import SamplingParams
from inference.scoring.matcher_folder import load_matcher
from inference.scoring.rerank import check_rerank, keep_best
from inference.scoring.scorer import Scorer
from inference.streaming import GenerationStep, PreviewBudget
from seq2seq import TextBatch
from tokenizer_image.grid import tokens_to_codes
from tokenizer_image.images import float_to_pixels, pixels_to_images
from tokenloom_common.errors import UserError
from tokenloom_common.hub import Pushable


class TextToImage(Pushable):
    """A trained model folder, ready to sample.

    weights: of the generator: float32, bfloat16, or int8 (the decoder's matrices; the rest is as it was); None leaves them as
    they are in `parts`. The sampler takes `parts.seq2seq` over: its parameters become views of fused matrices.
    """

    def __init__(self, parts: LoadedModel, matcher: Scorer | None = None, weights: Precision | None = None) -> None:
        self.parts = parts
        self.matcher = matcher
        self.image_tokenizer = parts.image_tokenizer
        self.text_tokenizer = parts.text_tokenizer
        self.seq2seq = parts.seq2seq
        self.default_params = parts.generation
        self.device = self.seq2seq.image_embedding.weight.device
        self.weights = weights
        self.decoder = _decoder(self.seq2seq, weights)
        self._preview_seconds: dict[int, float] = {}  # how long so many pictures took to decode, lately

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None, revision: str | None = None,
                        text_encoder: str | None = None, matcher: str | Path | None = None,
                        weights: Precision | None = None) -> TextToImage:
        """Load a local model folder or a hub id; on the GPU when there is one and no device is named.

        revision: of a hub id: branch, tag or commit (default: main).
        text_encoder: folder or hub id of the frozen text encoder that the model was trained with, if it is not where it was.
        matcher: what `rerank_from` chooses with, see `inference.scoring.matcher_folder.load_matcher`.
        weights: float32 (default on the CPU), bfloat16 (default on CUDA) or int8. UserError for another name.
        """
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_precision(weights)
        judge = None if matcher is None else load_matcher(matcher, chosen)
        default: Precision = "bfloat16" if torch.device(chosen).type == "cuda" else "float32"
        return cls(load_model_folder(folder, chosen, revision, text_encoder), judge, weights or default)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the whole model folder: the parts as they were loaded, with their card; it appears whole. UserError where the
        weights were rounded when they were loaded."""
        self.check_savable()
        return save_loaded_model(folder, self.parts)

    def check_savable(self) -> None:
        """UserError unless the weights are those of the parts."""
        if self.weights in ("bfloat16", "int8"):
            raise UserError(f"the generator's weights were rounded to {self.weights} when they were loaded; load the model "
                            "with weights='float32' to save or push it")

    def generate(self, prompt: str | Sequence[str], num_images: int = 1, params: SamplingParams | None = None,
                 seed: int | Sequence[int] = 0, batch_size: int = 32, negative_prompt: str | None = None, layout: Any = None,
                 rerank_from: int | None = None, matcher: Scorer | None = None, jacobi: int = 1) -> GenerationResult:
        """Prompts -> num_images pictures each. Picture i of a prompt is drawn with seed + i, whatever shares its batch; a list
        of seeds gives each prompt its own.

        params: the model folder's defaults when None. batch_size: pictures decoded at a time.
        negative_prompt: what guidance leads away from, in place of the null caption. layout: for models with one, see
        `inference.layouts.read_layout`; sampled when None.
        rerank_from: draw so many candidates a prompt, seed + 0, seed + 1, ..., and keep the num_images that fit it best in the
        eyes of `matcher` (default: the one of from_pretrained), the best first, with their seeds and scores.
        jacobi: tokens worked on at once (`inference.generation.jacobi`), 1 = one after another; the tokens are the same, the time is not.
        UserError for an empty list, a prompt that is not text, num_images or batch_size below 1, rerank_from below num_images
        or without a matcher.
        """
        prompts = check_prompts(prompt)
        first_seeds = _seeds(seed, len(prompts), num_images, batch_size)
        judge = check_rerank(rerank_from, num_images, matcher, self.matcher)
        options = self._options(params, negative_prompt, layout, jacobi)
        drawn = rerank_from or num_images
        self._check_memory(len(prompts), drawn, batch_size, options)
        tokens, layouts = self._sample(prompts, drawn, options, first_seeds, batch_size)
        images = [picture for part in tokens.split(batch_size) for picture in self.decode_tokens(part)]
        seeds = [first + i for first in first_seeds for i in range(drawn)]
        repeated = [p for p in prompts for _ in range(drawn)]
        result = GenerationResult(images, tokens, repeated, seeds, options.params, layouts, self)
        return result if judge is None else keep_best(result, drawn, num_images, judge)

    def sample_tokens(self, prompts: str | Sequence[str], num_images: int = 1, params: SamplingParams | None = None,
                      seed: int | Sequence[int] = 0, batch_size: int = 32, negative_prompt: str | None = None,
                      layout: Any = None, jacobi: int = 1) -> Tensor:
        """Prompts -> image_tokens [len(prompts) * num_images, N] int64 on the CPU, a prompt's pictures in a row."""
        options, texts = self._options(params, negative_prompt, layout, jacobi), check_prompts(prompts)
        seeds = _seeds(seed, len(texts), num_images, batch_size)
        self._check_memory(len(texts), num_images, batch_size, options)
        return self._sample(texts, num_images, options, seeds, batch_size)[0]

    def stream(self, prompt: str, num_images: int = 1, params: SamplingParams | None = None, seed: int = 0,
               negative_prompt: str | None = None, layout: Any = None, jacobi: int = 1,
               every: int | None = None) -> Iterator[GenerationStep]:
        """Yield a GenerationStep now and then, and after the last token; `step.preview` is a picture that grows.

        every: yield after so many tokens. None: whenever a preview of every step yielded keeps all previews within 5 % of the
        time (a model's first stream of so many pictures finds out what one costs, by one at half the tokens). Leaving the loop,
        or closing the iterator, frees the cache at once. UserError for `every` below 1.
        """
        texts = check_prompts(prompt)
        check_counts(num_images, num_images, seed)
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise UserError(f"every must be a whole number of at least 1, got {every!r}")
        options = self._options(params, negative_prompt, layout, jacobi)
        seeds = [seed + i for i in range(num_images)]
        given = read_layout(options.layout, self.seq2seq.config, num_images)
        work = self._workload(num_images, 1, options.params.guidance_scale != 1, window=jacobi, streamed=True)
        check_sampling(self.seq2seq.config, self.image_tokenizer.config, work, self.device)
        return self._stream(Generation(self.decoder, self._request(texts, num_images, options, seeds, given)), every)

    def generate_many(self, requests: Iterable[PromptRequest], batch_size: int = 32) -> Iterator[ManyResult]:
        """Pictures of requests with prompts, parameters and seeds of their own, in the order in which they end: the batch has
        `batch_size` rows (a picture under guidance takes two), and a row that becomes free goes to the next picture at once.

        The tokens are those of `generate`. UserError for a batch size below 1, and for a wrong request when it is read.
        """
        check_counts(1, batch_size, 0)
        captions = batch_size + 1 + KEPT_UNCONDITIONAL  # the rows' own, the one that is coming, and texts that guidance leads from
        work = self._workload(batch_size, captions, False, kept=1, decoded=1, streamed=True)
        check_sampling(self.seq2seq.config, self.image_tokenizer.config, work, self.device)
        return generate_many(self, requests, batch_size)

    def image_job(self, request: PromptRequest, name: object = None) -> ImageJob:
        """A request as the scheduler takes it. UserError for what generate refuses."""
        texts = check_prompts(request.prompt)
        check_counts(request.num_images, request.num_images, request.seed)
        options = self._options(request.params, request.negative_prompt, request.layout)
        layout = read_layout(request.layout, self.seq2seq.config, request.num_images)
        asked = self._request(texts, 1, options, [request.seed + i for i in range(request.num_images)], layout)
        return ImageJob(asked.captions, asked.unconditional, asked.params, asked.seeds, asked.layout, name)

    def _stream(self, generation: Generation, every: int | None) -> Iterator[GenerationStep]:
        drawn: list[Tensor] = []
        budget = PreviewBudget(self._preview_seconds.get(generation.request.rows, 0.0))
        for ids in token_steps(generation):
            drawn.append(ids)
            last = len(drawn) == generation.total
            if last or (budget.allows(len(drawn), generation.total) if every is None else len(drawn) % every == 0):
                tokens = torch.stack(drawn, dim=1).cpu()
                with budget.outside():  # what the caller does in between is not the stream's time
                    yield GenerationStep(self.decode_step, tokens, generation.total, None if last else budget)

    def _options(self, params: SamplingParams | None, negative_prompt: str | None, layout: Any, jacobi: int = 1) -> _Options:
        _check_params(params)
        used = params or self.default_params
        if not isinstance(jacobi, int) or isinstance(jacobi, bool) or jacobi < 1:
            raise UserError(f"jacobi must be a whole number of at least 1, got {jacobi!r}; 1 = one token after another")
        if negative_prompt is not None:
            check_prompts(negative_prompt)
            if used.guidance_scale == 1:
                raise UserError("a negative prompt acts through guidance, and guidance_scale is 1; raise it, or leave the "
                                "negative prompt out")
        return _Options(used, negative_prompt, layout, jacobi)

    def _check_memory(self, prompts: int, num_images: int, batch_size: int, options: _Options) -> None:
        """UserError, with the bytes, for what this device has no memory for; before anything is allocated."""
        largest = Workload.of_request(prompts, num_images, batch_size)
        work = self._workload(largest.pictures, largest.captions, options.params.guidance_scale != 1,
                              kept=prompts * num_images, decoded=min(batch_size, prompts * num_images), window=options.jacobi,
                              unguided_each=options.negative_prompt is None and self.text_tokenizer.null_each)
        check_sampling(self.seq2seq.config, self.image_tokenizer.config, work, self.device)

    def _workload(self, pictures: int, captions: int, guided: bool, **others: Any) -> Workload:
        low = self.seq2seq.image_embedding.weight.dtype == torch.bfloat16
        return Workload(pictures, captions, guided, weights=self.weights or ("bfloat16" if low else "float32"),
                        dtype="bfloat16" if low else "float32", **others)

    def _sample(self, texts: list[str], num_images: int, options: _Options, first_seeds: list[int],
                batch_size: int) -> tuple[Tensor, Tensor | None]:
        for seed in first_seeds:
            check_counts(num_images, batch_size, seed)
        given = read_layout(options.layout, self.seq2seq.config, len(texts) * num_images)
        parts: list[Tensor] = []
        layouts: list[Tensor] = []
        for first in range(0, len(texts), max(1, batch_size // num_images)):
            some = texts[first: first + max(1, batch_size // num_images)]
            some_seeds = first_seeds[first: first + len(some)]
            for start in range(0, num_images, batch_size):  # more pictures of one prompt than fit a batch
                count = min(batch_size, num_images - start)
                seeds = [seed + start + i for seed in some_seeds for i in range(count)]
                at = first * num_images + start
                part = None if given is None else given[at: at + len(seeds)]
                tokens, layout = generate_tokens(self.decoder, self._request(some, count, options, seeds, part))
                parts.append(tokens.cpu())
                layouts += [] if layout is None else [layout.cpu()]
        return torch.cat(parts), torch.cat(layouts) if layouts else None

    def _request(self, texts: list[str], images: int, options: _Options, seeds: list[int], layout: Tensor | None) -> Request:
        source = self.text_tokenizer
        captions = source.encode(texts)
        negative = options.negative_prompt
        unguided = source.null_for(captions) if negative is None else source.encode([negative])
        captions, unguided = (self._on_device(batch) for batch in (captions, unguided))
        return Request(captions, unguided, images, options.params, seeds, None if layout is None else layout.to(self.device),
                       options.jacobi)

    def _on_device(self, text: TextBatch) -> TextBatch:
        """Where the model is; features in the model's type."""
        given = text.text_input.to(self.device)
        if given.is_floating_point():
            given = given.to(self.seq2seq.image_embedding.weight.dtype)
        return TextBatch(given, text.text_mask.to(self.device))

    def step_of(self, rows: int) -> Callable[[], object]:
        """One decoder step of `rows` rows, halfway down a picture of no meaning, to be timed."""
        text = self._on_device(self.text_tokenizer.null_caption())
        groups = [self.decoder.prefill(text, rows)]
        cache = self.decoder.new_cache(groups)
        previous = torch.zeros(rows, dtype=torch.int64, device=self.device)
        return partial(self.decoder.decode_one, previous, max(1, self.seq2seq.config.num_tokens // 2), groups, cache)

    def attention_map(self, prompt: str, word: str, image_tokens: Tensor, layout: Tensor | None = None) -> Tensor:
        """image_tokens [1, N] (and layout [1, L]) of a prompt -> attention of each token to `word`, [h, w] float32."""
        text = self._on_device(self.text_tokenizer.encode([prompt]))
        real = text.text_mask[0].nonzero().flatten()  # a caption may be padded on its left
        positions = real[word_positions(self.text_tokenizer, prompt, word)]
        weights = attention_to_text(self.seq2seq, text, image_tokens.to(self.device),
                                    None if layout is None else layout.to(self.device))
        return weights[0, :, positions].sum(dim=-1).reshape(self.seq2seq.config.grid).cpu()

    @torch.inference_mode()
    def decode_tokens(self, image_tokens: Tensor) -> list[Image.Image]:
        """image_tokens [B, N] int64 in [0, K) -> B pictures. UserError for another shape, dtype or range."""
        if not isinstance(image_tokens, Tensor):
            raise UserError(f"image_tokens must be a tensor, got {type(image_tokens).__name__}")
        codes = tokens_to_codes(image_tokens.to(self.device), self.image_tokenizer.grid)
        return pixels_to_images(float_to_pixels(self.image_tokenizer.decode(codes)))

    def decode_step(self, image_tokens: Tensor) -> list[Image.Image]:
        """`decode_tokens`, remembering how long it took, for the budget of the next stream's previews."""
        start = time.perf_counter()
        images = self.decode_tokens(image_tokens)
        self._preview_seconds[len(images)] = time.perf_counter() - start
        return images


