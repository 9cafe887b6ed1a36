"""One token of every row as a function of tensors alone: recorded once, and replayed without Python.

A step reads and writes the same memory each time and never looks at a value. Batches are padded to a few sizes, so that few
records serve all. On CUDA a record is a graph, sampling included. On the CPU it is a trace of the decoder (torch.jit.trace),
for few rows: between matrices that sweep the caches, Python costs 2 of 11 ms a step (57M decoder). A trace takes about as long
as it gains on one picture, so that it is made when a size comes for the second time.
"""

# Axes: P pictures (padded), B pictures of a request, R rows (P, or 2P under guidance), N image tokens, K codebook size

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from inference.decoder import CachedDecoder
from inference.generate import Generation
from inference.kv_cache import CaptionMemory, SelfCache
from inference.sampling import SamplingParams, guidance_at, guide, sample

KEPT = 8
MOST_EXTRA = 0.15
"""On the CPU a static step also reads cache slots that hold nothing yet: at most this share of the weights, or steps are not
static."""
LEAST_MATRICES = 32 * 1024 * 1024  # bytes


def padded(pictures: int) -> int:
    """The next power of two up to 8, then the next multiple of 8."""
    return 1 << (pictures - 1).bit_length() if pictures <= 8 else -(-pictures // 8) * 8


class StaticStep:
    """Buffers for P pictures in one or two branches, and the step on them; of `width` positions a row for Jacobi's windows,
    which draw for themselves."""

    def __init__(self, decoder: CachedDecoder, pictures: int, branches: int, params: SamplingParams, width: int = 1) -> None:
        self.decoder, self.pictures, self.branches, self.params = decoder, pictures, branches, params
        rows, device, total = pictures * branches, decoder.device, decoder.config.num_tokens
        self.cache = decoder.rows_cache(rows)
        self.groups = [decoder.empty_memory(pictures) for _ in range(branches)]
        self.previous = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.keys = torch.zeros(pictures, total, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(pictures, total, dtype=torch.int64, device=device)
        self.scales = torch.tensor([guidance_at(params, at, total) for at in range(total)], device=device)
        self._replay: Callable[[], object] = self._step
        self._traced: Callable[..., Tensor] = self._logits

    def load(self, groups: list[CaptionMemory], cache: SelfCache, keys: Tensor, previous: Tensor, position: int) -> None:
        """A request's state, rows in order of branches; rows beyond its B pictures repeat its last one.

        previous [B]: the tokens before `position`. keys [B, N].
        """
        take = torch.arange(self.pictures, device=keys.device).clamp(max=len(keys) - 1)
        self.load_caches(groups, cache, take, position)
        self.keys.copy_(keys[take])
        self.previous.copy_(previous[take].repeat(self.branches)[:, None])
        self.positions.fill_(position)

    def load_caches(self, groups: list[CaptionMemory], cache: SelfCache, take: Tensor, position: int) -> None:
        """What the rows `take` [P] of each branch keep, up to `position`."""
        count = cache.row_count // len(groups)
        for branch, group in enumerate(groups):
            caption = take // group.images  # which caption each picture reads
            _copy_memory(group, self.groups[branch], caption)
            part = slice(branch * self.pictures, (branch + 1) * self.pictures)
            filled = min(self.decoder.model.prefix_slots + position, self.decoder.slots)  # slots that hold something
            for target, source in ((self.cache.keys, cache.keys), (self.cache.values, cache.values)):
                target[:, part, :, :filled] = source[:, branch * count + take, :, :filled]
            if self.cache.seen is not None and cache.seen is not None:
                self.cache.seen[part] = cache.seen[branch * count + take]

    def __call__(self) -> None:
        """Draw the token at `positions` of every picture into `tokens`, and move on."""
        self._replay()

    @torch.inference_mode()
    def _step(self) -> None:
        self._draw(self._logits(*self._state())[:, 0], asks=False)

    @torch.inference_mode()
    def window(self, previous: Tensor, positions: Tensor) -> Tensor:
        """`CachedDecoder.decode_at` on these buffers: logits [R, width, K]."""
        self.previous.copy_(previous)
        self.positions.copy_(positions)
        return self._traced(*self._state())

    def _state(self) -> tuple[Tensor, ...]:
        """Every tensor that changes from step to step or request to request; what is not here a trace takes for constant."""
        parts: list[Tensor | None] = [self.previous, self.positions, self.cache.keys, self.cache.values, self.cache.seen]
        for group in self.groups:
            parts += [*group.keys, *group.values, group.seen]
        return tuple(part for part in parts if part is not None)

    def _logits(self, previous: Tensor, positions: Tensor, keys: Tensor, values: Tensor, *others: Tensor) -> Tensor:
        """[R, width, K] from the tensors of `_state`."""
        rest = iter(others)
        cache = SelfCache(keys, values, None if self.cache.seen is None else next(rest))
        groups = [CaptionMemory([next(rest) for _ in group.keys], [next(rest) for _ in group.values],
                                None if group.seen is None else next(rest), group.captions, group.images)
                  for group in self.groups]
        return self.decoder.traceable(previous, positions, groups, cache)

    def _draw(self, logits: Tensor, asks: bool) -> None:
        at, logits = self.positions[: self.pictures], logits.float()
        if self.branches == 2:
            logits = guide(logits[: self.pictures], logits[self.pictures:], self.scales[at])
        ids = sample(logits, self.params, self.keys.gather(1, at)[:, 0], asks)
        self.tokens.scatter_(1, at, ids[:, None])
        self.previous.copy_(ids.repeat(self.branches)[:, None])
        self.positions.add_(1)

    def record(self) -> None:
        """A CUDA graph, or a trace; what the buffers hold afterwards means nothing."""
        self.positions.fill_(self.decoder.first_position)
        if self.decoder.device.type == "cuda":
            self._capture()
        else:
            self._trace()

    def _trace(self) -> None:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing is old and says so; what torch offers instead needs a C++ compiler
            traced = torch.jit.trace(self._logits, self._state(), check_trace=False)
        self._traced, state = traced, self._state()

        @torch.inference_mode()
        def replay() -> None:
            self._draw(traced(*state)[:, 0], asks=True)

        self._replay = replay

    def _capture(self) -> None:
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


def suits(decoder: CachedDecoder, pictures: int, branches: int, params: SamplingParams, width: int = 1) -> bool:
    """Whether steps of this size should be static: always on CUDA; on the CPU for few rows, from the second time on."""
    if decoder.device.type == "cuda":
        return True
    extra = padded(pictures) * branches * (decoder.slots // 2) * decoder.slot_bytes
    large = decoder.matrix_bytes >= LEAST_MATRICES  # with less, nothing is swept from the caches
    if decoder.device.type != "cpu" or not large or extra > MOST_EXTRA * decoder.matrix_bytes:
        return False
    key, seen = (padded(pictures), branches, params, width), decoder.sizes_seen
    came = key in seen
    seen[key] = None
    seen.move_to_end(key)
    while len(seen) > 8 * KEPT:
        seen.popitem(last=False)
    return came


def kept_step(decoder: CachedDecoder, pictures: int, branches: int, params: SamplingParams, width: int = 1) -> StaticStep:
    """A recorded step of these sizes; the decoder keeps the last few."""
    key, kept = (pictures, branches, params, width), decoder.recorded_steps
    step = kept.pop(key, None)
    if step is None:
        step = StaticStep(decoder, pictures, branches, params, width)
        step.record()
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
