"""What a folder of data says of where it comes from: its name, its licence, who made it. Token shards pass it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from tokenloom_common.files import write_text_atomic
from tokenloom_common.hub import is_hub_id
from tokenloom_common.model_card import CARD_NAME, read_card, read_metadata

ATTRIBUTION_NAME = "ATTRIBUTION.md"
OWN_FILES = (CARD_NAME, ATTRIBUTION_NAME)
MAX_ATTRIBUTION_BYTES = 1 << 17


@dataclass(frozen=True)
class DataOrigin:
    """name: of the folder, or the hub id; license and attribution (Markdown) as the data has them, None if it says nothing."""

    name: str
    hub_id: str | None = None
    license: str | None = None
    attribution: str | None = None


def data_origin(path: str) -> DataOrigin:
    """Read from the README.md and ATTRIBUTION.md of a local folder; of a hub id no more than the id is known."""
    if is_hub_id(path):
        return DataOrigin(path, hub_id=path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    metadata = read_metadata(read_card(folder) or "")
    name, source = metadata.get("pretty_name"), metadata.get("source_datasets")
    licence = metadata.get("license")
    hub_id = source[0] if isinstance(source, list) and source and isinstance(source[0], str) and is_hub_id(source[0]) else None
    return DataOrigin(name if isinstance(name, str) else Path(path).resolve().name, hub_id,
                      licence if isinstance(licence, str) else None, _attribution(folder / ATTRIBUTION_NAME))


def write_origin(origin: DataOrigin, folder: Path, what: str) -> None:
    """README.md and, if there is an attribution, ATTRIBUTION.md of data made from that data; `what` it is now, a sentence."""
    metadata = {"license": origin.license, "pretty_name": origin.name,
                "source_datasets": [origin.hub_id] if origin.hub_id else None}
    head = yaml.safe_dump({key: value for key, value in metadata.items() if value is not None}, sort_keys=False).strip()
    write_text_atomic(folder / CARD_NAME, f"---\n{head}\n---\n\n# {origin.name}\n\n{what}\n")
    if origin.attribution is not None:
        write_text_atomic(folder / ATTRIBUTION_NAME, origin.attribution)


def _attribution(path: Path) -> str | None:
    if not path.is_file() or path.stat().st_size > MAX_ATTRIBUTION_BYTES:
        return None
    return path.read_text(encoding="utf-8", errors="replace")
