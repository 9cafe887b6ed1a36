"""Parse and format sizes in bytes; named preset sizes."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from tokenloom_common.errors import UserError

MIB = 1 << 20
UNITS = {"": 1, "B": 1}
"""Unit of a size -> bytes: KB, KiB, MB, ..."""
for _power, _letter in enumerate("KMGT", start=1):
    UNITS[f"{_letter}B"] = 1000**_power
    UNITS[f"{_letter}iB"] = 1024**_power
PRESET_SIZES: dict[str, Any] = {"grid": "16x16", "codebook_size": 16384, "text_length": 64,
                                "vocab_size": 16384}
"""Sizes that a preset leaves open, by the names of their options, with their defaults."""


def human(count: int) -> str:
    """Format bytes: 1,610,612,736 -> "1.50 GiB"."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):,.2f} {unit}"
    return f"{count} bytes"


def exact_and_human(count: int) -> str:
    """Format bytes: 2048 -> "2,048 bytes (2.00 KiB)"."""
    if count < 1024:
        return human(count)
    return f"{count:,} bytes ({human(count)})"


def bytes_of(text: str) -> int:
    """Parse --memory: "8GiB" -> 8,589,934,592. UserError for anything else."""
    # at most 18 digits: a mistake is refused here, instead of computed with
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([A-Za-z]*)", text.strip())
    if not found or found[2] not in UNITS:
        units = ", ".join(filter(None, UNITS))
        raise UserError(
            f"--memory '{text}': expected a number and a unit ({units}), such as 8GiB")
    return int(Fraction(found[1]) * UNITS[found[2]])  # exact, where a float would round


def grid_of(text: str) -> tuple[int, int]:
    """Parse --grid: "16x16" -> (16, 16). UserError for anything else."""
    sides = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if not sides:
        raise UserError(f"--grid '{text}': expected rows x columns, such as 16x16")
    return int(sides[1]), int(sides[2])
