"""The command estimate: the memory of sampling, of a model folder or a preset, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inference.commands.options import add_revision, choose_device
from inference.memory.available import available_memory
from inference.memory.estimate import MemoryEstimate, Workload, estimate, largest_batch
from inference.memory.parts import WEIGHT_BYTES
from inference.memory.sizes import MIB, PRESET_SIZES, bytes_of, grid_of, human
from inference.model_folder import GENERATION_NAME, read_model_index
from inference.requests import check_counts
from inference.sampling import SamplingParams
from seq2seq import KINDS as TRANSFORMER_KINDS
from seq2seq import PRESETS, FrozenTextConfig, FrozenTextEncoder, TransformerConfig
from tokenizer_image.config import ImageTokenizerConfig
from tokenizer_image.kinds import IMAGE_TOKENIZERS
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import OneLineParser, UserError, choose
from tokenloom_common.pretrained import read_config, resolve_folder

PARTS = ("weights", "image_tokenizer", "self_cache", "caption_memory", "working", "pictures", "results")


@dataclass(frozen=True)
class _Model:
    """What is estimated; `missing`: what no part of the estimate counts, a sentence each."""

    config: TransformerConfig
    tokenizer: ImageTokenizerConfig | None
    generation: SamplingParams
    missing: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """`tokenloom estimate`: a table of bytes, and how many pictures at a time fit."""
    args = _arguments(argv)
    check_counts(args.num_images, args.batch_size, 0)
    memory, source = _memory(args.memory, args.device)
    model = _preset(args) if args.model in PRESETS and not Path(args.model).is_dir() else _folder(args)
    params = model.generation
    if args.guidance is not None:
        params = SamplingParams.parse({**params.plain(), "guidance_scale": args.guidance}, "--guidance")
    work = Workload.of_request(1, args.num_images, args.batch_size, guided=params.guidance_scale != 1, weights=args.dtype)
    needs = estimate(model.config, model.tokenizer, work)
    largest = None if memory is None else largest_batch(model.config, model.tokenizer, work, memory)
    report = {
        "model": str(args.model), "num_images": args.num_images, "batch_size": args.batch_size, "dtype": args.dtype,
        "guidance_scale": params.guidance_scale, "rows": needs.rows, "pictures_at_once": needs.pictures_at_once,
        "bytes": {**{part: asdict(needs)[part] for part in PARTS}, "total": needs.total},
        "memory": memory, "memory_source": source, "fits": None if memory is None else needs.total <= memory,
        "largest_batch": largest, "not_counted": model.missing}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, needs)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="tokenloom estimate", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Say how much memory sampling needs, before anything is loaded, and how many pictures at a time fit.",
        epilog="examples:\n  tokenloom estimate demo/model --num-images 8 --memory 8GiB\n"
               "  tokenloom estimate parti-3b --dtype int8 --grid 32x32 --codebook-size 8192 --text-length 128\n"
               "of a training (with --help: its own options):\n"
               "  tokenloom estimate --config training/recipes/small_seq2seq.yaml --gpus 8 --gpu H100")
    parser.add_argument("model", help="model folder, hub id (its config files alone are fetched), or a preset's name")
    add_revision(parser)
    parser.add_argument("--num-images", type=int, default=1, help="pictures of a caption (default 1)")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures drawn at a time (default 32)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 = off (default: the model folder's)")
    parser.add_argument("--dtype", choices=list(WEIGHT_BYTES), default="float32", help="of weights and caches; int8: of the "
                        "decoder's matrices, with float32 caches (default float32)")
    parser.add_argument("--memory", help="memory to fit into, such as 8GiB (default: what this machine has left)")
    parser.add_argument("--device", help="whose memory, without --memory: cpu, cuda (default: the GPU when there is one)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    sizes = parser.add_argument_group("what a preset leaves open")
    sizes.add_argument("--grid", help=f"rows x columns of image tokens (default {PRESET_SIZES['grid']})")
    sizes.add_argument("--codebook-size", type=int, help=f"codes (default {PRESET_SIZES['codebook_size']})")
    sizes.add_argument("--text-length", type=int, help=f"text ids a caption (default {PRESET_SIZES['text_length']})")
    sizes.add_argument("--vocab-size", type=int, help=f"entries of the text tokenizer (default {PRESET_SIZES['vocab_size']})")
    return parser.parse_args(argv)


def _memory(text: str | None, device: str | None) -> tuple[int | None, str]:
    """Bytes to fit into (None = unknown), and where the number is from."""
    if text is None:
        device = choose_device(device)
        return available_memory(device), device
    if device is not None:
        raise UserError("--memory and --device: the one says how much memory there is, the other where to look; give one")
    return bytes_of(text), "--memory"


def _preset(args: argparse.Namespace) -> _Model:
    if args.revision is not None:
        raise UserError(f"--revision {args.revision}: {args.model} is a preset, which has none; leave it out")
    given = {name: default if getattr(args, name) is None else getattr(args, name) for name, default in PRESET_SIZES.items()}
    values: dict[str, Any] = {name: value for name, value in PRESETS[args.model].items() if name != "kind"}
    derived = {"grid": grid_of(given["grid"]), "codebook_size": given["codebook_size"],
               "text_length": given["text_length"], "text_vocab_size": given["vocab_size"]}
    config: Any = TRANSFORMER_KINDS[PRESETS[args.model]["kind"]].config_class.parse(
        {**values, **derived}, f"preset {args.model}")
    return _Model(config, None, SamplingParams(), ["an image tokenizer: a preset has none"])


def _folder(args: argparse.Namespace) -> _Model:
    name = args.model
    if not Path(name).exists() and "/" not in name:
        choose(PRESETS, name, "model folder or preset")
    for option in PRESET_SIZES:
        if getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} is for presets; a model folder says it itself")
    folder = resolve_folder(name, args.revision, patterns=("*.json",))
    index = read_model_index(folder)
    transformer = choose(TRANSFORMER_KINDS, str(index.get("seq2seq")), f"{folder}: kind of seq2seq model")
    tokenizer = choose(IMAGE_TOKENIZERS, str(index.get("tokenizer_image")), f"{folder}: kind of image tokenizer")
    missing = []
    if index["text_tokenizer"] == FrozenTextEncoder.kind:
        encoder = read_config(folder / "text_tokenizer", FrozenTextEncoder.kind, FrozenTextConfig)
        missing.append(f"the frozen text encoder {encoder.name}")
    return _Model(read_config(folder / "seq2seq", transformer.kind, transformer.config_class),
                  read_config(folder / "tokenizer_image", tokenizer.kind, tokenizer.config_class),
                  SamplingParams.parse(read_mapping(folder / GENERATION_NAME), str(folder / GENERATION_NAME)), missing)


def _print(report: dict[str, Any], needs: MemoryEstimate) -> None:
    guided = "with" if needs.rows > needs.pictures_at_once else "without"
    print(f"{report['model']}: pictures at a time {needs.pictures_at_once}, {guided} guidance ({needs.rows} rows), "
          f"{report['dtype']}\n")
    print(f"{'part':<16} {'bytes':>20} {'MiB':>14}")
    for part, count in report["bytes"].items():
        print(f"{part:<16} {count:>20,} {count / MIB:>14,.2f}")
    print("\nDrawing (self_cache + caption_memory + working) and pictures follow one another: total counts the larger.")
    for what in report["not_counted"]:
        print(f"not counted: {what}")
    if report["memory"] is None:
        print(f"memory of {report['memory_source']}: unknown; give --memory")
        return
    print(f"memory: {report['memory']:,} bytes ({human(report['memory'])}, {report['memory_source']}); "
          f"{'fits' if report['fits'] else 'does not fit'}")
    print(f"largest number of pictures at a time that fits: {report['largest_batch']:,}")
