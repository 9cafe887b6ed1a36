"""Options of `tokenloom generate` that do not go together, and the file of --layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from inference.commands.options import check_speed_options
from inference.requests import check_counts, check_prompts
from inference.scoring.rerank import check_candidates
from tokenizer_image.images import BadImageError, open_image
from tokenloom_common.errors import UserError, one_line
from tokenloom_common.text_files import read_text_file

DAMAGED = ("too many pixels", "truncated", "corrupt", "unreadable")  # reasons of a picture


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that cannot be, or not together, before anything is loaded."""
    check_counts(args.num_images, args.batch_size, args.seed or 0)
    if args.prompts == "":  # Path("") would be the working directory
        raise UserError("--prompts is empty; give a file")
    if args.from_image is not None and args.prompts is not None:
        raise UserError("--from-image and --prompts: give one of them")
    if args.from_image is not None and args.expand is not None and not args.prompt:
        raise UserError("--expand and --from-image: a picture's own prompt is not expanded; give a "
                        "caption beside it, or leave --expand out")
    if args.prompts is not None:
        _check_prompts_file(args)
    elif args.prompt or args.from_image is None:
        check_prompts(args.prompt)

    has_matcher = args.matcher is not None
    if args.rerank_from is not None and not has_matcher and args.from_image is None:
        raise UserError("--rerank-from N and --matcher DIR belong together: "
                        "N candidates, and what chooses among them")
    if args.rerank_from is None and has_matcher:
        raise UserError("--rerank-from N and --matcher DIR belong together: "
                        "N candidates, and what chooses among them")
    check_candidates(args.rerank_from, args.num_images)
    check_speed_options(args)


def _check_prompts_file(args: argparse.Namespace) -> None:
    if args.prompt:
        raise UserError("captions and --prompts: give one of them")
    refused = {"--attention": args.attention is not None,
               "--rerank-from": args.rerank_from is not None,
               "--jacobi": args.jacobi != 1, "--grid": args.grid}
    for name, is_given in refused.items():
        if is_given:
            raise UserError(f"{name} does not go with --prompts; give captions on the command line")


def read_layout_file(name: str) -> Any:
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
