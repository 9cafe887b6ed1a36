"""`tokenloom info`: describe a model folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from inference.commands.options import add_revision, command_parser
from inference.model_folder import LoadedModel, load_model_folder
from inference.shipped import default_model_folder


def info(argv: Sequence[str] | None = None) -> int:
    """Print the parts of a model folder, their sizes and defaults."""
    parser = command_parser(
        "info", "Say what a model folder holds; it is loaded and checked whole.",
        "  tokenloom info\n  tokenloom info demo/model\n  tokenloom info demo/model --json")
    parser.add_argument(
        "folder", nargs="?",
        help="model folder or hub id (default: the model that ships with Tokenloom)")
    add_revision(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args(argv)

    # loaded, not only read: so the command also tells whether the weights are whole
    folder = default_model_folder() if args.folder is None else args.folder
    report = _report(load_model_folder(folder, revision=args.revision))
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for part, values in report.items():
        if not isinstance(values, dict):
            print(f"{part}: {values}")
            continue
        print(f"{part}:")
        for key, value in values.items():
            shown = f"{value:,}" if key == "parameters" else value
            print(f"  {key:<24} {shown}")
    return 0


def _report(model: LoadedModel) -> dict[str, Any]:
    tokenizer, seq2seq = model.image_tokenizer, model.seq2seq
    report: dict[str, Any] = {
        "folder": str(model.folder),
        "image_tokenizer": {"kind": tokenizer.kind, "parameters": _parameters(tokenizer),
                            **tokenizer.config.plain()},
        "seq2seq": {"kind": seq2seq.kind, "parameters": _parameters(seq2seq),
                    **seq2seq.config.plain()},
        "text_tokenizer": model.text_tokenizer.config.plain(),
        "generation": model.generation.plain(),
    }
    if model.concepts is not None:
        known = model.concepts
        report["concepts"] = {"concepts": len(known.concepts), "words": len(known.words),
                              "synonyms": len(known.synonyms or {}),
                              "styles": ", ".join(known.styles)}
    return report


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
