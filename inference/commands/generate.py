"""The commands generate, reconstruct and info."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from inference.attention_maps import word_positions
from inference.commands.options import (
    _parser,
    add_revision,
    add_sampling_options,
    add_speed_options,
    calibrate_threads,
    check_speed_options,
    choose_device,
    given_params,
)
from inference.commands.picture_files import _about, _free_name, _output_folder, _save_png, _slug
from inference.pipeline import TextToImage
from inference.requests import PromptRequest, check_counts, check_prompts, read_prompts
from inference.results import GenerationResult
from inference.sampling import SamplingParams
from inference.scoring.rerank import check_candidates
from tokenizer_image.images import (
    BadImageError,
    image_grid,
    open_image,
)
from tokenloom_common.errors import UserError, one_line
from tokenloom_common.progress import progress


def generate(argv: Sequence[str] | None = None) -> int:
    """`tokenloom generate`: one PNG a picture, a grid, and the files' names on stdout."""
    parser = _parser("generate", "Sample pictures for captions.",
                     '  tokenloom generate "a red heart" --model demo/model --out pictures\n'
                     '  tokenloom generate "a cat" --model demo/model --num-images 4 --guidance 2 --seed 7 --out pictures\n'
                     "  tokenloom generate --prompts prompts.jsonl --model demo/model --out pictures")
    parser.add_argument("prompt", nargs="*", help="one or more captions, each in quotes")
    parser.add_argument("--prompts", metavar="FILE", help="captions from a file instead: a caption a line, or .jsonl with "
                        'objects such as {"prompt": "a red heart", "seed": 7, "num_images": 2, "guidance_scale": 3}; what a '
                        "line does not say comes from the options")
    parser.add_argument("--model", required=True, help="model folder or hub id")
    add_revision(parser)
    parser.add_argument("--out", required=True, help="folder for the pictures; files there are never overwritten")
    parser.add_argument("--num-images", type=int, default=1, help="pictures per caption (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="picture i uses seed + i (default 0)")
    add_sampling_options(parser)
    parser.add_argument("--negative-prompt", help="what guidance leads away from (default: no caption)")
    parser.add_argument("--layout", help="for models with a layout: a picture (colours), or a .json file of class numbers, "
                        "row after row (default: sampled)")
    parser.add_argument("--attention", action="append", metavar="WORD", help="also save where the picture attended to "
                        "a word of the caption; may be given several times")
    parser.add_argument("--rerank-from", type=int, metavar="N", help="draw N candidates per caption and keep the --num-images "
                        "that a matcher finds to fit it best (needs --matcher)")
    parser.add_argument("--matcher", metavar="DIR", help="folder of a matcher (RUN/model of train_matcher), a CLIP or a SigLIP")
    parser.add_argument("--text-encoder", help="where the model's frozen text encoder is, if not where it was at training")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures decoded at a time (default 32)")
    add_speed_options(parser)
    parser.add_argument("--no-metadata", action="store_true", help="leave prompt, seed and parameters out of the PNG files")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    check_counts(args.num_images, args.batch_size, args.seed)
    _check_source(args)
    if (args.rerank_from is None) != (args.matcher is None):
        raise UserError("--rerank-from N and --matcher DIR belong together: N candidates, and what chooses among them")
    check_candidates(args.rerank_from, args.num_images)
    check_speed_options(args)
    layout = None if args.layout is None else _read_layout_file(args.layout)
    model = TextToImage.from_pretrained(args.model, device, args.revision, args.text_encoder, args.matcher, args.weights)
    params = given_params(args, model.default_params, args.guidance)
    requests = [] if args.prompts is None else read_prompts(
        Path(args.prompts), PromptRequest("", args.num_images, args.seed, None, args.negative_prompt, layout), params)
    if device == "cpu" and args.threads is None:
        pictures = sum(r.num_images for r in requests) or args.rerank_from or args.num_images
        calibrate_threads(model, min(args.batch_size, pictures), params)
    for prompt in args.prompt:
        for word in args.attention or []:  # a word that is not there is refused before anything is sampled
            word_positions(model.text_tokenizer, prompt, word)
    out = _output_folder(args.out)
    if args.prompts is not None:
        return _generate_file(model, requests, out, args)
    result = _generate_with_progress(model, args, params, layout)
    for path in _save_pictures(result, out, args):
        print(path)
    return 0


def _check_source(args: argparse.Namespace) -> None:
    """UserError unless captions come from the command line or from a file, and the options suit."""
    if args.prompts is None:
        check_prompts(args.prompt)
        return
    if args.prompt:
        raise UserError("captions and --prompts: give one of them")
    for name in ("attention", "rerank_from", "jacobi"):
        if getattr(args, name) not in (None, 1):
            raise UserError(f"--{name.replace('_', '-')} does not go with --prompts; give captions on the command line")


def _generate_file(model: TextToImage, requests: list[PromptRequest], out: Path, args: argparse.Namespace) -> int:
    """Pictures of a prompts file, saved as each ends; 1 if one could not be drawn."""
    total, failed = sum(request.num_images for request in requests), 0
    for picture in progress(model.generate_many(requests, args.batch_size), "generate", total=total, unit="picture"):
        if picture.image is None:
            print(f"tokenloom generate: '{picture.prompt[:60]}', seed {picture.seed}: {picture.reason}", file=sys.stderr)
            failed += 1
            continue
        path = _free_name(out, f"{_slug(picture.prompt)}-seed{picture.seed}")
        about = _about(args, picture.prompt, picture.seed, picture.params, picture.negative_prompt)
        _save_png(picture.image, path, None if args.no_metadata else about)
        print(path)
    return 1 if failed else 0


def _read_layout_file(name: str) -> Any:
    """A picture, or the numbers of a .json file."""
    path = Path(name)
    if path.suffix.lower() != ".json":
        try:
            return open_image(path)
        except (OSError, BadImageError) as error:
            raise UserError(f"--layout {name}: neither a picture nor a .json file ({one_line(error)})") from None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--layout {name}: cannot be read ({one_line(error)})") from None


def _generate_with_progress(model: TextToImage, args: argparse.Namespace, params: SamplingParams,
                            layout: Any) -> GenerationResult:
    """One prompt at a time, so that the bar moves."""
    parts = [model.generate(prompt, num_images=args.num_images, params=params, seed=args.seed, batch_size=args.batch_size,
                            negative_prompt=args.negative_prompt, layout=layout, rerank_from=args.rerank_from,
                            jacobi=args.jacobi)
             for prompt in progress(args.prompt, "generate", unit="caption")]
    layouts = [part.layouts for part in parts if part.layouts is not None]
    return GenerationResult([i for p in parts for i in p.images], torch.cat([p.image_tokens for p in parts]),
                            [t for p in parts for t in p.prompts], [s for p in parts for s in p.seeds], params,
                            torch.cat(layouts) if layouts else None, model,
                            None if args.rerank_from is None else [s for p in parts for s in p.scores or []])


def _save_pictures(result: GenerationResult, out: Path, args: argparse.Namespace) -> list[Path]:
    paths = []
    for number, (prompt, seed, picture) in enumerate(zip(result.prompts, result.seeds, result.images, strict=True)):
        info = None
        if not args.no_metadata:
            chosen = {"score": result.scores[number], "matcher": str(args.matcher)} if result.scores else {}
            info = _about(args, prompt, seed, result.params, args.negative_prompt, **chosen)
        path = _free_name(out, f"{_slug(prompt)}-seed{seed}")
        _save_png(picture, path, info)
        paths.append(path)
        for word in args.attention or []:
            path = _free_name(out, f"{_slug(prompt)}-seed{seed}-attention-{_slug(word)}")
            _save_png(result.attention_overlay(word, number), path)
            paths.append(path)
    if len(result.images) > 1:
        columns = min(args.num_images, 8) if args.num_images > 1 else min(len(result.images), 8)
        path = _free_name(out, "grid")
        _save_png(image_grid(result.images, columns=columns), path)
        paths.append(path)
    return paths


