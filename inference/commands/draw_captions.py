"""The work of `tokenloom generate`: sample images for captions, write them with their recipes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from inference.attention_maps import word_positions
from inference.commands.draw_options import check_options, read_layout_file
from inference.commands.hook_options import (
    checked_safety,
    hooked_requests,
    load_hooks,
    refused_images,
)
from inference.commands.options import calibrate_threads, check_pictures_folder, given_params
from inference.commands.picture_files import make_folder
from inference.commands.picture_output import PictureOutput, check_grid
from inference.commands.redraw import (
    Origin,
    read_origin,
    redrawn_requests,
    take_from,
    warn_of_other_model,
)
from inference.commands.request_checks import check_requests
from inference.hooks.applied import Hooks
from inference.image_files.recipe import Recipe
from inference.picture_recipes import RecipeMaker
from inference.pipeline import TextToImage
from inference.requests import (
    AskedRequest,
    PromptLine,
    PromptRequest,
    prompt_requests,
    read_prompt_lines,
)
from inference.sampling import SamplingParams
from inference.shipped import DEFAULT_NAME
from tokenloom_common.devices import choose_device
from tokenloom_common.outputs import BLOCK_BYTES, check_output_folder
from tokenloom_common.progress import progress


def draw_captions(args: argparse.Namespace, out: Path) -> int:
    """Write one file per image into `out`, and print the files' names.

    1 if an image could not be drawn, or was refused.
    """
    device = choose_device(args.device)
    check_options(args)
    safety = checked_safety(args)
    layout = None if args.layout is None else read_layout_file(args.layout)
    prompt_lines = _read_prompts(args, out)
    origin = None
    if args.from_image is not None:
        origin = read_origin(args.from_image)
        take_from(origin, args)
        check_pictures_folder(args.out, args.model, BLOCK_BYTES)  # the model is known only now

    # all that can be refused without the model has been, since loading may take long
    model = TextToImage.from_pretrained(args.model, device, args.revision, args.text_encoder,
                                        args.matcher, args.weights)
    maker = RecipeMaker(model, args.model, args.revision, args.matcher)
    if origin is not None:
        warn_of_other_model(origin, maker.fingerprint)
    params = given_params(args, model.default_params, args.guidance)
    wanted = _requests(args, params, layout, prompt_lines, origin)
    check_requests(model, wanted, args, prompt_lines, origin)
    hooks = load_hooks(args, safety, model, "tokenloom generate")
    allowed = hooked_requests(wanted, hooks, model)
    if not allowed:  # each refusal has been said
        return 1
    recipes = [maker.recipes(one.request, one.asked_prompt) for one in allowed]
    _check_attention_words(model, allowed, args.attention or [])
    output_format = args.output_format or "png"
    if args.grid:
        of_all = [recipe for of_request in recipes for recipe in of_request]
        check_grid(of_all, model.image_tokenizer.config.resolution, output_format)
    _set_threads(model, allowed, args, device)
    if args.model is None:
        side = model.image_tokenizer.config.resolution
        print(f"tokenloom generate: drawn by the model that ships with Tokenloom ({DEFAULT_NAME}, "
              f"{side} px); see --help for what can be chosen, `tokenloom train` for a model of "
              "your own", file=sys.stderr)

    # made last before the work: a refused command leaves no empty folder
    make_folder(out)
    output = PictureOutput(out, output_format, not args.no_metadata, origin, args.grid)
    if args.prompts is not None:
        requests = [one.request for one in allowed]
        is_whole = _draw_file(model, requests, recipes, output, hooks, args)
    else:
        is_whole = _draw_each(model, allowed, maker, output, hooks, args)
    return 0 if is_whole and len(allowed) == len(wanted) else 1


def _read_prompts(args: argparse.Namespace, out: Path) -> list[PromptLine]:
    """Read --prompts, and check that there is room for its pictures; nothing without it."""
    if args.prompts is None:
        return []
    lines = read_prompt_lines(Path(args.prompts))
    pictures = sum(line.values.get("num_images", args.num_images) for line in lines)
    check_output_folder("--out", out, need_bytes=pictures * BLOCK_BYTES)
    return lines


def _requests(args: argparse.Namespace, params: SamplingParams, layout: Any,
              lines: list[PromptLine], origin: Origin | None) -> list[AskedRequest]:
    """Return what is to be drawn."""
    if origin is not None:
        return redrawn_requests(origin, args, layout)
    defaults = PromptRequest("", args.num_images, args.seed or 0, params, args.negative_prompt,
                             layout)
    if args.prompts is None:
        return [AskedRequest(replace(defaults, prompt=prompt), prompt) for prompt in args.prompt]
    requests = prompt_requests(Path(args.prompts), lines, defaults, params)
    return [AskedRequest(request, request.prompt) for request in requests]


def _check_attention_words(model: TextToImage, allowed: list[AskedRequest],
                           words: list[str]) -> None:
    """Raise UserError, before sampling, for a word of --attention that a caption does not have."""
    for one in allowed:
        for word in words:
            word_positions(model.text_tokenizer, one.request.prompt, word)


def _set_threads(model: TextToImage, allowed: list[AskedRequest],
                 args: argparse.Namespace, device: str) -> None:
    """On the CPU, unless --threads is given, measure and set the fastest number of threads."""
    if device != "cpu" or args.threads is not None:
        return
    branches = []  # rows of one picture of each request
    for one in allowed:
        params = one.request.params or model.default_params
        branches.append(1 if params.guidance_scale == 1 else 2)

    if args.prompts is None:  # one request after another, in batches of pictures
        rows = branches[0] * min(args.batch_size, args.rerank_from or args.num_images)
    else:  # all requests in one batch of rows
        needed = sum(count * one.request.num_images
                     for count, one in zip(branches, allowed, strict=True))
        rows = min(args.batch_size, needed)
    calibrate_threads(model, rows)


def _draw_each(model: TextToImage, allowed: list[AskedRequest], maker: RecipeMaker,
               output: PictureOutput, hooks: Hooks, args: argparse.Namespace) -> bool:
    """Draw one request after another, save its images, their attention overlays, and the grid.

    False if an image was refused.
    """
    is_whole = True
    for request, asked_prompt in progress(allowed, "generate", unit="caption"):
        result = model.generate(
            request.prompt, num_images=request.num_images, params=request.params,
            seed=request.seed, batch_size=args.batch_size, negative_prompt=request.negative_prompt,
            layout=request.layout, rerank_from=args.rerank_from, jacobi=args.jacobi)
        recipes = maker.of_seeds(request, result.seeds, result.scores, asked_prompt)
        refused = refused_images(result.images, asked_prompt, result.seeds, hooks)
        for number, (image, recipe) in enumerate(zip(result.images, recipes, strict=True)):
            if refused[number]:
                is_whole = False
                continue
            output.save(image, recipe)
            for word in args.attention or []:
                output.save_overlay(result.attention_overlay(word, number), recipe, word)
    if args.grid:
        output.save_grid()
    return is_whole


def _draw_file(model: TextToImage, requests: list[PromptRequest], recipes: list[list[Recipe]],
               output: PictureOutput, hooks: Hooks, args: argparse.Namespace) -> bool:
    """Draw the images of a prompts file that are not there, and save each as it ends.

    False if one could not be drawn, or was refused.
    """
    total = sum(len(of_request) for of_request in recipes)
    requests, recipes = output.missing(requests, recipes)
    left = sum(len(of_request) for of_request in recipes)
    if left < total:
        print(f"tokenloom generate: {total - left} of {total} there already", file=sys.stderr)
    if not left:
        return True

    is_whole = True
    images = model.generate_many(requests, args.batch_size)
    for result in progress(images, "generate", total=left, unit="picture"):
        if result.image is None:  # the others of the file are drawn all the same
            which = f"'{result.prompt[:60]}', seed {result.seed}"
            print(f"tokenloom generate: {which}: {result.reason}", file=sys.stderr)
            is_whole = False
            continue
        recipe = recipes[result.request][result.index]
        if any(refused_images([result.image], recipe.prompt, [result.seed], hooks)):
            is_whole = False
            continue
        output.save(result.image, recipe)
    return is_whole
