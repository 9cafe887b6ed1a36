"""Checks of prompts, seeds and counts, and prompts files for batch generation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.sampling import SamplingParams
from tokenloom_common.errors import UserError, nearest_name, one_line

if TYPE_CHECKING:
    pass
from collections.abc import Sequence

REQUEST_FIELDS = ("prompt", "num_images", "seed", "negative_prompt", "layout")
"""Of a line of a prompts file, beside the fields of SamplingParams."""


@dataclass(frozen=True)
class PromptRequest:
    """Pictures of one prompt: picture i is drawn with seed + i. params: the model folder's when None."""

    prompt: str
    num_images: int = 1
    seed: int = 0
    params: SamplingParams | None = None
    negative_prompt: str | None = None
    layout: Any = None


def read_prompts(path: Path, defaults: PromptRequest, base: SamplingParams) -> list[PromptRequest]:
    """A prompts file: .jsonl, an object a line with `prompt` and any of REQUEST_FIELDS and of SamplingParams' fields; anything
    else is text, a prompt a line, blank lines left out. What a line does not say comes from `defaults` and `base`.

    UserError naming file and line for a line that cannot be used, or a file without prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({one_line(error)})") from None
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = _values(line) if path.suffix.lower() == ".jsonl" else {"prompt": line.strip()}
            requests.append(_request(values, defaults, base))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not requests:
        raise UserError(f"--prompts {path}: holds no prompt")
    return requests


def _values(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"not JSON ({one_line(error)})") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError('expected an object with a "prompt", for example {"prompt": "a red heart", "seed": 7}')
    return values


def _request(values: dict[str, Any], defaults: PromptRequest, base: SamplingParams) -> PromptRequest:
    valid = (*REQUEST_FIELDS, *SamplingParams.model_fields)
    for name in values:
        if name not in valid:
            raise UserError(f"unknown field '{name}'{nearest_name(name, valid)}")
    sampling = {name: value for name, value in values.items() if name not in REQUEST_FIELDS}
    params = SamplingParams.parse({**base.plain(), **sampling}, "its sampling") if sampling else base
    own = {name: values.get(name, getattr(defaults, name)) for name in REQUEST_FIELDS}
    return PromptRequest(params=params, **own)


MAX_PROMPT_CHARACTERS = 10_000


MAX_SEED = (1 << 63) - 1  # of the last picture; what a torch generator takes


@dataclass(frozen=True)
class _Options:
    """What every way of sampling takes beside prompts and counts."""

    params: SamplingParams
    negative_prompt: str | None
    layout: Any
    jacobi: int = 1


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


def _seeds(seed: int | Sequence[int], prompts: int, num_images: int, batch_size: int) -> list[int]:
    """One a prompt. UserError for another number of them, or for what check_counts refuses."""
    seeds = [seed] * prompts if not isinstance(seed, Sequence) or isinstance(seed, str) else list(seed)
    if len(seeds) != prompts:
        raise UserError(f"{len(seeds)} seeds for {prompts} prompts; give one seed, or one a prompt")
    for value in seeds:
        check_counts(num_images, batch_size, value)
    return seeds


def _check_params(params: object) -> None:
    if params is not None and not isinstance(params, SamplingParams):
        raise UserError(f"params must be SamplingParams, got {type(params).__name__}")


def check_counts(num_images: int, batch_size: int, seed: int) -> None:
    for name, value, least in (("num_images", num_images, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if seed + num_images - 1 > MAX_SEED:
        raise UserError(f"seed must be at most {MAX_SEED} for the last picture too, got {seed} for {num_images}")
