"""Tokenloom: autoregressive text-to-image models over discrete codes.

The front door: public names, and the table of commands.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference import (
        GenerationResult,
        GenerationStep,
        PromptRequest,
        SamplingParams,
        TextToImage,
        load_matcher,
    )
    from inference.checkpoints import export_checkpoint, from_checkpoint
    from seq2seq import EncoderDecoder, Seq2SeqConfig, TextTokenizer
    from tokenizer_image import VQGAN, ImageTokenizer, VQGANConfig, load_tokenizer
    from training.evaluation.generator_report import evaluate_generator
    from training.evaluation.options import (
        GeneratorEvaluationOptions,
        TokenizerEvaluationOptions,
    )
    from training.evaluation.tokenizer_report import evaluate_tokenizer

__all__ = ["VQGAN", "EncoderDecoder", "GenerationResult", "GenerationStep",
           "GeneratorEvaluationOptions", "ImageTokenizer", "PromptRequest", "SamplingParams",
           "Seq2SeqConfig", "TextToImage", "TextTokenizer", "TokenizerEvaluationOptions",
           "VQGANConfig", "evaluate_generator", "evaluate_tokenizer", "export_checkpoint",
           "from_checkpoint", "load_matcher", "load_tokenizer", "main"]

_NAMES = {
    "TextToImage": "inference",
    "SamplingParams": "inference",
    "GenerationResult": "inference",
    "GenerationStep": "inference",
    "PromptRequest": "inference",
    "load_matcher": "inference",
    "export_checkpoint": "inference.checkpoints",
    "from_checkpoint": "inference.checkpoints",
    "EncoderDecoder": "seq2seq",
    "Seq2SeqConfig": "seq2seq",
    "TextTokenizer": "seq2seq",
    "VQGAN": "tokenizer_image",
    "VQGANConfig": "tokenizer_image",
    "ImageTokenizer": "tokenizer_image",
    "load_tokenizer": "tokenizer_image",
    "evaluate_generator": "training.evaluation.generator_report",
    "evaluate_tokenizer": "training.evaluation.tokenizer_report",
    "GeneratorEvaluationOptions": "training.evaluation.options",
    "TokenizerEvaluationOptions": "training.evaluation.options",
}
"""Public name -> the module that has it."""

COMMANDS = {
    "generate": ("inference.commands.generate", "generate",
                 "sample pictures for a caption"),
    "serve": ("inference.commands.serve", "serve",
              "serve models over HTTP: a page, and OpenAI's images API"),
    "reconstruct": ("inference.commands.reconstruct", "reconstruct",
                    "send pictures through the image tokenizer and back"),
    "calibrate": ("inference.commands.calibrate", "calibrate",
                  "measure this machine, and keep what is fastest for a model"),
    "info": ("inference.commands.info", "info",
             "say what a model folder holds"),
    "convert": ("inference.commands.convert", "convert_command",
                "turn another project's checkpoint into a folder of ours"),
    "export": ("inference.commands.convert", "export_command",
               "write a folder of ours as another project's checkpoint"),
    "estimate": ("training.commands.estimate", "main",
                 "say what sampling or a training run needs: memory, time, disk"),
    "data": ("training.commands.data", "main",
             "build and check captioned image data"),
    "train": ("training.commands.train", "train",
              "train a model on a folder of captioned images, in the minutes given"),
    "evaluate": ("training.commands.evaluate", "main",
                 "measure an image tokenizer or a text-to-image model"),
    "runs": ("training.commands.runs", "runs",
             "compare training runs in a table"),
    "report": ("training.commands.report", "report",
               "write one HTML page about a training run"),
}
"""Command -> module, function taking argv, one line of help."""

USAGE = "usage: tokenloom COMMAND [options]"
TRAINING = """training (also without `deepspeed`, on one process):
  deepspeed training/train_tokenizer.py --config training/recipes/small_tokenizer.yaml ...
  deepspeed training/encode_dataset.py --image_tokenizer RUN/model --data.path DIR --out TOKENS
  deepspeed training/train_seq2seq.py --config training/recipes/small_seq2seq.yaml ...
  deepspeed training/train_matcher.py --config training/recipes/emoji_matcher.yaml ..."""


def __getattr__(name: str) -> Any:
    """Load a public name on first use: `tokenloom --help` and the data commands need no torch."""
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'tokenloom' has no attribute '{name}'")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tokenloom COMMAND ...`: 0 done, 1 failed, 2 the user's mistake, 4 data unusable."""
    from tokenloom_common.errors import nearest_name, run_command

    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        return run_command(_show_help, arguments, "tokenloom")
    if arguments[0] == "--version":
        return run_command(_show_version, arguments, "tokenloom")

    name, *rest = arguments
    if name not in COMMANDS:
        print(f"tokenloom: error: unknown command '{name}'{nearest_name(name, COMMANDS)}",
              file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[name]

    def run(arguments: Sequence[str] | None) -> int:
        # imported inside run_command, which also turns a failing import into one line
        return getattr(importlib.import_module(module), function)(arguments)

    return run_command(run, rest, f"tokenloom {name}")


def _show_version(argv: Sequence[str] | None) -> int:
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"tokenloom {version('tokenloom')}")
    except PackageNotFoundError:  # run from a checkout that is not installed
        print("tokenloom unknown (not installed)")
    return 0


def _show_help(argv: Sequence[str] | None) -> int:
    title = (__doc__ or "").splitlines()[0]
    print(f"{USAGE}\n\n{title}\n\ncommands (each has --help with examples):")
    for name, (_, _, text) in COMMANDS.items():
        print(f"  {name:<12} {text}")
    print(f"\n{TRAINING}")
    return 0 if argv else 2  # no command at all is a mistake


if __name__ == "__main__":
    sys.exit(main())
