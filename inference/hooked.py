"""Generation with hooks: prompts expanded and refused before, images refused after."""

# Axes: N image tokens

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch

from inference.hooks.applied import Hooks, PreparedPrompt, Refusal
from inference.layouts import read_layout
from inference.requests import SamplingOptions
from inference.results import GenerationResult
from inference.sampling import SamplingParams
from inference.scoring.scorer import Scorer
from seq2seq import ImageTransformer


class Generator(Protocol):
    """A model that draws prompts as they stand; `TextToImage` is one."""

    seq2seq: ImageTransformer

    def generate(self, prompt: list[str], num_images: int, params: SamplingParams | None,
                 seed: list[int], batch_size: int, negative_prompt: str | None, layout: Any,
                 rerank_from: int | None, matcher: Scorer | None, jacobi: int) -> GenerationResult:
        """Draw num_images images of each prompt, those of a prompt one after another."""
        ...


def generate_hooked(model: Generator, prompts: list[str], seeds: list[int], hooks: Hooks,
                    options: SamplingOptions, *, num_images: int, batch_size: int,
                    rerank_from: int | None, matcher: Scorer | None) -> GenerationResult:
    """Draw the prompts that are not refused, and leave out the images that are.

    seeds: of each prompt's first image. HookFailedError for a hook that fails, before anything is
    drawn where that is the expander or the check of prompts.
    """
    prepared = [hooks.prepare(prompt) for prompt in prompts]
    refused = [Refusal(one.prompt, one.refusal) for one in prepared if one.refusal is not None]
    drawn = [row for row, one in enumerate(prepared) if one.refusal is None]
    if not drawn:
        tokens = torch.zeros(0, model.seq2seq.config.num_tokens, dtype=torch.long)
        return GenerationResult([], tokens, [], [], options.params, refused=refused)

    layout = options.layout
    if layout is not None and refused:  # one for each image: leave out those of refused prompts
        per_prompt = rerank_from or num_images
        layouts = read_layout(layout, model.seq2seq.config, len(prompts) * per_prompt)
        assert layouts is not None
        layout = layouts.view(len(prompts), per_prompt, -1)[drawn].flatten(0, 1)

    result = model.generate(
        [prepared[row].drawn for row in drawn], num_images, options.params,
        [seeds[row] for row in drawn], batch_size, options.negative_prompt, layout, rerank_from,
        matcher, options.jacobi)
    of_images: list[PreparedPrompt] = []
    for row in drawn:
        of_images += [prepared[row]] * num_images
    result = replace(result, prompts=[one.prompt for one in of_images],
                     revised_prompts=[one.revised for one in of_images], refused=refused)
    return screened(result, hooks)


def screened(result: GenerationResult, hooks: Hooks) -> GenerationResult:
    """Return the result without the images that are refused; `refused` names them, with reasons."""
    kept = []
    refused = list(result.refused)
    for row, reason in enumerate(hooks.check_images(result.images)):
        if reason is None:
            kept.append(row)
        else:
            refused.append(Refusal(result.prompts[row], reason, result.seeds[row]))
    if len(kept) == len(result.images):
        return result
    return replace(result.keep(kept), refused=refused)
