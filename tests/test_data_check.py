"""`data check` and the command line of `data`: the report, exit codes, wrong uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bad_images import ACCEPTED, REFUSED, encode, photo
from tests.source_files import own_cache  # noqa: F401 (a fixture for all tests here)
from tokenloom_common.errors import UserError, run_command
from training.commands.data import main
from training.data.check import check_data, format_report


def write_folder(root: Path, pictures: dict[str, bytes], captions: dict[str, object]) -> Path:
    """Pictures by name with a metadata.jsonl of captions."""
    root.mkdir(exist_ok=True)
    for name, content in pictures.items():
        (root / name).write_bytes(content)
    lines = [json.dumps({"file_name": name, "text": text, "source": "me"}) for name, text in captions.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def test_report_counts_sizes_captions_and_duplicates(tmp_path):
    a, b = encode(photo(40, 24, 1), "PNG"), encode(photo(64, 48, 2), "PNG")
    folder = write_folder(tmp_path / "d", {"a.png": a, "b.png": b, "c.bmp": encode(photo(40, 24, 1), "BMP")},
                          {"a.png": "a dog", "b.png": ["a dog", "\0x" * 3, "y" * 10_000], "c.bmp": ["a cat"]})
    report = check_data(folder)
    assert (report["items"], report["usable"], report["captions"]) == (3, 3, 5)
    assert report["width"] == {"min": 40, "median": 40, "max": 64} and report["height"]["max"] == 48
    assert report["captions_per_image"] == {"min": 1, "median": 1, "max": 3}
    assert report["caption_characters"] == {"min": 3, "median": 5, "max": 2000}
    assert report["caption_repairs"] == {"NUL characters": 1, "too long": 1}
    assert report["duplicate_pictures"] == 1 and report["duplicate_picture_groups"] == [["a.png", "c.bmp"]]
    assert report["duplicate_captions"] == 1 and report["most_frequent_captions"] == [["a dog", 2]]
    text = format_report(report)
    for line in ("usable images      3 of 3", "width              40 to 64, median 40 pixels", "unusable           0",
                 "duplicate pictures 1 (such as a.png = c.bmp)", "other columns      source"):
        assert line in text.splitlines()


def test_every_unusable_item_is_reported_with_its_reason(tmp_path):
    pictures = {f"{n}.png": content for n, (content, _) in enumerate(REFUSED.values())}
    good = {f"ok{n}.png": content for n, content in enumerate(ACCEPTED.values())}
    folder = write_folder(tmp_path / "d", pictures | good, dict.fromkeys([*pictures, *good, "gone.png"], "x"))
    report = check_data(folder)
    assert report["usable"] == len(ACCEPTED)
    assert report["unusable"] == [{"key": "gone.png", "reason": "missing file"}] + [
        {"key": name, "reason": reason} for name, (_, reason) in zip(pictures, REFUSED.values(), strict=True)]
    assert sum(report["unusable_by_reason"].values()) == len(REFUSED) + 1
    assert "  gone.png: missing file" in format_report(report).splitlines()


def test_first_twenty_are_listed_and_json_has_all(tmp_path, capsys):
    folder = write_folder(tmp_path / "d", {"a.png": encode(photo(), "PNG")},
                          {"a.png": "x", **{f"gone{n}.png": "x" for n in range(33)}})
    assert main(["check", str(folder), "--json", str(tmp_path / "out" / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "  and 13 more (all of them with --json FILE)" and lines[-4] == "  gone19.png: missing file"
    assert len(json.loads((tmp_path / "out" / "r.json").read_text())["unusable"]) == 33


def test_nothing_usable_exits_1_and_says_why(tmp_path, capsys):
    folder = write_folder(tmp_path / "d", {"a.png": b""}, {"a.png": "x", "b.png": "y"})
    assert main(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "usable images      0 of 2" in out and "a.png: empty file" in out and "b.png: missing file" in out


def test_exit_codes_of_wrong_uses(tmp_path, capsys):
    def run(*argv: str) -> int:
        return run_command(main, argv, "tokenloom data")

    assert run("check", str(tmp_path / "nowhere")) == 2
    assert run("check", str(tmp_path)) == 1
    assert run("shapes", "--out", str(tmp_path / "s"), "--size", "3") == 2
    shown = capsys.readouterr()
    assert shown.err.count("tokenloom data: error: ") == 2
    assert "holds nothing readable" in shown.out
    for argv in (["shapes"], ["nothing"], [], ["check", "x", "--jsn", "y"], ["emoji", "--out", "x", "--size", "big"]):
        assert run(*argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(UserError, match="unknown style 'notto'"):
        main(["emoji", "--out", str(tmp_path / "e"), "--styles", "noto,notto"])


def test_help_has_examples(capsys):
    for argv in (["--help"], ["emoji", "--help"], ["shapes", "--help"], ["check", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0 and "tokenloom data" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize("dash", ["_", "-"])
def test_command_line_values_reach_the_builders(tmp_path, capsys, monkeypatch, dash):
    seen = {}

    def build(name):
        def fake(*arguments):
            seen[name] = arguments
            return {"reused": name == "shapes", "seconds": 1.5, "pairs": {"train": 1200},
                    "dropped": {"blank picture": 2}}
        return fake

    monkeypatch.setattr("training.data.builders.emoji.build_emoji", build("emoji"))
    monkeypatch.setattr("training.data.builders.shapes.build_shapes", build("shapes"))
    assert main(["emoji", "--out", "e", "--size", "48", "--styles", "noto,twemoji", "openmoji", "--source", "pip",
                 f"--num{dash}concepts", "30", f"--with{dash}tones", "--seed", "5"]) == 0
    assert main(["shapes", "--out", "s", "--size", "40", f"--num{dash}scenes", "50", f"--max{dash}objects", "3",
                 "--seed", "6"]) == 0
    assert seen == {"emoji": (Path("e"), 48, ["noto", "twemoji", "openmoji"], "pip", 30, True, 5),
                    "shapes": (Path("s"), 40, 50, 6, 3)}
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "e: built in 1.5 s: 1,200 train (dropped 2 blank picture)"
    assert out[1].startswith("s: already built with these arguments: 1,200 train")


def test_shapes_from_the_command_line_check_clean(tmp_path, capsys):
    assert main(["shapes", "--out", str(tmp_path / "s"), "--size", "16", "--num_scenes", "30"]) == 0
    assert main(["check", str(tmp_path / "s"), "--split", "unseen_combination"]) == 0
    assert "usable images      3 of 3" in capsys.readouterr().out
