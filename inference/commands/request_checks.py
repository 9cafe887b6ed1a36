"""Checks of what `tokenloom generate` is to draw, of all of it before anything is drawn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from inference.commands.redraw import Origin
from inference.generation.drawing import count_branches
from inference.layouts import read_layout
from inference.pipeline import TextToImage
from inference.requests import (
    AskedRequest,
    PromptLine,
    PromptRequest,
    check_counts,
    check_options,
    check_prompts,
)
from tokenloom_common.errors import UserError


def check_requests(model: TextToImage, wanted: Sequence[AskedRequest], args: argparse.Namespace,
                   lines: Sequence[PromptLine], origin: Origin | None) -> None:
    """Raise UserError for a request that the model cannot draw.

    It names the line of a prompts file, or the picture that is drawn again.
    """
    for number, one in enumerate(wanted):
        try:
            _check_request(model, one.request, args)
        except UserError as error:
            if lines:  # one request per line
                raise UserError(f"{args.prompts}, line {lines[number].number}: {error}") from None
            if origin is not None:
                raise UserError(f"{origin.name}: {error}") from None
            raise


def _check_request(model: TextToImage, request: PromptRequest, args: argparse.Namespace) -> None:
    drawn = args.rerank_from or request.num_images
    check_prompts(request.prompt)
    check_counts(drawn, args.batch_size, request.seed)
    options = check_options(request.params, model.default_params, request.negative_prompt,
                            request.layout)
    config = model.seq2seq.config
    layout = read_layout(request.layout, config, drawn)

    if args.prompts is None:
        return
    # of a prompts file, --batch-size counts rows
    if count_branches(options.params, config, layout is not None) > args.batch_size:
        scale = options.params.guidance_scale
        raise UserError(f"a picture under guidance (guidance_scale {scale:g}) takes 2 rows of the "
                        "batch; give --batch-size 2 or more, or guidance_scale 1")
