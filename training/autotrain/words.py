"""Choices in words: one line each, with its reason, and what to expect of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from training.autotrain.choices import HELD_OUT_FROM, WIDTHS, Choices
from training.autotrain.facts import DataFacts, MachineFacts
from training.autotrain.launching import CPU_PROCESSES, MOST_GPUS
from training.autotrain.shapes import SMALL_DATA, minutes_text


class Line(NamedTuple):
    """One choice as it is said."""

    name: str
    value: str
    why: str


def choice_lines(choices: Choices, data: DataFacts, machine: MachineFacts) -> list[Line]:
    """Say every choice and why, in the order in which they are made."""
    return [*_data_lines(choices, data, machine), *_model_lines(choices, data, machine),
            *_time_lines(choices)]


def _data_lines(choices: Choices, data: DataFacts, machine: MachineFacts) -> list[Line]:
    found = (f"{data.distinct:,} different captions, {data.words:,} words, median shorter side "
             f"{data.shorter_side} px")
    lines = [Line("data", f"{choices.copied:,} images of {data.images:,}",
                  choices.whys["copy"] or found)]
    if data.held_out is not None:
        held_out, why = f"{choices.held_out:,} images of split {data.held_out}", "the data's own"
    elif choices.held_out:
        held_out, why = f"{choices.held_out:,} images", "the data has no split for it"
    else:
        held_out, why = "none", f"{data.images:,} images are too few to spare some"
    lines.append(Line("held out", held_out, why))
    why = (f"a power of two, at most {MOST_GPUS}" if machine.gpus
           else f"at most {CPU_PROCESSES} processes on a CPU")
    lines.append(Line("devices", machine.devices, why))
    return lines


def _model_lines(choices: Choices, data: DataFacts, machine: MachineFacts) -> list[Line]:
    shape, whys = choices.shape, choices.whys
    origin = f"starts from {shape.start}" if shape.start else "from scratch"
    return [
        Line("image size", f"{shape.size} px", whys["size"]),
        Line("image tokenizer", f"{shape.grid} tokens of {choices.codebook_size:,} codes, {origin}",
             _tokenizer_why(choices, machine)),
        *(_started_lines(choices) if shape.start_width else _own_lines(choices, data))]


def _started_lines(choices: Choices) -> list[Line]:
    """The transformer, where that of another model is trained on."""
    return [Line("transformer", f"starts from {choices.shape.start}, and reads its ids",
                 choices.whys["width"]),
            Line("guidance", f"{choices.guidance:g}, temperature {choices.temperature:g}, top-k "
                 f"{choices.top_k}, caption dropout 0.1",
                 "bolder than that model's own, since fewer images are known better")]


def _own_lines(choices: Choices, data: DataFacts) -> list[Line]:
    """The transformer, where it is a new one."""
    encoder, decoder = WIDTHS[choices.width]
    recipe = "emoji32_seq2seq.yaml" if choices.images < SMALL_DATA else "emoji64_seq2seq.yaml"
    return [Line("transformer", f"width {choices.width}, {encoder} + {decoder} layers",
                 choices.whys["width"]),
            Line("captions", f"{choices.text_length} ids of {choices.vocabulary:,}",
                 f"99 % of them fit into {data.text_ids}, {data.mean_words:.1f} words on average"),
            Line("guidance", f"{choices.guidance:g}, temperature {choices.temperature:g}, top-k "
                 f"{choices.top_k}, caption dropout 0.1",
                 f"as in {recipe}, measured on data of this size")]


def _time_lines(choices: Choices) -> list[Line]:
    times, images = choices.times, choices.images
    pictures = choices.tokenizer_steps * choices.tokenizer_batch
    rows = choices.steps * choices.batch
    return [
        Line("tokenizer's time", f"{minutes_text(times.tokenizer)}: {choices.tokenizer_steps:,} "
             f"steps of {choices.tokenizer_batch}",
             f"{pictures / images:,.0f} epochs at {1 / times.picture_seconds:,.0f} images a "
             "second, measured"),
        Line("transformer's time", f"{minutes_text(times.transformer)}: {choices.steps:,} steps "
             f"of {choices.batch}",
             f"{rows / images:,.0f} epochs at {1 / times.row_seconds:,.0f} rows a second, "
             "measured"),
        Line("other time", minutes_text(times.copy + times.encode + times.report),
             "reading, encoding, samples and report")]


def _tokenizer_why(choices: Choices, machine: MachineFacts) -> str:
    if choices.shape.start_width is not None:
        return "its codes are kept, its decoder learns the rest"
    if choices.shape.start:
        return "fewer images teach it the rest"
    return f"{choices.channels} channels on a {'GPU' if machine.gpus else 'CPU'}"


def notes_of(choices: Choices, data: DataFacts) -> list[str]:
    """Things to expect, said before anything is trained."""
    shape, times = choices.shape, choices.times
    notes = []
    picture_share = times.tokenizer / (shape.pictures * times.picture_seconds)
    row_share = times.transformer / (shape.rows * times.row_seconds)
    if min(picture_share, row_share) < 1:
        good = (shape.pictures * times.picture_seconds + shape.rows * times.row_seconds
                + times.whole - times.tokenizer - times.transformer)
        notes.append(
            f"the time is short: it is {100 * min(picture_share, row_share):.0f} % of what decent "
            f"results take here ({minutes_text(good)} in all); expect "
            + _short_of(picture_share, row_share))
    if data.distinct == 1:
        notes.append("all captions are the same: the model will not tell captions apart")
    if data.images < HELD_OUT_FROM:
        notes.append(f"{data.images:,} images are few: the model will know these pictures and "
                     "little else")
    return notes


def _short_of(picture_share: float, row_share: float) -> str:
    expected = []
    if picture_share < 1:
        expected.append("blurry pictures")
    if row_share < 1:
        expected.append("pictures that follow their captions badly")
    return " and ".join(expected)


def format_lines(lines: Sequence[Line]) -> list[str]:
    """Format choices for a terminal: `name  value  (why)`."""
    return [f"{name:<19} {value}" + (f"  ({why})" if why else "") for name, value, why in lines]
