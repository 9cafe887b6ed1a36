"""One self-contained HTML page about a run: curves, images, config, environment, incidents."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import yaml

from tokenloom_common.extras import require_extra
from training.runs.facts import RunFacts
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
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em;
       color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse }
td, th { padding: .2em 1em .2em 0; text-align: left; vertical-align: top }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
img { max-width: 100%; image-rendering: pixelated }
figure { margin: 1em 0 } figcaption { color: #666 }
.curves { display: flex; flex-wrap: wrap; gap: 1em }
"""


def page(run: RunFacts) -> str:
    """Return the page of a run."""
    title = html.escape(run.path.resolve().name)
    config = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    parts = [
        _table(_summary(run)),
        _section("Curves", _curves(run)),
        _section("Pictures", _images(run)),
        _section("Incidents", _list(run.incidents)),
        _section("Data", _table(_rows(run.config.get("data") or {}))),
        _section("Environment", _table(_environment(run.environment))),
        _section("Config", f"<pre>{html.escape(config)}</pre>")]
    body = "\n".join(parts)
    return (f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{title}</title>\n"
            f"<style>{STYLE}</style>\n<h1>{title}</h1>\n{body}\n</html>\n")


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
    curves = [_curve(title, run.rows, name) for title, name in panels.items()]
    return f"<div class=curves>{''.join(curves)}</div>"


def _curve(title: str, rows: list[dict[str, Any]], name: str) -> str:
    """Draw one panel as SVG."""
    # not pyplot, which would choose a backend and keep every figure
    matplotlib = require_extra("matplotlib.figure", "a page with curves")
    figure = matplotlib.Figure(figsize=(4.6, 2.8), layout="constrained")
    axis = figure.subplots()
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    steps, values = zip(*points, strict=True)
    axis.plot(steps, values, linewidth=1.1, color="#1f6f8b")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)

    # vectors inside the page, which so stays one file
    file = io.StringIO()
    figure.savefig(file, format="svg")
    svg = file.getvalue()
    # without the XML prolog, which HTML does not have
    return f"<div>{svg[svg.index('<svg'):]}</div>"


def _images(run: RunFacts) -> str:
    grids = list(sample_grids(run.path).values())
    # a page with every grid of a long run would be too large to open
    newest_first = grids[-LAST_GRIDS:][::-1]
    others = [run.path / name for name in ("positions.png", "codebook.png")]
    images = [_image(path) for path in [*newest_first, *others] if path.is_file()]
    if not images:
        return "<p>none yet</p>"

    captions, text = run.path / "samples" / "captions.json", ""
    if captions.is_file():  # a tokenizer's grids have none
        text = f"<p>captions: {html.escape(captions.read_text(encoding='utf-8'))}</p>"
    return text + "".join(images)


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.name)
    return (f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
            f"<figcaption>{name}</figcaption></figure>")


def _environment(values: dict[str, Any]) -> list[tuple[str, str]]:
    rows = {name: value for name, value in values.items() if name not in ("packages", "argv")}
    rows["command"] = " ".join(str(word) for word in values.get("argv") or [])
    return _rows(rows | (values.get("packages") or {}))


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in values.items() if value is not None]


def _section(title: str, inside: str) -> str:
    return f"<h2>{title}</h2>\n{inside}"


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
             for name, value in rows]
    return f"<table>{''.join(lines)}</table>"


def _list(items: list[str]) -> str:
    if not items:
        return "<p>none</p>"
    lines = [f"<li>{html.escape(item)}</li>" for item in items]
    return f"<ul>{''.join(lines)}</ul>"


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
