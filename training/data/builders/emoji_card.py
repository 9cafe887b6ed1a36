"""README.md and ATTRIBUTION.md of the emoji set."""

from __future__ import annotations

from typing import Any

from training.data.builders.dataset_folder import card_head
from training.data.builders.emoji_packages import STYLES, TWEMOJI_PIP, Package


def attribution(packages: list[Package]) -> str:
    """Format ATTRIBUTION.md: authors, licences and changes, as the CC BY licences ask."""
    lines = ["# Attribution", "",
             "The pictures and names come from these packages. The pictures were rasterised, "
             "scaled and laid over white.", "",
             "| style | package | version | licence | authors | source |",
             "|---|---|---|---|---|---|"]

    style_of = {style.package.name: name for name, style in STYLES.items()}
    style_of[TWEMOJI_PIP.name] = "twemoji"
    for package in packages:
        style = style_of.get(package.name, "(names)")
        cells = (style, package.name, package.version, package.licence, package.authors,
                 package.url)
        lines.append(f"| {' | '.join(cells)} |")

    lines += ["", "Licence texts: Apache-2.0 https://www.apache.org/licenses/LICENSE-2.0, MIT "
              "https://opensource.org/license/mit, "
              "CC BY 4.0 https://creativecommons.org/licenses/by/4.0/, "
              "CC BY-SA 4.0 https://creativecommons.org/licenses/by-sa/4.0/", ""]
    return "\n".join(lines)


def emoji_card(files: list[str], report: dict[str, Any], arguments: dict[str, Any]) -> str:
    """Format README.md."""
    size = arguments["size"]
    concepts = report["concepts"]
    rows = "\n".join(f"| {name} | {concepts[name]:,} | {count:,} |"
                     for name, count in report["pairs"].items())
    return f"""{card_head("other", files)}
# Emoji with captions

Pictures of {size} x {size} pixels over white, made by `tokenloom data emoji`.
Each row is one emoji in one drawing style. `captions` holds several true captions, \
`caption` the bare name.

| split | concepts | pairs |
|---|---|---|
{rows}

- `train`: everything that is not held out.
- `unseen_concept`: emoji that appear in `train` in no style, together with their gender variants.
- `unseen_style`: emoji that `train` shows in another style only.

Exact duplicate pictures were dropped before splitting. `base` is the code point of the emoji \
without a skin tone.
Licences and authors: ATTRIBUTION.md. Arguments, package versions and counts: build.json.
"""
