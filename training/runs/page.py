"""One HTML page about a run, with everything in it: curves, pictures, config, environment, incidents."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import yaml

from tokenloom_common.errors import UserError
from training.runs.facts import RunFacts

CURVES = {"loss": "loss", "held-out loss": "validation_loss", "held-out PSNR": "validation_psnr",
          "held-out captions found": "validation_top1", "learning rate": "lr", "gradient norm": "grad_norm",
          "samples a second": "samples_per_s", "image tokens a second": "tokens_per_s", "model FLOPs utilization": "mfu",
          "share of time waiting for data": "data_wait", "memory, bytes": "memory_bytes", "codebook in use": "codebook_usage"}
"""Title -> name in metrics.jsonl; what a run does not log is left out."""
TERMS_LEFT_OUT = {"step", "elapsed_s", "skipped_steps", "dropped_items"}
LAST_GRIDS = 4
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .2em 1em .2em 0; text-align: left; vertical-align: top }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto } img { max-width: 100%; image-rendering: pixelated }
figure { margin: 1em 0 } figcaption { color: #666 } .curves { display: flex; flex-wrap: wrap; gap: 1em }
"""


def page(run: RunFacts) -> str:
    """The page of a run, self-contained."""
    parts = [_table(_summary(run)), _section("Curves", _curves(run)), _section("Pictures", _pictures(run)),
             _section("Incidents", _list(run.incidents) if run.incidents else "<p>none</p>"),
             _section("Data", _table(_plain(run.config.get("data") or {}))),
             _section("Environment", _table(_environment(run.environment))),
             _section("Config", f"<pre>{html.escape(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))}</pre>")]
    title = html.escape(run.path.resolve().name)
    return (f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{title}</title>\n<style>{STYLE}</style>\n"
            f"<h1>{title}</h1>\n" + "\n".join(parts) + "\n</html>\n")


def _summary(run: RunFacts) -> list[tuple[str, str]]:
    measured, step = run.best or (None, 0)
    best = f"{measured.value:.4g} ({measured.name.removeprefix('validation_')}), step {step:,}" if measured else "-"
    rows = [("kind", run.kind), ("status", f"{run.status}, step {run.steps:,} of {run.total_steps:,}"),
            ("loss", _number(run.loss)), ("held-out loss", _number(run.validation_loss)), ("best on the held-out split", best),
            ("samples a second", _number(run.median("samples_per_s"))),
            ("image tokens a second", whole(run.median("tokens_per_s"))),
            ("model FLOPs utilization", percent(run.median("mfu"))), ("memory", gibibytes(run.memory_bytes)),
            ("training time", duration(run.seconds)), ("newest checkpoint", run.latest_checkpoint or "none")]
    return [(name, value) for name, value in rows if value != "-"]


def _curves(run: RunFacts) -> str:
    logged = {name for row in run.rows for name, value in row.items() if isinstance(value, (int, float))}
    terms = sorted(logged - set(CURVES.values()) - TERMS_LEFT_OUT)
    panels = {title: name for title, name in CURVES.items() if name in logged} | {name: name for name in terms}
    drawn = [_curve(title, run.rows, name) for title, name in panels.items()]
    return f"<div class=curves>{''.join(drawn)}</div>" if drawn else "<p>nothing was logged yet</p>"


def _curve(title: str, rows: list[dict[str, Any]], name: str) -> str:
    """One panel as SVG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"the page's curves need matplotlib ({error}): pip install 'tokenloom[train]'") from None
    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    axis = figure.subplots()
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    axis.plot(*zip(*points, strict=True), linewidth=1.1, color="#1f6f8b")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return "<div>" + text.getvalue()[text.getvalue().index("<svg"):] + "</div>"


def _pictures(run: RunFacts) -> str:
    grids = sorted((run.path / "samples").glob("step-*.png"))[-LAST_GRIDS:][::-1]
    others = [run.path / name for name in ("positions.png", "codebook.png") if (run.path / name).is_file()]
    captions = run.path / "samples" / "captions.json"
    said = f"<p>captions: {html.escape(captions.read_text(encoding='utf-8'))}</p>" if captions.is_file() else ""
    shown = "".join(_picture(path) for path in [*grids, *others])
    return said + shown if shown else "<p>none yet</p>"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.name)
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'


def _environment(values: dict[str, Any]) -> list[tuple[str, str]]:
    packages = values.get("packages") or {}
    rows = {**{name: value for name, value in values.items() if name not in ("packages", "argv")},
            "command": " ".join(map(str, values.get("argv") or [])), **packages}
    return _plain(rows)


def _plain(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in values.items() if value is not None]


def _section(title: str, inside: str) -> str:
    return f"<h2>{title}</h2>\n{inside}"


def _table(rows: list[tuple[str, str]]) -> str:
    lines = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(lines)}</table>"


def _list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def whole(value: float | None) -> str:
    """ "12,345"."""
    return "-" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """ "41.2 %"."""
    return "-" if value is None else f"{100 * value:.1f} %"


def gibibytes(count: int | None) -> str:
    """ "1.50 GiB"."""
    return "-" if count is None else f"{count / (1 << 30):.2f} GiB"


def duration(seconds: float) -> str:
    """4,000 -> "1 h 7 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
