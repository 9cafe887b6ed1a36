"""Pieces of the pages that runs and reports are shown on: one self-contained HTML file each."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

from tokenloom_common.extras import require_extra

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


def document(title: str, body: str) -> str:
    """Return a whole page; title as plain text, body as HTML."""
    title = html.escape(title)
    return (f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{title}</title>\n"
            f"<style>{STYLE}</style>\n<h1>{title}</h1>\n{body}\n</html>\n")


def section(title: str, inside: str) -> str:
    """Return a heading and the HTML below it."""
    return f"<h2>{title}</h2>\n{inside}"


def table(rows: list[tuple[str, str]]) -> str:
    """Return a table of names and values."""
    lines = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
             for name, value in rows]
    return f"<table>{''.join(lines)}</table>"


def bullets(items: list[str]) -> str:
    """Return a list, or a word where there is nothing to list."""
    if not items:
        return "<p>none</p>"
    lines = [f"<li>{html.escape(item)}</li>" for item in items]
    return f"<ul>{''.join(lines)}</ul>"


def curve(title: str, rows: list[dict[str, Any]], name: str) -> str:
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


def image(name: str, png: bytes) -> str:
    """Return an image with its name below."""
    data = base64.b64encode(png).decode()
    name = html.escape(name)
    return (f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
            f"<figcaption>{name}</figcaption></figure>")
