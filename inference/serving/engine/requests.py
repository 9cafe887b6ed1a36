"""Checks of a request before it is queued; no weights are needed for them."""

from __future__ import annotations

from inference.generation.drawing import count_branches
from inference.layouts import read_layout
from inference.memory.available import available_memory
from inference.memory.estimate import check_fits
from inference.requests import check_counts, check_options, check_prompts, is_count
from inference.serving.engine.jobs import MAX_PARTIAL_IMAGES, EngineRequest
from inference.serving.engine.models import Models
from tokenloom_common.errors import UserError


def check_request(models: Models, request: EngineRequest) -> None:
    """Raise UserError for a request that can never be drawn; UnknownModelError for its model."""
    served = models[request.model]
    models.check_budget(request.model)
    asked = request.request
    check_prompts(asked.prompt)
    check_counts(asked.num_images, 1, asked.seed)
    options = check_options(asked.params, served.defaults, asked.negative_prompt, asked.layout)
    # before a layout of so many rows is made
    each = served.needs.results // models.options.rows
    check_fits(asked.num_images * each, available_memory("cpu"),
               f"keeping all pictures ({asked.num_images:,})", "ask for fewer pictures at once")
    read_layout(asked.layout, served.config, asked.num_images)

    rows = models.options.rows
    if count_branches(options.params, served.config, asked.layout is not None) > rows:
        raise UserError(f"guidance_scale {options.params.guidance_scale:g} needs 2 rows, and the "
                        f"server draws in {rows}; turn guidance off (1), or serve with more rows")
    partial_images = request.partial_images
    if not is_count(partial_images, 0) or partial_images > MAX_PARTIAL_IMAGES:
        raise UserError(f"partial_images must be 0 to {MAX_PARTIAL_IMAGES}, "
                        f"got {partial_images!r}")
