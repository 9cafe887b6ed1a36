"""One token of every row as a function of tensors alone, sampling included: CUDA captures it as a
graph and replays it.

A step reads and writes the same memory every time and never looks at a value. Batches are padded to
a few sizes, so that few graphs serve all requests. (On the CPU a step is compiled code:
`inference.decoder.native`.)
"""

# Axes: P images (padded), B images of a request, R rows (P, or 2P under guidance), N image tokens,
#       K codebook size

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.kv_cache import CaptionMemory, SelfCache
from inference.generation.batch import Generation
from inference.generation.drawing import draw_tokens, guidance_scales
from inference.sampling import SamplingParams

MAX_STEPS_KEPT = 8  # per decoder: each holds a KV cache of its own


def padded(images: int) -> int:
    """Round a batch size up to the next power of two up to 8, then to the next multiple of 8."""
    if images <= 8:
        return 1 << (images - 1).bit_length()
    return -(-images // 8) * 8


class StaticStep:
    """Buffers for P images in one or two branches, and the decoder step on them."""

    def __init__(self, decoder: CachedDecoder, images: int, branches: int,
                 params: SamplingParams) -> None:
        self.decoder = decoder
        self.images = images
        self.branches = branches
        self.params = params
        rows = images * branches
        device = decoder.device
        total = decoder.config.num_tokens
        self.cache = decoder.rows_cache(rows)
        self.groups = [decoder.empty_memory(images) for _ in range(branches)]
        self.previous = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.keys = torch.zeros(images, total, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(images, total, dtype=torch.int64, device=device)
        self.scales = guidance_scales(params, total, device)
        self._run: Callable[[], object] = self._step

    def load(self, groups: list[CaptionMemory], cache: SelfCache, keys: Tensor, previous: Tensor,
             position: int) -> None:
        """Copy the state of a request in; padding repeats the last of its B images.

        Rows are ordered by branch.
        previous [B]: the tokens before `position`. keys [B, N].
        """
        count = len(keys)
        # [P], the image in each padded row
        source = torch.arange(self.images, device=keys.device).clamp(max=count - 1)
        # slots that hold something
        filled = min(self.decoder.model.prefix_slots + position, self.decoder.slots)
        for branch, group in enumerate(groups):
            _copy_memory(group, self.groups[branch], source // group.images)
            own_rows = slice(branch * self.images, (branch + 1) * self.images)
            given_rows = branch * count + source
            self.cache.keys[:, own_rows, :, :filled] = cache.keys[:, given_rows, :, :filled]
            self.cache.values[:, own_rows, :, :filled] = cache.values[:, given_rows, :, :filled]
            if self.cache.seen is not None and cache.seen is not None:
                self.cache.seen[own_rows] = cache.seen[given_rows]
        self.keys.copy_(keys[source])
        self.previous.copy_(previous[source].repeat(self.branches)[:, None])
        self.positions.fill_(position)

    def __call__(self) -> None:
        """Draw the token at `positions` of every image into `tokens`, and advance by one."""
        self._run()

    @torch.inference_mode()
    def _step(self) -> None:
        at = self.positions[: self.images]  # [P, 1]
        logits = self.decoder.decode_at(self.previous, self.positions, self.groups, self.cache)
        keys = self.keys.gather(1, at)[:, 0]
        ids = draw_tokens(logits[:, 0], self.scales[at], self.params, keys, allow_sync=False)
        self.tokens.scatter_(1, at, ids[:, None])
        self.previous.copy_(ids.repeat(self.branches)[:, None])
        self.positions.add_(1)

    def capture(self) -> None:
        """Replace the step by a CUDA graph of it; leaves the buffers' contents undefined."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # libraries choose kernels and allocate workspaces on first use: not inside a graph
            for _ in range(3):
                self.positions.fill_(self.decoder.first_position)
                self._step()
        torch.cuda.current_stream().wait_stream(stream)

        self.positions.fill_(self.decoder.first_position)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._run = graph.replay

    def request_cache(self, count: int) -> SelfCache:
        """Return the cache of a request's B = `count` images, without the padding."""
        images = torch.arange(count)
        branch_rows = [images + branch * self.images for branch in range(self.branches)]
        rows = torch.cat(branch_rows).to(self.cache.keys.device)
        seen = None if self.cache.seen is None else self.cache.seen[rows]
        return SelfCache(self.cache.keys[:, rows], self.cache.values[:, rows], seen)


def _copy_memory(source: CaptionMemory, target: CaptionMemory, captions: Tensor) -> None:
    """Copy captions [P] of one memory into a static one, and hide the slots beyond its text."""
    if not target.keys:
        return  # decoder-only: the text is part of the self-attention cache
    length = source.keys[0].shape[2]
    for layer in range(len(target.keys)):
        target.keys[layer][:, :, :length] = source.keys[layer][captions]
        target.values[layer][:, :, :length] = source.values[layer][captions]
    assert target.seen is not None
    target.seen.fill_(False)
    target.seen[:, :length] = True if source.seen is None else source.seen[captions]


def kept_step(decoder: CachedDecoder, images: int, branches: int,
              params: SamplingParams) -> StaticStep:
    """Return a step of these sizes, captured on CUDA; the decoder keeps the last ones used."""
    kept = decoder.recorded_steps
    # params too: filters and their constants are part of a captured graph
    key = (images, branches, params)
    step = kept.pop(key, None)  # and put back below, as the most recently used
    if step is None:
        step = StaticStep(decoder, images, branches, params)
        if decoder.device.type == "cuda":
            step.capture()
    kept[key] = step
    while len(kept) > MAX_STEPS_KEPT:
        kept.popitem(last=False)
    return step


def static_steps(generation: Generation) -> Iterator[Tensor]:
    """Do what `Generation.steps` does, with static steps: yield ids [B] int64, N times."""
    decoder, request = generation.decoder, generation.request
    groups, cache = generation.prefill()
    count = request.rows
    first = decoder.first_position
    previous = torch.full((count,), decoder.begin, device=decoder.device)
    if first == 1:
        previous = generation.draw(decoder.first_logits(groups), 0)
        yield previous

    step: StaticStep | None = None
    for position in range(first, generation.total):
        if step is None or position == generation.guided_steps:
            if step is not None:  # guidance ends: the step's own cache is the newer one
                cache = step.request_cache(count)
            if position >= generation.guided_steps:
                groups, cache = generation.without_guidance(groups, cache)
            step = kept_step(decoder, padded(count), len(groups), request.params)
            step.load(groups, cache, generation.token_keys, previous, position)
        step()
        generation.forwards += 1
        previous = step.tokens[:count, position].clone()  # the next request overwrites `tokens`
        yield previous
