"""`tokenloom estimate`: predict the memory of sampling, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inference.commands.options import add_revision
from inference.memory.available import available_memory
from inference.memory.estimate import MemoryEstimate, Workload, estimate, largest_batch
from inference.memory.parts import WEIGHT_BYTES
from inference.memory.sizes import MIB, PRESET_SIZES, bytes_of, grid_of, human
from inference.model_folder import GENERATION_NAME, read_model_index
from inference.requests import check_counts
from inference.sampling import SamplingParams
from seq2seq import (
    PRESETS,
    TRANSFORMER_KINDS,
    FrozenTextConfig,
    FrozenTextEncoder,
    TransformerConfig,
)
from tokenizer_image.config import ImageTokenizerConfig
from tokenizer_image.kinds import IMAGE_TOKENIZERS
from tokenloom_common.config import read_mapping
from tokenloom_common.devices import choose_device
from tokenloom_common.errors import OneLineParser, UserError, choose
from tokenloom_common.pretrained import read_config, resolve_folder

PARTS = ("weights", "image_tokenizer", "self_cache", "caption_memory", "working", "pictures",
         "results")


@dataclass(frozen=True)
class _Configs:
    """The configs to estimate from; `not_counted` names each part that the estimate leaves out."""

    transformer: TransformerConfig
    tokenizer: ImageTokenizerConfig | None
    generation: SamplingParams
    not_counted: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of bytes, and how many images at a time fit."""
    args = _parser().parse_args(argv)
    check_counts(args.num_images, args.batch_size, 0)
    memory, source = _memory_to_fit(args.memory, args.device)
    # a folder of the same name is the user's own and goes first
    is_preset = args.model in PRESETS and not Path(args.model).is_dir()
    configs = _preset_configs(args) if is_preset else _folder_configs(args)
    params = configs.generation
    if args.guidance is not None:
        changed = {**params.plain(), "guidance_scale": args.guidance}
        params = SamplingParams.parse(changed, "--guidance")

    # 1 prompt: `generate` samples one caption at a time
    work = Workload.of_request(1, args.num_images, args.batch_size,
                               guided=params.guidance_scale != 1, weights=args.dtype)
    needs = estimate(configs.transformer, configs.tokenizer, work)
    fits = largest = None
    if memory is not None:
        fits = needs.total <= memory
        largest = largest_batch(configs.transformer, configs.tokenizer, work, memory)
    parts = asdict(needs)
    report = {
        "model": str(args.model), "num_images": args.num_images, "batch_size": args.batch_size,
        "dtype": args.dtype, "guidance_scale": params.guidance_scale, "rows": needs.rows,
        "pictures_at_once": needs.pictures_at_once,
        "bytes": {**{part: parts[part] for part in PARTS}, "total": needs.total},
        "memory": memory, "memory_source": source, "fits": fits, "largest_batch": largest,
        "not_counted": configs.not_counted}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, needs)
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="tokenloom estimate", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Say how much memory sampling needs, before anything is loaded, and how many "
        "pictures at a time fit.",
        epilog="examples:\n  tokenloom estimate demo/model --num-images 8 --memory 8GiB\n"
               "  tokenloom estimate parti-3b --dtype int8 --grid 32x32 --codebook-size 8192 "
               "--text-length 128\n"
               "of a training run (with --help: its own options):\n"
               "  tokenloom estimate --config training/recipes/small_seq2seq.yaml --gpus 8 "
               "--gpu H100")
    parser.add_argument(
        "model",
        help="model folder, hub id (its config files alone are fetched), or a preset's name")
    add_revision(parser)
    parser.add_argument(
        "--num-images", type=int, default=1, help="pictures of a caption (default 1)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="pictures drawn at a time (default 32)")
    parser.add_argument(
        "--guidance", type=float, help="guidance scale; 1 = off (default: the model folder's)")
    parser.add_argument(
        "--dtype", choices=list(WEIGHT_BYTES), default="float32", help="of weights and caches; "
        "int8: of the decoder's matrices, with float32 caches (default float32)")
    parser.add_argument(
        "--memory", help="memory to fit into, such as 8GiB (default: what this machine has left)")
    parser.add_argument(
        "--device",
        help="whose memory, without --memory: cpu, cuda (default: the GPU when there is one)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")

    sizes = parser.add_argument_group("what a preset leaves open")
    defaults = PRESET_SIZES
    sizes.add_argument(
        "--grid", help=f"rows x columns of image tokens (default {defaults['grid']})")
    sizes.add_argument(
        "--codebook-size", type=int, help=f"codes (default {defaults['codebook_size']})")
    sizes.add_argument(
        "--text-length", type=int, help=f"text ids a caption (default {defaults['text_length']})")
    sizes.add_argument(
        "--vocab-size", type=int,
        help=f"entries of the text tokenizer (default {defaults['vocab_size']})")
    return parser


def _memory_to_fit(text: str | None, device: str | None) -> tuple[int | None, str]:
    """Return the bytes to fit into (None = unknown), and where the number is from."""
    if text is None:
        device = choose_device(device)
        return available_memory(device), device
    if device is not None:
        raise UserError("--memory and --device: the one says how much memory there is, "
                        "the other where to look; give one")
    return bytes_of(text), "--memory"


def _preset_configs(args: argparse.Namespace) -> _Configs:
    if args.revision is not None:
        raise UserError(
            f"--revision {args.revision}: {args.model} is a preset, which has none; leave it out")
    # no default in the parser: _folder_configs must see which options were given
    sizes = dict(PRESET_SIZES)
    for name in PRESET_SIZES:
        if getattr(args, name) is not None:
            sizes[name] = getattr(args, name)

    preset = dict(PRESETS[args.model])
    config_class = TRANSFORMER_KINDS[preset.pop("kind")].config_class
    derived = {"grid": grid_of(sizes["grid"]), "codebook_size": sizes["codebook_size"],
               "text_length": sizes["text_length"], "text_vocab_size": sizes["vocab_size"]}
    config: Any = config_class.parse({**preset, **derived}, f"preset {args.model}")
    return _Configs(config, None, SamplingParams(), ["an image tokenizer: a preset has none"])


def _folder_configs(args: argparse.Namespace) -> _Configs:
    name = args.model
    if not Path(name).exists() and "/" not in name:  # cannot be a hub id
        choose(PRESETS, name, "model folder or preset")
    for option in PRESET_SIZES:
        if getattr(args, option) is not None:
            raise UserError(
                f"--{option.replace('_', '-')} is for presets; a model folder says it itself")

    # configs alone: of a hub id no weights are downloaded
    folder = resolve_folder(name, args.revision, patterns=("*.json",))
    index = read_model_index(folder)
    transformer = choose(TRANSFORMER_KINDS, str(index.get("seq2seq")),
                         f"{folder}: kind of seq2seq model")
    tokenizer = choose(IMAGE_TOKENIZERS, str(index.get("tokenizer_image")),
                       f"{folder}: kind of image tokenizer")
    not_counted = []
    # its size is in a folder of its own, which may not be on this machine
    if index["text_tokenizer"] == FrozenTextEncoder.kind:
        encoder = read_config(folder / "text_tokenizer", FrozenTextEncoder.kind, FrozenTextConfig)
        not_counted.append(f"the frozen text encoder {encoder.name}")
    generation_file = folder / GENERATION_NAME
    return _Configs(
        transformer=read_config(folder / "seq2seq", transformer.kind, transformer.config_class),
        tokenizer=read_config(folder / "tokenizer_image", tokenizer.kind, tokenizer.config_class),
        generation=SamplingParams.parse(read_mapping(generation_file), str(generation_file)),
        not_counted=not_counted)


def _print(report: dict[str, Any], needs: MemoryEstimate) -> None:
    guided = "with" if needs.rows > needs.pictures_at_once else "without"
    print(f"{report['model']}: pictures at a time {needs.pictures_at_once}, {guided} guidance "
          f"({needs.rows} rows), {report['dtype']}\n")
    print(f"{'part':<16} {'bytes':>20} {'MiB':>14}")
    for part, count in report["bytes"].items():
        print(f"{part:<16} {count:>20,} {count / MIB:>14,.2f}")
    print("\nDrawing (self_cache + caption_memory + working) and pictures follow one another: "
          "total counts the larger.")
    for part in report["not_counted"]:
        print(f"not counted: {part}")

    memory, source = report["memory"], report["memory_source"]
    if memory is None:
        print(f"memory of {source}: unknown; give --memory")
        return
    fits = "fits" if report["fits"] else "does not fit"
    print(f"memory: {memory:,} bytes ({human(memory)}, {source}); {fits}")
    print(f"largest number of pictures at a time that fits: {report['largest_batch']:,}")
