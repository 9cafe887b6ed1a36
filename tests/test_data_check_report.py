"""What `data check` says beyond counts: how data is read, its splits, and what to run next."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import datasets
import pytest

from tests.bad_images import encode, photo
from tests.published_sets import put
from tests.source_files import PNG, as_bytes, own_cache, write_parquet, write_tar  # noqa: F401
from tokenloom_common.errors import run_command
from training.commands.data import main
from training.commands.next_command import RECIPES, WAYS, after_images, after_tokens, in_one_command
from training.config.loading import load_config
from training.config.tokenizer import TokenizerRunConfig
from training.data.check import check_data, format_report
from training.data.sources.options import FORMATS


def sidecars(root: Path, count: int = 2, side: int = 20, ending: str = ".txt") -> Path:
    for number in range(count):
        put(root / f"{number}.png", encode(photo(side, side + 4, number), "PNG"))
        put(root / f"{number}{ending}", f"caption {number}")
    return root


def parse(words: list[str]) -> TokenizerRunConfig:
    """The config of a printed command: python script options."""
    return load_config(TokenizerRunConfig, words[2:], words[1], "text")


def next_words(capsys, *argv: str | Path) -> list[str]:
    """The words of the command that a check ends with."""
    assert main(["check", *map(str, argv)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.match("(next|or step by step): ", last)
    assert found
    return shlex.split(last[found.end():])


def test_report_says_how_the_data_is_read_and_the_size_of_every_split(tmp_path, capsys):
    for split, count in (("train", 3), ("val", 2)):
        sidecars(tmp_path / "d" / split, count)
    report = check_data(tmp_path / "d")
    assert report["format"] == "sidecar" and report["reason"]
    assert report["splits"] == {"train": 3, "validation": 2}
    lines = format_report(report).splitlines()
    assert lines[1] == f"read as            {report['reason']}"
    assert lines[2] == "splits             train 3, validation 2"


def test_split_sizes_of_parquet_come_from_the_footers_and_damage_is_not_known(tmp_path):
    for split, count in (("train", 2), ("test", 4)):
        write_parquet(tmp_path / f"d/{split}-00000-of-00001.parquet", [as_bytes(PNG)] * count, ["x"] * count)
    assert check_data(tmp_path / "d")["splits"] == {"test": 4, "train": 2}
    assert check_data(tmp_path / "d", split="test", streamed_rows=1)["splits"] == {"test": 4, "train": 2}
    put(tmp_path / "d/test-00000-of-00001.parquet", "broken")
    report = check_data(tmp_path / "d")
    assert report["splits"] == {"test": None, "train": 2}
    assert "splits             test (size not known), train 2" in format_report(report).splitlines()


def test_split_sizes_of_tars_count_their_unusable_items(tmp_path):
    write_tar(put(tmp_path / "d/train-0.tar", ""), [("0.png", PNG), ("0.txt", b"x")])
    write_tar(put(tmp_path / "d/val-0.tar", ""), [("0.png", PNG), ("0.txt", b"x"), ("1.png", PNG)])
    assert check_data(tmp_path / "d")["splits"] == {"train": 1, "validation": 2}


def test_split_sizes_of_the_hub_are_those_of_its_card(monkeypatch):
    from training.data.sources.tables import table

    card = type("Builder", (), {"info": datasets.DatasetInfo(splits={"train": {"name": "train", "num_examples": 60_000}})})
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: card)
    assert table.hub_split_sizes("owner/name") == {"train": 60_000, "test": None}


def test_failed_downloads_and_encodings_have_lines_of_their_own(tmp_path, monkeypatch):
    import training.data.check as check

    load = check.load_source

    def load_with_facts(*arguments, **options):
        data = load(*arguments, **options)
        data.left_out = Counter({"downloads failed": 30})
        data.encodings = Counter({"UTF-8": 1500, "UTF-16": 2})
        return data

    monkeypatch.setattr(check, "load_source", load_with_facts)
    report = check_data(sidecars(tmp_path / "d"))
    assert report["left_out"] == {"downloads failed": 30} and report["encodings"]["UTF-16"] == 2
    lines = format_report(report).splitlines()
    assert "downloads failed   30" in lines and "encodings          UTF-8 1,500, UTF-16 2" in lines
    assert lines[-1] == "unusable           0"


@pytest.mark.parametrize(("side", "recipe", "resolution"), [
    (300, "small", 128), (120, "small", 128), (64, "small", 64), (32, "shapes32", 32), (20, "debug", 16)])
def test_next_command_has_a_recipe_and_a_resolution_that_fit_the_pictures(tmp_path, capsys, side, recipe, resolution):
    words = next_words(capsys, sidecars(tmp_path / "my pictures", side=side))
    assert words[:4] == ["python", "training/train_tokenizer.py", "--config",
                         f"training/recipes/{recipe}_tokenizer.yaml"]
    config = parse(words)
    assert config.model.resolution == resolution and config.data.path == str(tmp_path / "my pictures")


def test_every_recipe_that_may_be_named_can_be_run_as_it_is_printed():
    for side, _, _ in RECIPES:
        report = {"usable": 9, "items": 9, "unusable": [], "split": None, "path": "d", "splits": {"train": 9},
                  "shorter_side": {"median": side}}
        assert parse(shlex.split(after_images(report, {}))).run_dir == "runs/tokenizer"


def test_next_command_repeats_the_options_and_holds_out_what_is_held_out(tmp_path, capsys):
    for split in ("train", "val"):
        sidecars(tmp_path / "a b" / split)
    words = next_words(capsys, tmp_path / "a b", "--encoding", "cp1252", "--max-pixels", "5000", "--follow-links")
    for option in ("--data.encoding cp1252", "--data.max_pixels 5000", "--data.follow_links true",
                   "--data.validation_split validation"):
        assert option in " ".join(words)
    assert "--data.split val" in " ".join(next_words(capsys, tmp_path / "a b", "--split", "validation"))


def test_next_is_one_command_that_tokenloom_train_takes(tmp_path, capsys):
    from training.commands.train import _parser

    folder = sidecars(tmp_path / "a b", 30)
    for number in range(12):
        (folder / f"{number}.txt").unlink()
    assert main(["check", str(folder), "--encoding", "cp1252"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: "))
    assert words[:2] == ["tokenloom", "train"]
    arguments = _parser().parse_args(words[2:])
    assert (arguments.data, arguments.out, arguments.minutes) == (str(folder), "my_model", 60)
    assert (arguments.encoding, arguments.max_bad_fraction) == ("cp1252", 0.4)
    # rows that stream are not copied: the scripts read them where they lie
    report = {"usable": 9, "items": 9, "unusable": [], "split": None, "path": "d"}
    assert in_one_command(report, {"streaming": True}) is None
    assert in_one_command(report, {}) == "tokenloom train d --out my_model --minutes 60"


def test_next_command_raises_the_limit_that_the_data_would_break(tmp_path, capsys):
    folder = sidecars(tmp_path / "d", 30)
    for number in range(12):
        (folder / f"{number}.txt").unlink()
    words = next_words(capsys, folder)
    assert words[words.index("--data.max_bad_fraction") + 1] == "0.4"
    config = parse(words)
    assert config.data.max_bad_fraction == 0.4


@pytest.mark.parametrize("spelling", ["--caption-ending", "--caption_ending", "--data.caption_ending",
                                      "--data.caption-ending"])
def test_options_of_messages_can_be_pasted(tmp_path, capsys, spelling):
    words = next_words(capsys, sidecars(tmp_path / "d"), spelling, ".txt")
    assert words[words.index("--data.caption_ending") + 1] == ".txt"


@pytest.mark.parametrize(("argv", "given"), [
    (["--data.follow_links", "true"], True), (["--data.follow_links"], True), (["--follow_links", "false"], False)])
def test_flags_may_have_the_value_that_a_config_has(tmp_path, capsys, argv, given):
    words = next_words(capsys, sidecars(tmp_path / "d"), *argv)
    assert ("--data.follow_links" in words) == given


def test_help_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown.split("several ways: ")[1].split("--caption-column")[0] for name in FORMATS)


def test_wrong_reading_options_are_one_line(tmp_path, capsys):
    folder = str(sidecars(tmp_path / "d"))
    for argv, part in ((["--format", "sidecars"], "did you mean 'sidecar'"), (["--max-pixels", "0"], "1 to 1,000"),
                       (["--encoding", "utf-9"], "--data.encoding utf-9: no such encoding"),
                       (["--data.follow_links", "perhaps"], "give true or false")):
        assert run_command(main, ["check", folder, *argv], "tokenloom data") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line


def test_nothing_usable_ends_with_the_nearest_way_on(tmp_path, capsys):
    folder = put(tmp_path / "d/a.png", PNG).parent
    put(folder / "metadata.jsonl", json.dumps({"file_name": "gone.png", "text": "x"}))
    assert main(["check", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] .endswith(f"d/gone.png; {WAYS['missing file']}")
    report = {"usable": 0, "hints": ["looked for d/train/0.png"], "unusable_by_reason": {"missing file": 2}}
    assert after_images(report, {}) == f"looked for d/train/0.png; {WAYS['missing file']}"
    assert "check again" in after_images({"usable": 0, "hints": [], "unusable_by_reason": {"corrupt": 2}}, {})


def test_json_has_the_facts_of_the_report(tmp_path, capsys):
    words = next_words(capsys, sidecars(tmp_path / "d"), "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert shlex.split(report["next"]) == words and report["splits"] == {"train": 2}
    assert {"format", "reason", "encodings", "left_out", "hints", "shorter_side"} <= report.keys()


def test_whole_tokens_are_trained_on_next_and_damaged_ones_encoded_again():
    report = {"path": "my tokens", "usable": 4, "damaged": [], "split": None}
    assert after_tokens(report) == ("python training/train_seq2seq.py --config training/recipes/small_seq2seq.yaml "
                                    "--data.path 'my tokens' --image_tokenizer runs/tokenizer/model "
                                    "--run_dir runs/seq2seq")
    assert "encode_dataset.py" in after_tokens({**report, "damaged": [{"split": "train"}]})
