"""A recipe as the text that AUTOMATIC1111's web UI writes, which common viewers show.

    PROMPT
    Negative prompt: TEXT
    Steps: 256, Sampler: Autoregressive, CFG scale: 2.0, Seed: 7, Size: 64x64, ...

It is for viewers alone: a prompt whose own line begins with `Negative prompt:` is ambiguous there.
Tokenloom reads its JSON.
"""

from __future__ import annotations

import json
from typing import Any

from inference.image_files.recipe import Recipe


def infotext(recipe: Recipe, size: tuple[int, int]) -> str:
    """Return the text of one image of `size` (width, height), without NULs and lone surrogates."""
    lines = [recipe.drawn_prompt]
    if recipe.negative_prompt is not None:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    fields = _fields(recipe, size)
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items()
                           if value is not None))
    text = "\n".join(lines).replace("\0", "")
    # no encoding of Unicode has lone surrogates, which a command line can bring
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _fields(recipe: Recipe, size: tuple[int, int]) -> dict[str, Any]:
    """Return the last line's fields: those of A1111 first, then ours."""
    params = recipe.params
    version = recipe.extra.get("tokenloom")
    schedule = params.guidance_schedule
    return {
        # an image token is a step of the decoder
        "Steps": recipe.extra.get("image_tokens", 1),
        "Sampler": "Autoregressive",
        "CFG scale": params.guidance_scale,
        "Seed": recipe.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": recipe.model_fingerprint,
        "Model": recipe.model,
        "Temperature": params.temperature,
        "Top k": params.top_k,
        "Top p": params.top_p,
        "Min p": params.min_p,
        "CFG schedule": None if schedule == "constant" else schedule,
        "CFG power": None if params.guidance_power == 1 else params.guidance_power,
        "CFG end": None if params.guidance_end == 1 else params.guidance_end,
        "Original prompt": None if recipe.revised_prompt is None else recipe.prompt,
        "Version": None if version is None else f"Tokenloom {version}",
    }


def _quoted(value: Any) -> str:
    """Return a value as A1111's parser reads it: as a JSON string if it holds `,`, `:` or a line's
    end."""
    text = str(value)
    if any(mark in text for mark in ",:\n"):
        return json.dumps(text, ensure_ascii=False)
    return text
