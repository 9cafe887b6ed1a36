"""Headline numbers of a generator's report: flat, by name, in the order that they are printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from training.evaluation.real_images import CaptionLoss
from training.evaluation.report_files import with_units
from training.evaluation.retrieval import TOP

PARTS = ("color", "shape", "count", "relation")  # of a caption's composition, each with its share


def loss_headline(loss: CaptionLoss) -> dict[str, dict[str, Any]]:
    """Name -> value and unit of the loss on the data's own images."""
    return with_units({
        "loss": (loss.loss, "nats a token"),
        "perplexity": (math.exp(loss.loss), "codes"),  # as many equally likely codes
        "loss_without_caption": (loss.loss_without_caption, "nats a token"),
    })


def headline(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> value and unit of one sampling run, an entry of `generated` in the report."""
    # a run has only the entries of the scorers that were asked for
    values: dict[str, tuple[Any, str]] = {}
    if "matcher_score" in run:
        chance = run["matcher_score_shuffled"]
        values["matcher_score"] = (run["matcher_score"],
                                   f"(cosine; {chance:.4f} with other captions)")
        retrieval = run["retrieval"]
        for top in TOP:
            chance = retrieval[f"chance_top{top}"]
            values[f"retrieval_top{top}"] = (retrieval[f"top{top}"],
                                             f"of pictures (chance {chance:.4f})")
    if "caption_accuracy" in run:
        nearest = run["caption_accuracy"]
        values["caption_accuracy"] = (nearest["accuracy"],
                                      f"of pictures (chance {nearest['chance']:.4f})")
    if "picture_retrieval" in run:
        nearest = run["picture_retrieval"]
        values["picture_retrieval_top1"] = (nearest["top1"],
                                            f"of pictures (chance {nearest['chance']:.4f})")
        frechet = run["frechet"]  # needs the same features, so it is there too
        values[frechet["metric"]] = (frechet["distance"], "(squared distance, 0 = equal)")
    if "diversity" in run:
        between = _share(run["diversity"]["between"])
        values["diversity"] = (run["diversity"]["within"],
                               f"(cosine distance within a caption; {between} between concepts)")
    if "composition" in run:
        values |= _composition(run["composition"], run["composition_shuffled"])
    return with_units(values)


def _composition(own: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Shares overall, by kind of caption and by part; what no caption asks for is left out.

    other: the same with captions of other images.
    """
    pairs = {"composition": (own["all"], other["all"])}
    for kind in own["kinds"]:
        name = f"composition_{kind.replace(' ', '_')}"
        pairs[name] = (own["kinds"][kind]["all"], other["kinds"][kind]["all"])
    for part in PARTS:
        pairs[f"composition_part_{part}"] = (own[part], other[part])

    values: dict[str, tuple[Any, str]] = {}
    for name, (right, chance) in pairs.items():
        if right["captions"]:  # else its share is None
            values[name] = (right["share"], f"of {right['captions']} pictures "
                            f"({_share(chance['share'])} with other captions)")
    return values


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def curve_panels(runs: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, list[float]]]]:
    """Panels of guidance.png: all shares of images in one, each other number in its own."""
    headlines = [headline(run) for run in runs]  # all with the same names: only guidance differs
    shares: dict[str, list[float]] = {}
    others: dict[str, list[float]] = {}
    for name in headlines[0]:
        values = [float(numbers[name]["value"]) for numbers in headlines]
        if "retrieval" in name:
            shares[name] = values
        elif "part" in name:
            continue  # parts would crowd the panel of shares
        elif name.startswith("composition"):
            shares[name] = values
        else:
            others[name] = values

    panels = [("share of pictures", shares)] if shares else []
    panels += [(name, {name: values}) for name, values in others.items()]
    return panels
