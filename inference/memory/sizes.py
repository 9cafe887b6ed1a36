"""Parse and format sizes in bytes; named preset sizes."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from tokenloom_common.errors import UserError


def human(count: int) -> str:
    """1,610,612,736 -> "1.50 GiB"."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):,.2f} {unit}"
    return f"{count} bytes"


def _both(count: int) -> str:
    return f"{count:,} bytes ({human(count)})" if count >= 1024 else human(count)


MIB = 1 << 20


UNITS = {"": 1, "B": 1, **{f"{letter}{end}": base**power for power, letter in enumerate("KMGT", 1)
                           for end, base in (("B", 1000), ("iB", 1024))}}


PRESET_SIZES: dict[str, Any] = {"grid": "16x16", "codebook_size": 16384, "text_length": 64, "vocab_size": 16384}
"""What a preset leaves open, as options, and what they are by default."""


def bytes_of(text: str) -> int:
    """"8GiB" -> 8,589,934,592."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([A-Za-z]*)", text.strip())
    if not found or found[2] not in UNITS:
        raise UserError(f"--memory '{text}': expected a number and a unit ({', '.join(filter(None, UNITS))}), such as 8GiB")
    return int(Fraction(found[1]) * UNITS[found[2]])


def grid_of(text: str) -> tuple[int, int]:
    """"16x16" -> (16, 16)."""
    sides = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if not sides:
        raise UserError(f"--grid '{text}': expected rows x columns, such as 16x16")
    return int(sides[1]), int(sides[2])
