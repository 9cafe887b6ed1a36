"""The commands convert and export."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from inference.checkpoints.convert import KINDS, convert
from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.export import EXPORTS, export_checkpoint
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart
from inference.checkpoints.writing import refuse_loss, write_converted
from tokenloom_common.errors import OneLineParser, UserError


def convert_command(argv: Sequence[str] | None = None) -> int:
    """`tokenloom convert`: the folder's name on stdout, what was assumed on stderr."""
    args = _convert_parser().parse_args(argv)
    if len(args.names) not in (2, 3):
        raise UserError(f"give [KIND] SRC OUT, got {len(args.names)} names; see tokenloom convert --help")
    kind, source, out = args.names if len(args.names) == 3 else (None, *args.names)
    refuse_loss(source, out)
    converted = convert(kind, source, ConvertOptions(
        args.config, args.resolution, args.image_tokenizer, args.text_encoder, args.classes, args.like_transformers))
    kind, count = write_converted(converted, source, out, args.license)
    for note in converted.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{out}: {kind}, {count:,} parameters", file=sys.stderr)
    print(_next(converted, out), file=sys.stderr)
    print(out)
    return 0


def _convert_parser() -> argparse.ArgumentParser:
    kinds = "\n".join(f"  {name:<14} {text}" for name, text in KINDS.items())
    parser = OneLineParser(
        prog="tokenloom convert", description="Turn another project's checkpoint into a Tokenloom folder with equal numbers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"kinds:\n{kinds}\n\nexamples:\n"
               "  tokenloom convert taming last.ckpt vqgan --config model.yaml\n"
               "  tokenloom convert vq_ds16_c2i.pt vq16\n"
               "  tokenloom convert llamagen-gpt c2i_B_256.pt c2i --image-tokenizer vq16\n"
               "  tokenloom convert min-dalle pretrained/ dalle-mini")
    parser.add_argument("names", nargs="+", metavar="[KIND] SRC OUT", help="kind of checkpoint (left out: told by what is in "
                        "it), its file or folder, the folder to write")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the source's own config (YAML or JSON), where it is not "
                        "beside it, or what the source does not say")
    parser.add_argument("--resolution", type=int, metavar="PIXELS", help="of a side, where the source does not say it")
    parser.add_argument("--image-tokenizer", type=Path, metavar="DIR", help="folder of the image tokenizer, converted before, "
                        "of a transformer that comes without one")
    parser.add_argument("--text-encoder", metavar="DIR", help="folder or hub id of the frozen text encoder that a transformer "
                        "reads (llamagen-gpt of text: FLAN-T5 XL)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line, in the order of their "
                        "numbers (default: the numbers)")
    parser.add_argument("--like-transformers", action="store_true", help="janus-vq: search codes as transformers does (raw "
                        "lengths), not as the model was trained")
    parser.add_argument("--license", help="of the weights, for the model card (default: said to be the source's)")
    return parser


def _next(converted: ConvertedPart | ConvertedModel, out: str) -> str:
    """What to do with it."""
    out = shlex.quote(out)
    if isinstance(converted, ConvertedModel):
        return f'try: tokenloom generate "..." --model {out} --out pictures'
    if hasattr(converted.model_class, "encode"):
        return f"try: tokenloom reconstruct PICTURE --model {out} --out pictures"
    return f"a transformer alone: train on with --init_from {out}, or convert again with its tokenizers to sample"


def export_command(argv: Sequence[str] | None = None) -> int:
    """`tokenloom export`: the file's name on stdout."""
    parser = OneLineParser(
        prog="tokenloom export", description="Write a Tokenloom folder as another project's checkpoint, bit-exact.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  tokenloom export taming runs/tokenizer/model vqgan.ckpt\n"
               "  tokenloom export diffusers-vq demo/model vqvae\n  tokenloom export llamagen-vq vq16 vq_ds16.pt")
    parser.add_argument("kind", metavar="KIND", help=", ".join(EXPORTS))
    parser.add_argument("folder", metavar="DIR", help="a model folder, or the folder of one of its parts")
    parser.add_argument("out", metavar="OUT", help="file to write (diffusers-vq: folder); never overwritten")
    args = parser.parse_args(argv)
    print(export_checkpoint(args.kind, args.folder, args.out))
    return 0
