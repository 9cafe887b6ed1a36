"""The work of `tokenloom generate`: sample images for captions, write them as PNG files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from inference.attention_maps import word_positions
from inference.commands.options import calibrate_threads, check_speed_options, given_params
from inference.commands.picture_files import make_folder, png_metadata, save_png, slug
from inference.model_folder import toolkit_version
from inference.pipeline import TextToImage
from inference.requests import (
    PromptRequest,
    check_counts,
    check_prompts,
    prompt_requests,
    read_prompt_lines,
)
from inference.results import GenerationResult
from inference.sampling import SamplingParams
from inference.scoring.rerank import check_candidates
from tokenizer_image.images import BadImageError, image_grid, open_image
from tokenloom_common.devices import choose_device
from tokenloom_common.errors import UserError, one_line
from tokenloom_common.outputs import BLOCK_BYTES, check_output_folder
from tokenloom_common.progress import progress
from tokenloom_common.text_files import read_text_file

GRID_COLUMNS = 8  # at most
DAMAGED = ("too many pixels", "truncated", "corrupt", "unreadable")  # reasons of a picture


def draw_captions(args: argparse.Namespace, out: Path) -> int:
    """Write one PNG per image and a grid into `out`, and print the files' names.

    1 if an image could not be drawn.
    """
    device = choose_device(args.device)
    _check_options(args)
    layout = None if args.layout is None else _read_layout_file(args.layout)
    prompt_lines = []
    if args.prompts is not None:
        prompt_lines = read_prompt_lines(Path(args.prompts))
        pictures = sum(line.values.get("num_images", args.num_images) for line in prompt_lines)
        check_output_folder("--out", out, need_bytes=pictures * BLOCK_BYTES)

    # all that can be refused without the model has been, since loading may take long
    model = TextToImage.from_pretrained(args.model, device, args.revision, args.text_encoder,
                                        args.matcher, args.weights)
    params = given_params(args, model.default_params, args.guidance)
    requests = []
    if args.prompts is not None:
        defaults = PromptRequest("", args.num_images, args.seed, None, args.negative_prompt, layout)
        requests = prompt_requests(Path(args.prompts), prompt_lines, defaults, params)
    # on the CPU the fastest number of threads depends on the rows of a step: measure it
    if device == "cpu" and args.threads is None:
        drawn_of_file = sum(request.num_images for request in requests)
        drawn = drawn_of_file or args.rerank_from or args.num_images
        calibrate_threads(model, min(args.batch_size, drawn), params)
    _check_attention_words(model, args)

    # made last before the work: a refused command leaves no empty folder
    make_folder(out)
    if args.prompts is not None:
        return _generate_file(model, requests, out, args)
    results = []
    # one caption at a time, so that the progress bar moves
    for prompt in progress(args.prompt, "generate", unit="caption"):
        results.append(model.generate(
            prompt, num_images=args.num_images, params=params, seed=args.seed,
            batch_size=args.batch_size, negative_prompt=args.negative_prompt, layout=layout,
            rerank_from=args.rerank_from, jacobi=args.jacobi))
    for path in _save_results(results, out, args):
        print(path)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that cannot be, or not together, before anything is loaded."""
    check_counts(args.num_images, args.batch_size, args.seed)
    if args.prompts == "":  # Path("") would be the working directory
        raise UserError("--prompts is empty; give a file")
    if args.prompts is None:
        check_prompts(args.prompt)
    elif args.prompt:
        raise UserError("captions and --prompts: give one of them")
    else:
        for name in ("attention", "rerank_from", "jacobi"):
            if getattr(args, name) not in (None, 1):  # 1: --jacobi's default
                raise UserError(f"--{name.replace('_', '-')} does not go with --prompts; "
                                "give captions on the command line")
    if (args.rerank_from is None) != (args.matcher is None):
        raise UserError("--rerank-from N and --matcher DIR belong together: "
                        "N candidates, and what chooses among them")
    check_candidates(args.rerank_from, args.num_images)
    check_speed_options(args)


def _check_attention_words(model: TextToImage, args: argparse.Namespace) -> None:
    """Raise UserError, before sampling, for a word of --attention that a caption does not have."""
    for prompt in args.prompt:
        for word in args.attention or []:
            word_positions(model.text_tokenizer, prompt, word)


def _read_layout_file(name: str) -> Any:
    """Read --layout: an image, or the numbers of a .json file."""
    path = Path(name)
    if path.suffix.lower() != ".json":
        try:
            return open_image(path, limit_name=None)
        except (OSError, BadImageError) as error:
            if isinstance(error, BadImageError) and error.reason in DAMAGED:
                raise UserError(f"--layout {error}") from None
            raise UserError(f"--layout {name}: neither a picture nor a .json file "
                            f"({one_line(error)})") from None
    text = read_text_file(path, f"--layout {name}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--layout {name}: cannot be read (not JSON: {error.msg}, line "
                        f"{error.lineno}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--layout {name}: cannot be read ({type(error).__name__})") from None


def _generate_file(model: TextToImage, requests: list[PromptRequest], out: Path,
                   args: argparse.Namespace) -> int:
    """Draw the images of a prompts file, and save each as it ends; 1 if one could not be drawn."""
    total = sum(request.num_images for request in requests)
    failed = False
    images = model.generate_many(requests, args.batch_size)
    for result in progress(images, "generate", total=total, unit="picture"):
        if result.image is None:  # the others of the file are drawn all the same
            which = f"'{result.prompt[:60]}', seed {result.seed}"
            print(f"tokenloom generate: {which}: {result.reason}", file=sys.stderr)
            failed = True
            continue
        info = _metadata(args, result.prompt, result.seed, result.params, result.negative_prompt)
        path = save_png(result.image, out, f"{slug(result.prompt)}-seed{result.seed}", info)
        print(path)
    return 1 if failed else 0


def _metadata(args: argparse.Namespace, prompt: str, seed: int, params: SamplingParams,
              negative_prompt: str | None, score: float | None = None) -> PngInfo | None:
    """Return what is needed to draw an image again, as PNG metadata; None with --no-metadata."""
    if args.no_metadata:
        return None
    values = {"prompt": prompt, "seed": seed, **params.plain(), "model": str(args.model)}
    if args.revision:
        values["revision"] = args.revision
    if args.weights:
        values["weights"] = args.weights
    if negative_prompt is not None:
        values["negative_prompt"] = negative_prompt
    if score is not None:
        values["score"] = score  # a score means nothing without its matcher
        values["matcher"] = str(args.matcher)
    values["tokenloom"] = toolkit_version()
    values["digitalSourceType"] = "trainedAlgorithmicMedia"  # IPTC's term for generated images
    return png_metadata(values)


def _save_results(results: list[GenerationResult], out: Path,
                  args: argparse.Namespace) -> list[Path]:
    """Write all images, their attention overlays, and a grid if there are several images."""
    paths: list[Path] = []

    def save(image: Image.Image, stem: str, info: PngInfo | None = None) -> None:
        paths.append(save_png(image, out, stem, info))

    images: list[Image.Image] = []
    for result in results:
        images += result.images
        for number, image in enumerate(result.images):
            prompt, seed = result.prompts[number], result.seeds[number]
            score = None if result.scores is None else result.scores[number]
            stem = f"{slug(prompt)}-seed{seed}"
            info = _metadata(args, prompt, seed, result.params, args.negative_prompt, score)
            save(image, stem, info)
            for word in args.attention or []:
                save(result.attention_overlay(word, number), f"{stem}-attention-{slug(word)}")

    if len(images) > 1:
        # a row of the grid per caption, or all in a row if each has one image
        per_row = args.num_images if args.num_images > 1 else len(images)
        save(image_grid(images, columns=min(per_row, GRID_COLUMNS)), "grid")
    return paths
