"""One self-contained HTML page about a run: curves, images, config, environment, incidents."""

from __future__ import annotations

import html
from typing import Any

import yaml

from training.runs.facts import RunFacts
from training.runs.html_parts import bullets, curve, document, image, section, table
from training.runs.metrics import sample_grids

CURVES = {
    "loss": "loss",
    "held-out loss": "validation_loss",
    "held-out PSNR": "validation_psnr",
    "held-out captions found": "validation_top1",
    "learning rate": "lr",
    "gradient norm": "grad_norm",
    "samples a second": "samples_per_s",
    "image tokens a second": "tokens_per_s",
    "model FLOPs utilization": "mfu",
    "share of time waiting for data": "data_wait",
    "memory, bytes": "memory_bytes",
    "codebook in use": "codebook_usage",
    "differences between pictures kept": "reconstruction_spread"}
"""Title -> name in metrics.jsonl; names that a run does not log are left out."""
TERMS_LEFT_OUT = {"step", "elapsed_s", "skipped_steps", "dropped_items"}
LAST_GRIDS = 4
NOTHING = "-"  # shown for a number that a run did not log


def page(run: RunFacts) -> str:
    """Return the page of a run."""
    config = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    parts = [
        table(_summary(run)),
        section("Curves", _curves(run)),
        section("Pictures", _images(run)),
        section("Incidents", bullets(run.incidents)),
        section("Data", table(_rows(run.config.get("data") or {}))),
        section("Environment", table(_environment(run.environment))),
        section("Config", f"<pre>{html.escape(config)}</pre>")]
    return document(run.path.resolve().name, "\n".join(parts))


def _summary(run: RunFacts) -> list[tuple[str, str]]:
    best = NOTHING
    if run.best is not None:
        measured, step = run.best
        best = f"{measured.value:.4g} ({measured.name.removeprefix('validation_')}), step {step:,}"
    rows = [
        ("kind", run.kind),
        ("status", f"{run.status}, step {run.steps:,} of {run.total_steps:,}"),
        ("loss", _number(run.loss)),
        ("held-out loss", _number(run.validation_loss)),
        ("best on the held-out split", best),
        ("samples a second", _number(run.median("samples_per_s"))),
        ("image tokens a second", whole(run.median("tokens_per_s"))),
        ("model FLOPs utilization", percent(run.median("mfu"))),
        ("memory", gibibytes(run.memory_bytes)),
        ("training time", duration(run.seconds)),
        ("newest checkpoint", run.latest_checkpoint or "none")]
    return [(name, value) for name, value in rows if value != NOTHING]


def _curves(run: RunFacts) -> str:
    logged = {name for row in run.rows for name, value in row.items()
              if isinstance(value, (int, float))}
    panels = {title: name for title, name in CURVES.items() if name in logged}
    # whatever else is logged is a term of the loss, or belongs to one
    terms = logged - set(CURVES.values()) - TERMS_LEFT_OUT
    panels |= {name: name for name in sorted(terms)}
    if not panels:
        return "<p>nothing was logged yet</p>"
    curves = [curve(title, run.rows, name) for title, name in panels.items()]
    return f"<div class=curves>{''.join(curves)}</div>"


def _images(run: RunFacts) -> str:
    grids = list(sample_grids(run.path).values())
    # a page with every grid of a long run would be too large to open
    newest_first = grids[-LAST_GRIDS:][::-1]
    others = [run.path / name for name in ("positions.png", "codebook.png")]
    paths = [path for path in [*newest_first, *others] if path.is_file()]
    images = [image(path.name, path.read_bytes()) for path in paths]
    if not images:
        return "<p>none yet</p>"

    captions, text = run.path / "samples" / "captions.json", ""
    if captions.is_file():  # a tokenizer's grids have none
        text = f"<p>captions: {html.escape(captions.read_text(encoding='utf-8'))}</p>"
    return text + "".join(images)


def _environment(values: dict[str, Any]) -> list[tuple[str, str]]:
    rows = {name: value for name, value in values.items() if name not in ("packages", "argv")}
    rows["command"] = " ".join(str(word) for word in values.get("argv") or [])
    return _rows(rows | (values.get("packages") or {}))


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in values.items() if value is not None]


# ---- numbers in words, which `tokenloom runs` prints too

def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4g}"


def whole(value: float | None) -> str:
    """Format a large number: "12,345"."""
    return NOTHING if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """Format a share: "41.2 %"."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def gibibytes(count: int | None) -> str:
    """Format bytes: "1.50 GiB"."""
    return NOTHING if count is None else f"{count / (1 << 30):.2f} GiB"


def duration(seconds: float) -> str:
    """Format seconds: "1 h 7 min", "3 min 20 s", "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
