"""Command-line options shared by the sampling commands."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tokenloom_common.errors import OneLineParser, UserError
from tokenloom_common.outputs import check_output_folder
from tokenloom_common.processor import free_cores

if TYPE_CHECKING:
    from inference.pipeline import TextToImage
    from inference.sampling import SamplingParams

# Imports of torch are inside the functions: a parser is made before it is known that the command
# can run.
Step = Callable[[], object]
MAX_THREADS = 4096  # also the largest Jacobi window
WEIGHTS = ("float32", "bfloat16", "int8")
"""Names of `inference.decoder.projection.Precision`."""


def command_parser(name: str, description: str, examples: str) -> OneLineParser:
    """Return the parser of `tokenloom NAME`, whose help ends with examples."""
    return OneLineParser(prog=f"tokenloom {name}", description=description,
                         epilog=f"examples:\n{examples}", allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add --revision, beside an option that takes a hub id."""
    parser.add_argument("--revision", help="branch, tag or commit of a hub id (default: main)")


def caption_text(argument: str) -> str:
    """Return a caption of the command line, decoded as UTF-8 whatever the locale says.

    Under LC_ALL=C Python takes other bytes than ASCII for surrogates, which no model knows.
    """
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:  # no UTF-8 either: the text tokenizer replaces what it does not know
        return argument


def check_pictures_folder(out: str, model: str | None, need_bytes: int) -> Path:
    """Return --out. UserError if pictures cannot be written there, or it is the model's own folder.

    A model folder with other files in it could not be replaced by a later export. model: None for
    the one that ships with Tokenloom.
    """
    folder = check_output_folder("--out", out, need_bytes=need_bytes)
    if model is None:
        return folder
    is_model = any((Path(model) / name).is_file() for name in ("model_index.json", "config.json"))
    if model and is_model:
        place = folder.resolve()
        model_place = Path(model).resolve()
        if place == model_place or model_place in place.parents:
            raise UserError(f"--out {out}: lies in the model's folder {model}; give another folder")
    return folder


# ---- speed


def add_speed_options(parser: OneLineParser) -> None:
    """Add options for speed; the images stay the same, up to the rounding of --weights."""
    parser.add_argument(
        "--weights", choices=WEIGHTS, help="of the generator (default: float32 on the "
        "CPU, bfloat16 on CUDA); int8 is smaller and faster, and rounds")
    parser.add_argument(
        "--jacobi", type=int, default=1, metavar="W", help="work on W tokens at once: the same "
        "pictures in fewer steps; 8 to 16 pays for one picture at a time (default 1: one after "
        "another)")
    parser.add_argument(
        "--threads", type=int, help="CPU threads (default: what a short measurement finds fastest)")


def check_speed_options(args: argparse.Namespace) -> None:
    """Raise UserError for an impossible value, and set torch's threads: --threads, else at most
    the cores that are free."""
    for name in ("jacobi", "threads"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MAX_THREADS:
            raise UserError(f"--{name} {value} must be 1 to {MAX_THREADS:,}")

    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    else:
        torch.set_num_threads(min(torch.get_num_threads(), free_cores()))


def calibrate_threads(model: TextToImage, rows: int) -> None:
    """Set torch's threads, which are the most, to the fastest number for a step of these rows."""
    import torch

    from inference.decoder.calibration import fastest_threads

    most = torch.get_num_threads()
    if most > 1:
        make_step, key = thread_trial(model, rows, most)
        fastest_threads(make_step, most, key)


def thread_trial(model: TextToImage, rows: int, most: int) -> tuple[Callable[[], Step], str]:
    """Return what makes a decoder step to time thread counts by, and the key of the fastest one.

    The step is halfway down a meaningless image, and has `rows` rows rounded up to a power of two,
    so that few numbers of rows are ever measured.
    """
    import torch

    from inference.decoder.choices import threads_key
    from inference.requests import text_like

    rows = 1 << (rows - 1).bit_length()
    decoder = model.decoder
    config = decoder.config
    key = threads_key(f"{config.plain()}, {model.weights} weights", rows, most)

    def make_step() -> Step:
        text = text_like(model.text_tokenizer.null_caption(), model.seq2seq.image_embedding.weight)
        groups = [decoder.prefill(text, rows)]
        cache = decoder.new_cache(groups)
        previous = torch.zeros(rows, dtype=torch.int64, device=decoder.device)
        # halfway: attention over a growing cache makes this step about the average one
        position = max(1, config.num_tokens // 2)
        return partial(decoder.decode_one, previous, position, groups, cache)

    return make_step, key


# ---- sampling


def add_sampling_options(parser: OneLineParser, several_scales: bool = False) -> None:
    """Add the options that `given_params` reads; each replaces the model folder's own default."""
    parser.add_argument(
        "--top-k", type=int,
        help="keep the k likeliest tokens; 0 = all (default: the model folder's)")
    parser.add_argument(
        "--top-p", type=float,
        help="keep the likeliest tokens up to this mass (default: the model folder's)")
    parser.add_argument(
        "--min-p", type=float,
        help="drop tokens below this share of the likeliest (default: the model's)")
    parser.add_argument(
        "--temperature", type=float,
        help="0 = always the likeliest token (default: the model folder's)")
    if several_scales:
        parser.add_argument(
            "--guidance", type=float, nargs="+", metavar="SCALE", help="guidance scale, 1 = off; "
            "with several, everything is sampled at each (default: the model folder's)")
    else:
        parser.add_argument(
            "--guidance", type=float, help="guidance scale; 1 = off (default: the model folder's)")
    parser.add_argument(
        "--guidance-schedule", help="constant, linear or cosine (default: the model folder's)")
    parser.add_argument(
        "--guidance-power", type=float, help="of the cosine schedule (default: the model folder's)")
    parser.add_argument(
        "--guidance-end", type=float, help="share of the tokens, from the first, that guidance "
        "acts on; the rest takes half the work (default: the model folder's)")


def given_params(args: argparse.Namespace, defaults: SamplingParams,
                 guidance: float | None) -> SamplingParams:
    """Return `defaults` with what the command line changes. UserError for a value out of range."""
    from inference.sampling import SamplingParams

    values = defaults.plain()
    # guidance is an argument, since --guidance may be a list (several_scales)
    if guidance is not None:
        values["guidance_scale"] = guidance
    for name in ("guidance_schedule", "guidance_power", "guidance_end", "top_k", "temperature",
                 "top_p", "min_p"):
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    return SamplingParams.parse(values, "sampling options")
