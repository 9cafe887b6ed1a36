"""Origin of a folder of data: its name, its licence, who made it. Token shards pass it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tokenloom_common.files import write_text_atomic
from tokenloom_common.hub import is_hub_id
from tokenloom_common.model_card import CARD_NAME, read_card, read_metadata

ATTRIBUTION_NAME = "ATTRIBUTION.md"
OWN_FILES = (CARD_NAME, ATTRIBUTION_NAME)
MAX_ATTRIBUTION_BYTES = 1 << 17  # it is copied into all token shards made from the data


@dataclass(frozen=True)
class DataOrigin:
    """Name of the folder or the hub id; license and attribution (Markdown) as the data has them."""

    name: str
    hub_id: str | None = None
    license: str | None = None
    attribution: str | None = None


def data_origin(path: str) -> DataOrigin:
    """Read README.md and ATTRIBUTION.md of a local folder; of a hub id, return the id alone."""
    if is_hub_id(path):
        return DataOrigin(path, hub_id=path)
    # a single parquet or tar file, or shards in braces, are described beside them
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    metadata = read_metadata(read_card(folder) or "")
    name = _text(metadata.get("pretty_name"))
    if name is None:
        name = Path(path).resolve().name

    # of token shards made from a hub data set, written by `write_origin`
    sources = metadata.get("source_datasets")
    source = _text(sources[0]) if isinstance(sources, list) and sources else None
    hub_id = source if source is not None and is_hub_id(source) else None
    attribution = _read_attribution(folder / ATTRIBUTION_NAME)
    return DataOrigin(name, hub_id, _text(metadata.get("license")), attribution)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None  # a card is anybody's YAML


def write_origin(origin: DataOrigin, folder: Path, what: str) -> None:
    """Write README.md and, if there is an attribution, ATTRIBUTION.md of data made from that data.

    what: a sentence that says what the new data is.
    """
    metadata = {
        "license": origin.license,
        "pretty_name": origin.name,
        "source_datasets": [origin.hub_id] if origin.hub_id else None,
    }
    known = {key: value for key, value in metadata.items() if value is not None}
    head = yaml.safe_dump(known, sort_keys=False).strip()
    card = f"---\n{head}\n---\n\n# {origin.name}\n\n{what}\n"
    write_text_atomic(folder / CARD_NAME, card)
    if origin.attribution is not None:
        write_text_atomic(folder / ATTRIBUTION_NAME, origin.attribution)


def _read_attribution(path: Path) -> str | None:
    if not path.is_file() or path.stat().st_size > MAX_ATTRIBUTION_BYTES:
        return None
    return path.read_text(encoding="utf-8", errors="replace")
