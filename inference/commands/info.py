"""`tokenloom info`: describe a model folder."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from inference.commands.options import (
    _parser,
    add_revision,
)
from inference.model_folder import (
    load_model_folder,
)


def info(argv: Sequence[str] | None = None) -> int:
    """`tokenloom info`: the parts of a model folder, their sizes and defaults."""
    parser = _parser("info", "Say what a model folder holds; it is loaded and checked whole.",
                     "  tokenloom info demo/model\n  tokenloom info demo/model --json")
    parser.add_argument("folder", help="model folder or hub id")
    add_revision(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args(argv)
    model = load_model_folder(args.folder, revision=args.revision)
    report = {
        "folder": str(model.folder),
        "image_tokenizer": {"kind": model.image_tokenizer.kind, "parameters": _count(model.image_tokenizer),
                            **model.image_tokenizer.config.plain()},
        "seq2seq": {"kind": model.seq2seq.kind, "parameters": _count(model.seq2seq), **model.seq2seq.config.plain()},
        "text_tokenizer": model.text_tokenizer.config.plain(),
        "generation": model.generation.plain(),
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for part, values in report.items():
        if isinstance(values, dict):
            print(f"{part}:")
            for key, value in values.items():
                print(f"  {key:<24} {f'{value:,}' if key == 'parameters' else value}")
        else:
            print(f"{part}: {values}")
    return 0


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
