"""Token shards: what is written is read back, from a memory map; damage is named; visits draw captions, views and noise."""

from __future__ import annotations

import json
import pickle

import numpy
import pyarrow
import pyarrow.ipc
import pytest
import torch

from tests import tiny
from tokenloom_common.errors import DataError, MissingFileError, UserError
from tokenloom_common.files import file_hash
from training.commands.data import main as data_command
from training.data.tokens import shards as token_shards
from training.data.tokens.shards import (
    ShardFile,
    SplitIndex,
    TokenIndex,
    TokenShards,
    check_same_tokenizer,
    token_dtype,
    write_index,
    write_shard,
)
from training.data.visits.order import ItemId
from training.data.visits.tokens import CollateTokens, TokenVisits

NAMES = [f"train-0000{number}-of-00002.arrow" for number in range(2)]
TOKENS = numpy.arange(24, dtype=numpy.uint16).reshape(6, 4)
CAPTIONS = [[f"caption {i}", f"other {i}"] for i in range(6)]


def index(files, **changes) -> TokenIndex:
    values = {"tokenizer_fingerprint": "f", "codebook_size": 32, "grid": (2, 2), **changes}
    return TokenIndex(**values, splits={"train": SplitIndex(rows=6, files=files), "none": SplitIndex(rows=0, files=[])})


@pytest.fixture
def shards(tmp_path):
    files = [write_shard(tmp_path / NAMES[0], CAPTIONS[:4], TOKENS[:4], [f"k{i}" for i in range(4)]),
             write_shard(tmp_path / NAMES[1], CAPTIONS[4:], TOKENS[4:], ["k4", "k5"])]
    write_index(tmp_path, index(files))
    return tmp_path


def check_content(read: TokenShards) -> None:
    assert len(read) == 6
    assert [read.image_tokens(row).tolist() for row in range(6)] == TOKENS.tolist()
    assert [read.captions(row) for row in range(6)] == CAPTIONS
    assert [read.key(row) for row in range(6)] == [f"k{i}" for i in range(6)]
    assert read.all_captions() == [caption for row in CAPTIONS for caption in row]
    captions, columns = read.gather(numpy.array([5, 0, 4, 4]), numpy.zeros(4, dtype=int), numpy.array([0.4, 0.5, 0.99, 0]))
    assert captions == ["caption 5", "other 0", "other 4", "caption 4"]
    assert columns["tokens"].tolist() == TOKENS[[5, 0, 4, 4]].tolist()
    assert read.gather(numpy.array([3]), numpy.zeros(1, dtype=int), None)[0] == ["caption 3"]


def test_token_shards_give_back_what_was_written(shards):
    check_content(TokenShards(shards, "train"))
    check_content(pickle.loads(pickle.dumps(TokenShards(shards, "train"))))


def test_rows_lie_in_the_file_and_not_in_memory(shards):
    read = TokenShards(shards, "train")
    before = pyarrow.total_allocated_bytes()
    array = read.image_tokens(2)
    assert not array.flags.owndata and not array.flags.writeable
    assert pyarrow.total_allocated_bytes() == before


def test_token_shards_are_read_by_datasets(shards):
    import datasets

    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(shards / name)) for name in NAMES])
    assert rows[5]["tokens"] == [20, 21, 22, 23]
    assert rows.column_names == ["captions", "tokens", "key"]
    assert rows[5]["captions"] == CAPTIONS[5]


def test_caption_dropout_gives_the_null_caption_at_its_rate(shards):
    visits = TokenVisits(TokenShards(shards, "train"), seed=0, caption_dropout=0.25)
    items = [ItemId(epoch, row) for epoch in range(200) for row in range(6)]
    seen = visits.__getitems__(items).captions
    assert sum(c == "" for c in seen) / len(seen) == pytest.approx(0.25, abs=0.04)
    assert {c for c in seen if c.endswith("3")} == {"caption 3", "other 3"}
    assert [visits[item].captions[0] for item in items[:50]] == seen[:50]
    batch = CollateTokens(tiny.text_tokenizer())(visits.__getitems__([ItemId(0, i) for i in range(3)]))
    assert batch.image_tokens.shape == (3, 4)
    assert batch.image_tokens.dtype == torch.int64
    assert batch.text.text_input.shape == (3, tiny.TEXT_LENGTH)
    first = TokenVisits(TokenShards(shards, "train"), 0, 0.0, first_caption=True).__getitems__(items[:12])
    assert first.captions == [f"caption {item.index}" for item in items[:12]]


def test_token_corruption_replaces_its_share_of_the_inputs_and_never_a_target(shards):
    read = TokenShards(shards, "train")
    visits = TokenVisits(read, seed=0, caption_dropout=0.0, token_corruption=0.3)
    items = [ItemId(epoch, row) for epoch in range(300) for row in range(6)]
    rows = visits.__getitems__(items)
    assert rows.image_tokens.tolist() == TOKENS.tolist() * 300
    assert rows.input_tokens.dtype == numpy.uint16 and rows.input_tokens.max() < 32
    changed = rows.input_tokens != rows.image_tokens
    assert changed.mean() == pytest.approx(0.3 * 31 / 32, abs=0.02)  # a random code is the right one now and then
    assert changed.mean(axis=0) == pytest.approx(0.3 * 31 / 32, abs=0.04)  # at every place alike
    assert len(numpy.unique(rows.input_tokens[changed])) == 32
    assert visits[items[45]].input_tokens.tolist() == rows.input_tokens[45:46].tolist()
    plain = TokenVisits(read, seed=0, caption_dropout=0.0)[ItemId(0, 0)]
    assert plain.input_tokens.tolist() == plain.image_tokens.tolist()


def test_each_visit_draws_one_of_a_pictures_views(tmp_path):
    tokens = numpy.stack([TOKENS, TOKENS + 1, TOKENS + 2], axis=1).reshape(6, 12)
    layouts = numpy.stack([TOKENS, TOKENS + 1, TOKENS + 2], axis=1).reshape(6, 12)
    file = write_shard(tmp_path / NAMES[0], CAPTIONS, tokens, [f"k{i}" for i in range(6)], layouts)
    write_index(tmp_path, index([file], views=["plain", "a", "b"],
                                layout=token_shards.LayoutIndex(kind="colors", classes=27, grid=(2, 2))))
    read = TokenShards(tmp_path, "train")
    assert read.image_tokens(2, 1).tolist() == (TOKENS[2] + 1).tolist() == read.layout(2, 1).tolist()
    rows = TokenVisits(read, 0, 0.0).__getitems__([ItemId(epoch, 3) for epoch in range(300)])
    counts = [int((rows.image_tokens == TOKENS[3] + view).all(axis=1).sum()) for view in range(3)]
    assert sum(counts) == 300 and min(counts) > 70
    assert rows.layout.tolist() == rows.image_tokens.tolist()  # of the same view
    alone = TokenVisits(read, 0, 0.0, first_view=True).__getitems__([ItemId(epoch, 3) for epoch in range(50)])
    assert alone.image_tokens.tolist() == [TOKENS[3].tolist()] * 50


def test_large_codebooks_get_wider_tokens(tmp_path):
    assert token_dtype(1 << 16) == numpy.uint16
    assert token_dtype((1 << 16) + 1) == numpy.uint32
    wide = TOKENS.astype(numpy.uint32) + 70_000
    write_index(tmp_path, index([write_shard(tmp_path / NAMES[0], CAPTIONS, wide, list("abcdef"))], codebook_size=80_000))
    assert TokenShards(tmp_path, "train").image_tokens(5).tolist() == wide[5].tolist()


def _flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"caption 4") + 8] ^= 1
    path.write_bytes(content)


def _replaced(folder, captions, tokens, keys) -> None:
    file = write_shard(folder / NAMES[1], captions, tokens, keys)
    values = json.loads((folder / "tokens.json").read_text())
    values["splits"]["train"]["files"][1] = file.plain()
    (folder / "tokens.json").write_text(json.dumps(values))


@pytest.mark.parametrize(("damage", "error", "words"), [
    (lambda f: (f / "tokens.json").unlink(), MissingFileError, "tokens.json is missing"),
    (lambda f: (f / "tokens.json").write_text("{}"), UserError, "missing key"),
    (lambda f: (f / NAMES[1]).unlink(), MissingFileError, "00001-of-00002"),
    (lambda f: (f / NAMES[1]).write_bytes(b"ARROW1"), UserError, r"not a whole token shard \(6 bytes"),
    (lambda f: (f / NAMES[1]).write_bytes(bytes((f / NAMES[1]).stat().st_size)), UserError, "not a whole token shard"),
    (lambda f: _flip(f / NAMES[1]), UserError, r"damaged \(its hash"),
    (lambda f: _replaced(f, [["a"]], numpy.zeros((1, 4), numpy.uint16), ["x"]), UserError, "holds 5 rows"),
    (lambda f: _replaced(f, [["a"]] * 2, numpy.full((2, 4), 32, numpy.uint16), ["x"] * 2), UserError,
     "outside the codebook of 32"),
    (lambda f: _replaced(f, [["a"]] * 2, numpy.zeros((2, 5), numpy.uint16), ["x"] * 2), UserError, "do not fill"),
])
def test_damaged_token_shards_are_named(shards, damage, error, words):
    damage(shards)
    with pytest.raises(error, match=words) as caught:
        TokenShards(shards, "train")
    assert str(shards) in str(caught.value)
    assert "\n" not in str(caught.value)


U16 = pyarrow.list_(pyarrow.uint16())
GOOD = {"captions": pyarrow.array([["a"], ["b"]]), "tokens": pyarrow.array([[0, 1, 2, 3]] * 2, U16),
        "key": pyarrow.array(["x", "y"])}


@pytest.mark.parametrize(("columns", "words"), [
    ({"tokens": pyarrow.array([[0, 1, 2], [3, 4, 5, 6, 7]], U16)}, "rows of tokens have 3 to 5 numbers"),
    ({"tokens": pyarrow.array([[0, 1, 2, -1]] * 2)}, "column tokens is not as encode_dataset writes it"),
    ({"tokens": pyarrow.array([[0.5] * 4] * 2)}, "column tokens is not as"),
    ({"tokens": pyarrow.array([1, 2])}, "column tokens is not as"),
    ({"tokens": pyarrow.array([[0, 1, 2, 3], None], U16)}, "column tokens .* 1 missing"),
    ({"captions": pyarrow.array([["a"], None])}, "column captions .* 1 missing"),
    ({"captions": pyarrow.array([["a"], []], pyarrow.list_(pyarrow.string()))}, "a row has no caption"),
    ({"captions": pyarrow.array([["a"], ["b"]], pyarrow.large_list(pyarrow.string()))}, "column captions is not as"),
    ({"captions": pyarrow.array([["a"], ["b"]], pyarrow.list_(pyarrow.large_string()))}, "column captions is not as"),
    ({"captions": pyarrow.array(["a", "b"])}, "column captions is not as"),
    ({"key": pyarrow.array([1, 2])}, "column key is not as")])
def test_files_that_others_wrote_otherwise_are_refused(columns, words, tmp_path):
    table = pyarrow.table({**GOOD, **columns})
    path = tmp_path / "a.arrow"
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    file = ShardFile(name="a.arrow", rows=2, size=path.stat().st_size, blake2b=file_hash(path))
    write_index(tmp_path, TokenIndex(tokenizer_fingerprint="f", codebook_size=32, grid=(2, 2),
                                     splits={"train": SplitIndex(rows=2, files=[file])}))
    with pytest.raises(UserError, match=words):
        TokenShards(tmp_path, "train")


def test_an_index_of_another_schema_is_refused(shards):
    values = json.loads((shards / "tokens.json").read_text())
    for version in (1, 3):
        (shards / "tokens.json").write_text(json.dumps({**values, "schema_version": version}))
        with pytest.raises(UserError, match=f"schema_version is {version}, this release reads 2"):
            TokenShards(shards, "train")


def test_an_index_does_not_lead_out_of_its_folder(shards):
    values = json.loads((shards / "tokens.json").read_text())
    values["splits"]["train"]["files"][1]["name"] = f"../{shards.name}/{NAMES[1]}"
    (shards / "tokens.json").write_text(json.dumps(values))
    with pytest.raises(MissingFileError, match="a token shard is missing"):
        TokenShards(shards, "train")


@pytest.mark.parametrize("values", [{"grid": [-2, -2]}, {"grid": [0, 4]}, {"codebook_size": 10**15}])
def test_an_index_that_cannot_be_is_refused(values, shards):
    (shards / "tokens.json").write_text(json.dumps({**json.loads((shards / "tokens.json").read_text()), **values}))
    with pytest.raises(UserError, match=next(iter(values))):
        TokenShards(shards, "train")


def test_large_shards_are_checked_when_their_first_row_is_read(shards, monkeypatch):
    monkeypatch.setattr(token_shards, "CHECKED_AT_ONCE", 0)
    _flip(shards / NAMES[1])
    read = TokenShards(shards, "train")
    assert read.captions(3) == CAPTIONS[3]
    for ask in (lambda: read.captions(4), lambda: read.image_tokens(5), lambda: read.key(5), read.all_captions,
                lambda: read.gather(numpy.array([0, 5]), numpy.zeros(2, dtype=int), None), read.check):
        with pytest.raises(UserError, match=r"00001-of-00002\.arrow: damaged"):
            ask()


def test_a_shard_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_shards, "sync_path", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / NAMES[0], CAPTIONS, TOKENS, list("abcdef"))
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_empty_splits_are_refused(shards):
    with pytest.raises(UserError, match="did you mean 'train'"):
        TokenShards(shards, "trian")
    with pytest.raises(DataError, match="no rows"):
        TokenShards(shards, "none")
    with pytest.raises(MissingFileError, match="encode_dataset"):
        TokenShards(shards / "nowhere", "train")


@pytest.mark.parametrize(("codebook", "grid", "fingerprint", "words"), [
    (64, (2, 2), "f", "codebook size 32"), (32, (4, 4), "f", "grid"), (32, (2, 2), "g", "fingerprint f")])
def test_tokens_of_another_tokenizer_are_refused(shards, codebook, grid, fingerprint, words):
    found = TokenShards(shards, "train").index
    check_same_tokenizer(found, shards, 32, (2, 2), "f", "tok")
    with pytest.raises(UserError, match=words) as caught:
        check_same_tokenizer(found, shards, codebook, grid, fingerprint, "tok")
    assert "encode_dataset" in str(caught.value)


def test_check_reports_what_shards_hold_and_what_is_damaged(shards, capsys):
    assert data_command(["check", str(shards), "--json", str(shards / "report.json")]) == 0
    assert "train: 6 rows in 2 whole file(s), 12 captions of 7 to 9 characters (median 8); 75.0 % of the codes in use, " \
           "perplexity 24.0" in capsys.readouterr().out
    report = json.loads((shards / "report.json").read_text())
    assert (report["usable"], report["items"], report["damaged"]) == (6, 6, [])
    _flip(shards / NAMES[1])
    assert data_command(["check", str(shards)]) == 1
    assert "train: damaged: " in capsys.readouterr().out


def test_check_refuses_what_token_shards_do_not_have(shards):
    with pytest.raises(UserError, match="did you mean 'train'"):
        data_command(["check", str(shards), "--split", "trian"])
    with pytest.raises(UserError, match="read in one way"):
        data_command(["check", str(shards), "--caption-column", "text"])
