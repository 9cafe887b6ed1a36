"""The commands `tokenloom convert` and `tokenloom export`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from inference.conversions import (
    CHECKPOINT_KINDS,
    EXPORT_ENDINGS,
    check_converted_folder,
    check_exported_path,
)
from tokenloom_common.errors import OneLineParser, UserError, choose

if TYPE_CHECKING:
    from inference.checkpoints.converted import ConvertedModel
    from inference.checkpoints.rules import ConvertedPart

_CONVERT_EXAMPLES = """examples:
  tokenloom convert taming last.ckpt vqgan --config model.yaml
  tokenloom convert vq_ds16_c2i.pt vq16
  tokenloom convert llamagen-gpt c2i_B_256.pt c2i --image-tokenizer vq16
  tokenloom convert min-dalle pretrained/ dalle-mini
  tokenloom convert taming last.ckpt vqgan --weight-set raw"""
_EXPORT_EXAMPLES = """examples:
  tokenloom export taming runs/tokenizer/model vqgan.ckpt
  tokenloom export diffusers-vq demo/model vqvae
  tokenloom export llamagen-vq vq16 vq_ds16.pt
  tokenloom export float16 demo/model half_the_size"""


def convert_command(argv: Sequence[str] | None = None) -> int:
    """`tokenloom convert`: print the folder's name on stdout, notes and the next step on stderr."""
    args = _convert_parser().parse_args(argv)
    kind, source, out = _split_names(args.names)
    if kind is not None:
        choose(CHECKPOINT_KINDS, kind, "kind of checkpoint")
    # before the imports, which take seconds, and the reading, which takes minutes for a large model
    check_converted_folder(source, out)
    from inference.checkpoints.convert import convert
    from inference.checkpoints.options import ConvertOptions
    from inference.checkpoints.writing import write_converted

    options = ConvertOptions(
        config=args.config, resolution=args.resolution, image_tokenizer=args.image_tokenizer,
        text_encoder=args.text_encoder, classes=args.classes,
        weight_set=args.weight_set, like_transformers=args.like_transformers)

    converted = convert(kind, source, options)
    name, parameters = write_converted(converted, source, out, args.license)

    for note in converted.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{out}: {name}, {parameters:,} parameters", file=sys.stderr)
    print(_next_step(converted, out), file=sys.stderr)
    print(out)  # alone on stdout, for scripts
    return 0


def _split_names(names: list[str]) -> tuple[str | None, str, str]:
    """[KIND] SRC OUT, with None for a KIND that is left out."""
    if len(names) == 3:
        return names[0], names[1], names[2]
    if len(names) == 2:
        return None, names[0], names[1]
    raise UserError(f"give [KIND] SRC OUT, got {len(names)} names; see tokenloom convert --help")


def _convert_parser() -> argparse.ArgumentParser:
    kinds = "\n".join(f"  {name:<14} {text}" for name, text in CHECKPOINT_KINDS.items())
    parser = OneLineParser(
        prog="tokenloom convert",
        description="Turn another project's checkpoint into a Tokenloom folder with equal numbers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"kinds:\n{kinds}\n\n{_CONVERT_EXAMPLES}")
    add = parser.add_argument
    add("names", nargs="+", metavar="[KIND] SRC OUT",
        help="kind of checkpoint (default: found from its contents), its file or folder, folder "
             "to write")
    add("--config", type=Path, metavar="FILE",
        help="the source's own config (YAML or JSON), if it is not beside "
             "the source or lacks something")
    add("--resolution", type=int, metavar="PIXELS",
        help="image side, if the source does not state it")
    add("--image-tokenizer", type=Path, metavar="DIR",
        help="folder of the converted image tokenizer, for a transformer that comes without one")
    add("--text-encoder", metavar="DIR",
        help="folder or hub id of the frozen text encoder that a transformer reads (llamagen-gpt "
             "of text: FLAN-T5 XL)")
    add("--classes", type=Path, metavar="FILE",
        help="class names, one per line in the order of their numbers (default: the numbers)")
    add("--weight-set", metavar="SET",
        help="of a file with several sets of weights: ema (the average), raw, or a set's name as "
             "the note gives it (default: what the project's own sampler takes)")
    add("--like-transformers", action="store_true",
        help="janus-vq: search codes as transformers does (raw lengths), not "
             "as the model was trained")
    add("--license",
        help="licence of the weights, for the model card (default: the card refers to the source)")
    return parser


def _next_step(converted: ConvertedPart | ConvertedModel, out: str) -> str:
    """A command to try with the result."""
    from inference.checkpoints.converted import ConvertedModel

    out = shlex.quote(out)  # the line is to be pasted into a shell
    if isinstance(converted, ConvertedModel):
        return f'try: tokenloom generate "..." --model {out} --out pictures'
    if hasattr(converted.model_class, "encode"):
        return f"try: tokenloom reconstruct PICTURE --model {out} --out pictures"
    return (f"a transformer alone: train on with --init_from {out}, or convert again with its "
            "tokenizers to sample")


def export_command(argv: Sequence[str] | None = None) -> int:
    """`tokenloom export`: print the file's name on stdout."""
    parser = OneLineParser(
        prog="tokenloom export",
        description="Write a Tokenloom folder as another project's checkpoint, bit-exact; or "
        "(float16) as one of ours with weights rounded to 16 bits.",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_EXPORT_EXAMPLES)
    parser.add_argument("kind", metavar="KIND", help=", ".join(EXPORT_ENDINGS))
    parser.add_argument("folder", metavar="DIR",
                        help="a model folder, or the folder of one of its parts")
    parser.add_argument("out", metavar="OUT",
                        help="file to write (diffusers-vq, float16: folder); never overwritten")
    args = parser.parse_args(argv)
    choose(EXPORT_ENDINGS, args.kind, "kind of checkpoint to export")
    check_exported_path(args.kind, args.out)  # before the import, which takes seconds
    from inference.checkpoints.export import export_checkpoint

    print(export_checkpoint(args.kind, args.folder, args.out))
    return 0
