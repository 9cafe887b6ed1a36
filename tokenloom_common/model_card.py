"""Write the README.md of a model folder: a model card with the Hub's metadata, from known facts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CARD_NAME = "README.md"
LIBRARY = "tokenloom"
UNKNOWN_LICENSE = "unknown"
MAX_CARD_BYTES = 1 << 20  # a card is a page of text; a folder's README.md may be anything


@dataclass(frozen=True)
class Measurement:
    """A measured number: `name` for people ("PSNR, dB"), `metric` for the Hub ("psnr")."""

    name: str
    metric: str
    value: float
    dataset: str
    split: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """The facts for a card. None or empty is unknown: left out, or stated where it matters.

    usage: Python code. pipeline_tag: the Hub's task of such models; task: what was measured, if
    that has another name. license: an identifier of the Hub (apache-2.0, cc-by-4.0, other).
    source: where a converted model came from. datasets: hub ids. attribution: Markdown about who
    made the data, with their licences. notes: Markdown, as it is. config: the whole recipe or
    config, shown folded.
    """

    title: str
    summary: str
    usage: str
    pipeline_tag: str | None = None
    task: str | None = None
    tags: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    measured: tuple[Measurement, ...] = ()
    license: str | None = None
    source: str | None = None
    datasets: tuple[str, ...] = ()
    data_license: str | None = None
    attribution: str | None = None
    notes: str | None = None
    config: dict[str, Any] | None = None


def model_card(facts: CardFacts) -> str:
    """The text of README.md: metadata between lines of dashes, then Markdown."""
    parts = [f"---\n{_metadata(facts)}\n---", f"# {facts.title}", facts.summary]
    parts.append(_table(facts))
    parts.append(f"```python\n{facts.usage}\n```")
    if facts.notes:
        parts.append(facts.notes.strip())
    parts.append(f"## Licence\n\n{_licence(facts)}")
    if facts.attribution:
        parts.append(f"## Who made the data\n\n{_demoted(facts.attribution)}")
    if facts.config is not None:
        text = yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True).strip()
        # folded, and last: pages long
        parts.append("<details>\n<summary>The whole config</summary>\n\n"
                     f"```yaml\n{text}\n```\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _table(facts: CardFacts) -> str:
    rows = list(facts.facts)
    for measurement in facts.measured:
        data = measurement.split or measurement.dataset
        rows.append((f"{measurement.name}, on `{data}`", f"{measurement.value:.4f}"))
    if not facts.measured:  # stated, so that nobody takes silence for quality
        rows.append(("quality", "not measured"))
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def read_card(folder: Path) -> str | None:
    """The README.md of a folder; None if there is none, or it is too large for a page of text."""
    path = folder / CARD_NAME
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def read_metadata(card: str) -> dict[str, Any]:
    """The metadata that opens a card; {} if there is none, or it is no YAML mapping."""
    # \r: a card edited on the Hub or on Windows may have such line ends
    block = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    if block is None:
        return {}
    try:
        values = yaml.safe_load(block[1])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _metadata(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = facts.task or facts.pipeline_tag or "other"
    results = [EvalResult(
        task_type=task, dataset_type=_slug(one.dataset), dataset_name=one.dataset,
        dataset_split=one.split, metric_type=one.metric, metric_name=one.name,
        metric_value=round(one.value, 6)) for one in facts.measured]
    return ModelCardData(
        library_name=LIBRARY, pipeline_tag=facts.pipeline_tag,
        license=facts.license or UNKNOWN_LICENSE, tags=[LIBRARY, *facts.tags],
        datasets=list(facts.datasets) or None,  # None is left out, an empty list is not
        model_name=facts.title if results else None,  # required by eval_results
        eval_results=results or None, ignore_metadata_errors=False).to_yaml()


def _licence(facts: CardFacts) -> str:
    if facts.license:
        text = f"`{facts.license}`."
    else:
        text = ("Nobody has chosen a licence for these weights, so none is granted here; ask "
                "whoever shared them.")
    if facts.source:
        text += f" Converted from {facts.source}, whose terms hold for the weights."
    if facts.data_license:
        text += f" The data says `{facts.data_license}` of itself."
    if facts.attribution:
        text += " See who made the data, below."
    return text


def _demoted(markdown: str) -> str:
    """Markdown without its title and with every other heading one level deeper."""
    lines = markdown.strip().splitlines()
    if lines and lines[0].startswith("# "):  # the card's own heading takes its place
        lines = lines[1:]
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in lines).strip()


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table: one line, with `|` escaped."""
    return " ".join(text.replace("|", "\\|").split())


def _slug(name: str) -> str:
    """A dataset's identifier: a hub id as it is, any other name in lower case and dashes."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "data"
