"""One token of every row as a function of tensors alone, sampling included: what CUDA captures as a graph and replays.

A step reads and writes the same memory each time and never looks at a value. Batches are padded to a few sizes, so that few
graphs serve all. (On the CPU a step is compiled code: `inference.decoder.native`.)
"""

# Axes: P pictures (padded), B pictures of a request, R rows (P, or 2P under guidance), N image tokens, K codebook size

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.kv_cache import CaptionMemory, SelfCache
from inference.generation.batch import Generation
from inference.sampling import SamplingParams, guidance_at, guide, sample

KEPT = 8


def padded(pictures: int) -> int:
    """The next power of two up to 8, then the next multiple of 8."""
    return 1 << (pictures - 1).bit_length() if pictures <= 8 else -(-pictures // 8) * 8


class StaticStep:
    """Buffers for P pictures in one or two branches, and the step on them."""

    def __init__(self, decoder: CachedDecoder, pictures: int, branches: int, params: SamplingParams) -> None:
        self.decoder, self.pictures, self.branches, self.params = decoder, pictures, branches, params
        rows, device, total = pictures * branches, decoder.device, decoder.config.num_tokens
        self.cache = decoder.rows_cache(rows)
        self.groups = [decoder.empty_memory(pictures) for _ in range(branches)]
        self.previous = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.keys = torch.zeros(pictures, total, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(pictures, total, dtype=torch.int64, device=device)
        self.scales = torch.tensor([guidance_at(params, at, total) for at in range(total)], device=device)
        self._replay: Callable[[], object] = self._step

    def load(self, groups: list[CaptionMemory], cache: SelfCache, keys: Tensor, previous: Tensor, position: int) -> None:
        """A request's state, rows in order of branches; rows beyond its B pictures repeat its last one.

        previous [B]: the tokens before `position`. keys [B, N].
        """
        count = len(keys)
        take = torch.arange(self.pictures, device=keys.device).clamp(max=count - 1)
        filled = min(self.decoder.model.prefix_slots + position, self.decoder.slots)  # slots that hold something
        for branch, group in enumerate(groups):
            _copy_memory(group, self.groups[branch], take // group.images)
            part = slice(branch * self.pictures, (branch + 1) * self.pictures)
            for target, source in ((self.cache.keys, cache.keys), (self.cache.values, cache.values)):
                target[:, part, :, :filled] = source[:, branch * count + take, :, :filled]
            if self.cache.seen is not None and cache.seen is not None:
                self.cache.seen[part] = cache.seen[branch * count + take]
        self.keys.copy_(keys[take])
        self.previous.copy_(previous[take].repeat(self.branches)[:, None])
        self.positions.fill_(position)

    def __call__(self) -> None:
        """Draw the token at `positions` of every picture into `tokens`, and move on."""
        self._replay()

    @torch.inference_mode()
    def _step(self) -> None:
        at = self.positions[: self.pictures]
        logits = self.decoder.decode_at(self.previous, self.positions, self.groups, self.cache)[:, 0].float()
        if self.branches == 2:
            logits = guide(logits[: self.pictures], logits[self.pictures:], self.scales[at])
        ids = sample(logits, self.params, self.keys.gather(1, at)[:, 0], asks=False)
        self.tokens.scatter_(1, at, ids[:, None])
        self.previous.copy_(ids.repeat(self.branches)[:, None])
        self.positions.add_(1)

    def capture(self) -> None:
        """Make replays a CUDA graph; what the buffers hold afterwards means nothing."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose kernels and allocate on first use, which a graph must not hold
                self.positions.fill_(self.decoder.first_position)
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.positions.fill_(self.decoder.first_position)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._replay = graph.replay


def _copy_memory(source: CaptionMemory, target: CaptionMemory, caption: Tensor) -> None:
    """Captions [P] of one memory into a static one; text beyond the source's is hidden."""
    length = source.seen.shape[1] if source.seen is not None else (source.keys[0].shape[2] if source.keys else 0)
    if not target.keys:
        return  # text is part of the cache
    for kept, given in ((target.keys, source.keys), (target.values, source.values)):
        for layer, part in zip(kept, given, strict=True):
            layer[:, :, :length] = part[caption]
    assert target.seen is not None
    target.seen.fill_(False)
    target.seen[:, :length] = True if source.seen is None else source.seen[caption]


def kept_step(decoder: CachedDecoder, pictures: int, branches: int, params: SamplingParams) -> StaticStep:
    """A step of these sizes, captured where there is CUDA; the decoder keeps the last few."""
    key, kept = (pictures, branches, params), decoder.recorded_steps
    step = kept.pop(key, None)
    if step is None:
        step = StaticStep(decoder, pictures, branches, params)
        if decoder.device.type == "cuda":
            step.capture()
    kept[key] = step
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return step


def static_steps(generation: Generation) -> Iterator[Tensor]:
    """`Generation.steps` by static steps: yield the next ids [B] int64 for each of the N positions."""
    decoder, request = generation.decoder, generation.request
    groups, cache = generation.begin()
    count, first = request.rows, decoder.first_position
    previous = torch.full((count,), decoder.begin, device=decoder.device)
    if first == 1:
        previous = generation.draw(decoder.first_logits(groups), 0)
        yield previous
    step: StaticStep | None = None
    for position in range(first, generation.total):
        if step is None or position == generation.guided_steps:
            if position >= generation.guided_steps:
                groups, cache = generation.without_guidance(groups, step_cache(step, cache, count))
            step = kept_step(decoder, padded(count), len(groups), request.params)
            step.load(groups, cache, generation.token_keys, previous, position)
        step()
        generation.forwards += 1
        previous = step.tokens[:count, position].clone()
        yield previous


def step_cache(step: StaticStep | None, cache: SelfCache, count: int) -> SelfCache:
    """The cache of a request's rows as it is after the steps so far."""
    if step is None:
        return cache
    rows = torch.cat([torch.arange(count) + branch * step.pictures for branch in range(step.branches)])
    kept, where = step.cache, rows.to(step.cache.keys.device)
    return SelfCache(kept.keys[:, where], kept.values[:, where], None if kept.seen is None else kept.seen[where])
