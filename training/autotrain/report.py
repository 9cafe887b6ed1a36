"""The report of `tokenloom train`: curves.png, and one HTML page with all that was found."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from training.autotrain.shapes import minutes_text
from training.autotrain.words import Line
from training.evaluation.plots import plot_curves
from training.runs.html_parts import bullets, document, image, section, table
from training.runs.metrics import read_metrics


def draw_curves(tokenizer_run: Path, transformer_run: Path, path: Path) -> None:
    """Draw curves.png of both runs."""
    tokenizer = read_metrics(tokenizer_run / "metrics.jsonl")
    transformer = read_metrics(transformer_run / "metrics.jsonl")
    panels = [("image tokenizer: loss", tokenizer, ["loss"]),
              ("image tokenizer: share of codes used", tokenizer, ["codebook_usage"]),
              ("transformer: nats a token", transformer, ["loss"])]
    plot_curves(panels, path)


def figure_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each measured figure."""
    on = f"{figures['images']:,} {figures['measured_on']}"
    rows = [
        ("reconstruction", f"{figures['reconstruction_psnr']:.1f} dB on {on}"),
        ("loss with captions", f"{figures['loss']:.3f} nats a token"),
        ("loss without", f"{figures['loss_without_caption']:.3f} nats a token"),
        ("captions tell", f"{figures['captions_tell']:.3f} nats a token")]
    details = figures.get("caption_accuracy_details")
    if details:
        rows.append(("caption accuracy",
                     f"{figures['caption_accuracy']:.2f}: of {details['captions']} sampled "
                     f"captions, the nearest training image has that caption "
                     f"(chance {details['chance']:.3f})"))
    return rows


def next_steps(figures: dict[str, Any], minutes: float, command: str, generate: str) -> list[str]:
    """Say what to try, from what was measured."""
    steps = [generate]
    if figures["measured_on"] == "training images":
        steps.append("these figures are of images that the model has seen; a hundred images or "
                     "more leave some to measure on")
    if figures["reconstruction_psnr"] < 21:
        steps.append(f"reconstructions are blurry ({figures['reconstruction_psnr']:.1f} dB): give "
                     f"more minutes ({command} --minutes {3 * minutes:g})")
    accuracy = figures.get("caption_accuracy")
    tells_little = figures["captions_tell"] < 0.05
    if tells_little and accuracy is not None and accuracy >= 0.8:
        steps.append(f"the captions of the training images are known by heart ({accuracy:.2f}); "
                     "more images help with captions that are new to the model")
    elif tells_little:
        steps.append("captions tell the model little: captions that say what is in the picture, "
                     "more images of the same things, or more minutes help")
    elif accuracy is not None and accuracy < 0.8:
        steps.append(f"pictures follow their captions in part ({accuracy:.2f}): more minutes help")
    if len(steps) == 1:
        steps.append("more images and more minutes make more general models; docs/training.md")
    return steps


def page(title: str, lines: Sequence[Line], notes: Sequence[str], figures: dict[str, Any],
         seconds: dict[str, float], steps: Sequence[str], images: dict[str, Image.Image | Path],
         configs: dict[str, str]) -> str:
    """Return the page. images: title -> picture; configs: title -> YAML."""
    times = [(name, minutes_text(value)) for name, value in seconds.items()]
    times.append(("all", minutes_text(sum(seconds.values()))))
    parts = [section("Measured", table(figure_rows(figures)))]
    parts += [section(name, image(name, _png(picture))) for name, picture in images.items()]
    parts += [
        section("Choices and why", _choices(lines)),
        section("To expect", bullets(list(notes))) if notes else "",
        section("Time", table(times)),
        section("What to do next", bullets(list(steps)))]
    parts += [section(name, f"<details><summary>all keys</summary><pre>{html.escape(text)}</pre>"
                            "</details>") for name, text in configs.items()]
    return document(title, "\n".join(part for part in parts if part))


def _png(picture: Image.Image | Path) -> bytes:
    if isinstance(picture, Path):
        return picture.read_bytes()
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _choices(lines: Sequence[Line]) -> str:
    rows = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td>"
            f"<td>{html.escape(why)}</td></tr>" for name, value, why in lines]
    return f"<table>{''.join(rows)}</table>"
