"""Facts that LlamaGen's weights do not hold: its own config, the grid of codes, class names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import ConfigDict

from inference.checkpoints.options import ConvertOptions
from seq2seq import ClassLabels, ClassLabelsConfig
from seq2seq.positions import ROTARY_BASE
from tokenizer_image import ImageTokenizer
from tokenloom_common.config import StrictConfig, read_mapping
from tokenloom_common.errors import UserError, nearest_name
from tokenloom_common.text_files import read_text_file, text_lines

PIXELS_PER_CODE = 16  # of VQ-16, which all published transformers were trained with
_OTHER_ARGS = (
    "multiple_of", "ffn_dim_multiplier", "initializer_range", "token_dropout_p", "attn_dropout_p",
    "resid_dropout_p", "ffn_dropout_p", "drop_path_rate", "num_classes", "caption_dim",
    "class_dropout_prob", "model_type", "max_batch_size", "max_seq_len", "config")
"""Keys of its config that concern training, or that the shapes imply; not read."""


class ModelArgs(StrictConfig):
    """LlamaGen's own config: facts beside the shapes, and values to compare with the shapes."""

    # a config.json of the Hub wrapper holds further keys; `of` refuses unknown ones of a given file
    model_config = ConfigDict(extra="ignore")

    n_head: int | None = None
    n_kv_head: int | None = None
    block_size: int | None = None
    rope_base: float = ROTARY_BASE
    norm_eps: float = 1e-5  # the default of its code
    dim: int | None = None
    n_layer: int | None = None
    vocab_size: int | None = None
    cls_token_num: int | None = None

    @classmethod
    def of(cls, source: Path, config: Path | None) -> ModelArgs:
        """Read `config`, else the config.json in a Hub wrapper's folder, else defaults.

        UserError for a value that our models cannot have, and for an unknown key in `config`.
        """
        path = config or source / "config.json"
        if config is None and not path.is_file():
            return cls()
        values = read_mapping(path)
        if config is not None:  # written by hand: a typing error is likelier than another release
            valid = (*cls.model_fields, *_OTHER_ARGS)
            for name in values:
                if name not in valid:
                    raise UserError(f"{path}: unknown key '{name}'{nearest_name(name, valid)}")

        inner = values.get("config")  # huggingface_hub's mixin nests an argument of that name
        args = cls.parse(inner if isinstance(inner, dict) else values, str(path))
        if args.rope_base != ROTARY_BASE:
            raise UserError(f"{path}: rope_base {args.rope_base:g}; our rotary positions have "
                            f"{ROTARY_BASE:g} alone")
        return args

    def compare(self, implied: Mapping[str, int], path: Path) -> None:
        """UserError if a stated field differs from the value that the weights in `path` imply."""
        for name, value in implied.items():
            stated = getattr(self, name)
            if stated not in (None, value):
                raise UserError(f"{path}: its weights have {name} {value}, its config says "
                                f"{stated}; give the config of these weights")


def choose_grid(tokenizer: ImageTokenizer | None, args: ModelArgs, options: ConvertOptions,
                path: Path) -> tuple[tuple[int, int], tuple[str, ...]]:
    """The grid of codes by block_size, image tokenizer or resolution, and a note if assumed.

    UserError where they differ or none is given.
    """
    side = _side(args, options.config or path)
    if options.resolution is not None:
        _check_resolution(options, tokenizer)
    # the image tokenizer decides: its codes are those that will be drawn
    if tokenizer is not None:
        return _grid_of(tokenizer, side, options)

    if side is not None:
        pixels = side * PIXELS_PER_CODE
        if options.resolution not in (None, pixels):
            raise UserError(f"--resolution {options.resolution}: its config's block_size "
                            f"{args.block_size} is {side} x {side} codes, {pixels} px; leave "
                            "--resolution out")
        return (side, side), ()
    if options.resolution is None:
        raise UserError(f"{path}: does not say its grid of codes; give --image-tokenizer DIR, "
                        "--resolution PIXELS, or --config FILE with block_size")
    side = options.resolution // PIXELS_PER_CODE
    note = (f"grid {side} x {side}: {options.resolution} px at {PIXELS_PER_CODE} px a code, as "
            "VQ-16 has them")
    return (side, side), (note,)


def _side(args: ModelArgs, path: Path) -> int | None:
    """Codes per side by block_size, the number of image tokens; None if it is not stated."""
    if args.block_size is None:
        return None
    side = math.isqrt(max(0, args.block_size))  # isqrt refuses negative numbers
    if side == 0 or side * side != args.block_size:
        raise UserError(f"{path}: block_size {args.block_size} is not a square of codes")
    return side


def _check_resolution(options: ConvertOptions, tokenizer: ImageTokenizer | None) -> None:
    resolution = options.resolution or 0  # for mypy: the caller has checked for None
    if tokenizer is not None and tokenizer.config.resolution != resolution:
        raise UserError(f"--resolution {resolution}: {options.image_tokenizer} is for "
                        f"{tokenizer.config.resolution} px; convert it with --resolution "
                        f"{resolution} too")
    if resolution % PIXELS_PER_CODE:
        raise UserError(f"--resolution {resolution}: not a multiple of {PIXELS_PER_CODE} pixels, "
                        "the side of a code")


def _grid_of(tokenizer: ImageTokenizer, side: int | None, options: ConvertOptions
             ) -> tuple[tuple[int, int], tuple[str, ...]]:
    rows, columns = tokenizer.grid
    # its rotary positions are built for a square
    if rows != columns or side not in (None, rows):
        wanted = "square" if side is None else f"{side} x {side}"
        raise UserError(f"{options.image_tokenizer}: its grid is {rows} x {columns}, the "
                        f"transformer's is {wanted}; give the image tokenizer for that resolution")
    if side is not None:
        return (rows, columns), ()
    return (rows, columns), (f"grid {rows} x {columns}: the image tokenizer's; the file does not "
                             "say it",)


def read_classes(path: Path | None, count: int) -> ClassLabels:
    """`count` class names from a file with one per line; numbers for None. UserError otherwise."""
    if path is None:
        return ClassLabels(ClassLabelsConfig(classes=tuple(map(str, range(count)))))
    lines = text_lines(read_text_file(path, f"--classes {path}"))
    if len(lines) != count:
        raise UserError(f"--classes {path}: has {len(lines):,} lines, the transformer {count:,} "
                        "classes; give one name a line")

    names = [line.strip() for line in lines]
    first_lines: dict[str, int] = {}  # by name without case, as captions are matched
    for number, name in enumerate(names, start=1):
        first = first_lines.setdefault(name.casefold(), number)
        if not name or first != number:
            problem = f"'{name}' again (line {first})" if name else "empty"
            raise UserError(f"--classes {path}, line {number}: {problem}; names must differ, also "
                            "in lower case")
    return ClassLabels(ClassLabelsConfig(classes=tuple(names)))
