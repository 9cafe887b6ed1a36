"""Requests for images: checks of prompts, seeds and counts, their batches, and prompts files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from inference.generation.batch import Request
from inference.hooks.expansion import MAX_PROMPT_CHARACTERS
from inference.sampling import SamplingParams
from seq2seq import TextBatch, TextSource
from tokenloom_common.errors import UserError, nearest_name
from tokenloom_common.text_files import read_text_file, text_lines

REQUEST_FIELDS = ("prompt", "num_images", "seed", "negative_prompt", "layout")
"""Fields of a line of a prompts file, beside those of SamplingParams."""
JSON_LINES = (".jsonl", ".ndjson")
"""Endings of prompts files with a JSON object a line."""
OTHER_FORMATS = (".json", ".csv", ".tsv", ".yaml", ".yml")
"""Endings of files whose lines are no captions; as text they would be drawn as they stand."""
MAX_SEED = (1 << 63) - 1  # of the last image; noise keys are int64


@dataclass(frozen=True)
class PromptRequest:
    """Images of one prompt: image i is drawn with seed + i.

    params: the model folder's when None.
    """

    prompt: str
    num_images: int = 1
    seed: int = 0
    params: SamplingParams | None = None
    negative_prompt: str | None = None
    layout: Any = None


class AskedRequest(NamedTuple):
    """A request, and its prompt as it was asked for, before it was expanded."""

    request: PromptRequest
    asked_prompt: str


@dataclass(frozen=True)
class SamplingOptions:
    """Everything that sampling depends on beside prompts, counts and seeds."""

    params: SamplingParams
    negative_prompt: str | None
    layout: Any
    jacobi: int = 1


def check_options(params: SamplingParams | None, defaults: SamplingParams,
                  negative_prompt: str | None, layout: Any, jacobi: int = 1) -> SamplingOptions:
    """Return the options, with `defaults` where params is None. UserError for impossible ones."""
    if params is not None and not isinstance(params, SamplingParams):
        raise UserError(f"params must be SamplingParams, got {type(params).__name__}")
    used = params or defaults
    if not is_count(jacobi):
        raise UserError(f"jacobi must be a whole number of at least 1, got {jacobi!r}; "
                        "1 = one token after another")
    if negative_prompt is not None:
        check_prompts(negative_prompt)
        if used.guidance_scale == 1:
            raise UserError("a negative prompt acts through guidance, and guidance_scale is 1; "
                            "raise it, or leave the negative prompt out")
    return SamplingOptions(used, negative_prompt, layout, jacobi)


def check_prompts(prompt: str | Sequence[str]) -> list[str]:
    """Return one or several prompts as a list.

    UserError for none, for anything but text, and for more than MAX_PROMPT_CHARACTERS.
    """
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
            raise UserError(f"a prompt has {len(text):,} characters, the limit is "
                            f"{MAX_PROMPT_CHARACTERS:,}; shorten it")
    return prompts


def first_seeds(seed: int | Sequence[int], prompts: int, num_images: int,
                batch_size: int) -> list[int]:
    """Return the seed of each prompt's first image, from one for all or one per prompt.

    UserError for another number of seeds, or for what check_counts refuses.
    """
    if isinstance(seed, Sequence) and not isinstance(seed, str):  # check_counts names a str
        seeds = list(seed)
    else:
        seeds = [seed] * prompts
    if len(seeds) != prompts:
        raise UserError(f"{len(seeds)} seeds for {prompts} prompts; give one seed, or one a prompt")
    for value in seeds:
        check_counts(num_images, batch_size, value)
    return seeds


def check_counts(num_images: int, batch_size: int, seed: int) -> None:
    """Raise UserError unless counts are at least 1, and all seeds are in 0 to MAX_SEED."""
    for name, value, least in (("num_images", num_images, 1), ("batch_size", batch_size, 1),
                               ("seed", seed, 0)):
        if not is_count(value, least):
            raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if seed + num_images - 1 > MAX_SEED:
        raise UserError(f"seed must be at most {MAX_SEED} for the last picture too, "
                        f"got {seed} for {num_images}")


def is_count(value: object, least: int = 1) -> bool:
    """Whether a value is a whole number of at least `least`."""
    # True is an int in Python, but no count
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def batches(prompts: int, num_images: int, batch_size: int) -> Iterator[tuple[range, range]]:
    """Split num_images per prompt into batches: yield which prompts, and which images of each."""
    # all images of a prompt in one batch where they fit: they share one memory of the caption
    prompts_at_once = max(1, batch_size // num_images)
    for first in range(0, prompts, prompts_at_once):
        which = range(first, min(first + prompts_at_once, prompts))
        # several parts only if the images of one prompt do not fit into a batch
        for start in range(0, num_images, batch_size):
            yield which, range(start, min(start + batch_size, num_images))


def encode_request(texts: list[str], images: int, options: SamplingOptions, seeds: list[int],
                   layout: Tensor | None, source: TextSource, weights: Tensor) -> Request:
    """Encode prompts and unconditional text, and move all that is drawn from beside the weights."""
    captions = source.encode(texts)
    if options.negative_prompt is None:
        unconditional = source.null_for(captions)
    else:
        unconditional = source.encode([options.negative_prompt])
    if layout is not None:
        layout = layout.to(weights.device)
    return Request(text_like(captions, weights), text_like(unconditional, weights), images,
                   options.params, seeds, layout, options.jacobi)


def text_like(text: TextBatch, weights: Tensor) -> TextBatch:
    """Move a text to the device of the model's weights, and features also to their type."""
    text_input = text.text_input.to(weights.device)
    # features of a frozen text encoder; text ids stay int64
    if text_input.is_floating_point():
        text_input = text_input.to(weights.dtype)
    return TextBatch(text_input, text.text_mask.to(weights.device))


# ---- prompts files


@dataclass(frozen=True)
class PromptLine:
    """A line of a prompts file, and its values: REQUEST_FIELDS and fields of SamplingParams."""

    number: int
    values: dict[str, Any]


def read_prompt_lines(path: Path) -> list[PromptLine]:
    """Read a prompts file, of UTF-8 or as its byte order mark says; needs no model.

    JSON_LINES: one object per line with `prompt` and any of REQUEST_FIELDS and of SamplingParams'
    fields. Anything else is text: one prompt per line, blank lines left out. UserError naming the
    file for one that cannot be read, is another format or holds nothing, and naming the line for
    one that cannot be used.
    """
    name = f"--prompts {path}"
    ending = path.suffix.lower()
    if ending in OTHER_FORMATS:
        raise UserError(f"{name}: {ending} is not read; give a text file with a caption a line, or "
                        "a .jsonl file with an object a line")
    lines = text_lines(read_text_file(path, name).replace("\0", ""))

    found = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        try:
            values = _json_object(text) if ending in JSON_LINES else _caption(text)
            _check_values(values)
        except UserError as error:  # the checks know the line's values, not its number
            raise UserError(f"{path}, line {number}: {error}") from None
        found.append(PromptLine(number, values))
    if not found:
        raise UserError(f"{name}: holds no prompt")
    return found


def prompt_requests(path: Path, lines: Sequence[PromptLine], defaults: PromptRequest,
                    base: SamplingParams) -> list[PromptRequest]:
    """Make requests of a prompts file's lines; `defaults` and `base` give what a line leaves out.

    UserError naming file and line for sampling parameters out of range.
    """
    requests = []
    for line in lines:
        values = line.values
        fields = {name: values.get(name, getattr(defaults, name)) for name in REQUEST_FIELDS}
        sampling = {name: value for name, value in values.items() if name not in REQUEST_FIELDS}
        params = base
        try:
            if sampling:
                params = SamplingParams.parse({**base.plain(), **sampling}, "its sampling")
        except UserError as error:
            raise UserError(f"{path}, line {line.number}: {error}") from None
        requests.append(PromptRequest(params=params, **fields))
    return requests


def _caption(line: str) -> dict[str, Any]:
    """Return the values of a line of text. UserError for an object of a .jsonl file."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict) and "prompt" in values:
        raise UserError("is a JSON object; rename the file to end in .jsonl")
    return {"prompt": line}


def _json_object(line: str) -> dict[str, Any]:
    try:
        # not strict: a tab or a form feed within a string can only mean itself
        values = json.loads(line, strict=False)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists in lists
        raise UserError(f"not JSON that can be read ({type(error).__name__})") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError('expected an object with a "prompt", '
                        'for example {"prompt": "a red heart", "seed": 7}')
    # the mark of a text file whose lines a program made objects of
    return {**values, "prompt": values["prompt"].lstrip("\ufeff")}


def _check_values(values: dict[str, Any]) -> None:
    """Raise UserError for an unknown field, and for a value that no model takes."""
    valid = (*REQUEST_FIELDS, *SamplingParams.model_fields)
    for name in values:
        if name not in valid:
            raise UserError(f"unknown field '{name}'{nearest_name(name, valid)}")
    check_prompts(values["prompt"])
    if values.get("negative_prompt") is not None:
        check_prompts([values["negative_prompt"]])
    check_counts(values.get("num_images", 1), 1, values.get("seed", 0))
