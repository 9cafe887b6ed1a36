"""The order of the data is a function of seed and step, whatever the number of processes, workers and micro-batches."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest
import torch

from tests import tiny
from tokenloom_common.errors import DataError, MissingFileError, UserError
from training.data.batches import ItemId, MicroBatches, batch_items, batch_loader, item_random
from training.data.token_shards import (
    SplitIndex,
    TokenIndex,
    TokenShards,
    check_same_tokenizer,
    token_dtype,
    write_index,
    write_shard,
)
from training.data.training_sets import CollateTokens, TokenVisits


def test_every_item_once_an_epoch_and_another_order_in_the_next():
    items = [item for step in range(10) for item in batch_items(3, step, 7, 35)]
    for epoch in (0, 1):
        assert Counter(i.index for i in items if i.epoch == epoch) == Counter(range(35))
    assert [i.index for i in items[:35]] != [i.index for i in items[35:]]


def micro(world: int, accumulation: int, first: int = 0, last: int = 4) -> list[list[ItemId]]:
    """Global batches put together again from the processes' micro-batches."""
    ranks = [list(MicroBatches(50, 8, accumulation, 1, rank, world, first, last)) for rank in range(world)]
    steps = []
    for step in range(last - first):
        parts = [ranks[rank][step * accumulation + part] for part in range(accumulation) for rank in range(world)]
        steps.append([item for part in parts for item in part])
    return steps


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 4), (2, 2), (4, 2)])
def test_the_global_batch_is_the_same_for_any_split(world, accumulation):
    assert micro(world, accumulation) == micro(1, 1)


def test_resuming_at_a_step_gives_the_same_batches():
    assert micro(2, 2, first=2) == micro(1, 1)[2:]


class Echo(torch.utils.data.Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, item):
        return item


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_order(workers):
    loader = batch_loader(Echo(), MicroBatches(50, 8, 1, 1, 0, 1, 0, 3), workers, list)
    assert list(loader) == micro(1, 1, last=3)


def test_a_visits_random_numbers_depend_on_seed_epoch_index_and_purpose_only():
    def draw(seed, epoch, index, purpose):
        return item_random(seed, ItemId(epoch, index), purpose).random()

    numbers = [draw(*key) for key in ((0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b"))]
    assert len(set(numbers)) == 5
    assert draw(0, 0, 0, "a") == numbers[0]


@pytest.fixture
def shards(tmp_path):
    tokens = numpy.arange(24, dtype=numpy.uint16).reshape(6, 4)
    captions = [[f"caption {i}", f"other {i}"] for i in range(6)]
    write_shard(tmp_path / "train-00000-of-00002.parquet", captions[:4], tokens[:4], [f"k{i}" for i in range(4)])
    write_shard(tmp_path / "train-00001-of-00002.parquet", captions[4:], tokens[4:], ["k4", "k5"])
    files = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    write_index(tmp_path, TokenIndex(tokenizer_fingerprint="f", codebook_size=32, grid=(2, 2),
                                     splits={"train": SplitIndex(rows=6, files=files), "none": SplitIndex(rows=0, files=[])}))
    return tmp_path


def test_token_shards_give_back_what_was_written(shards):
    read = TokenShards(shards, "train")
    assert len(read) == 6
    assert read.image_tokens(5).tolist() == [20, 21, 22, 23]
    assert read.captions(4) == ["caption 4", "other 4"]
    assert read.key(3) == "k3"
    assert len(read.all_captions()) == 12


def test_token_shards_are_read_by_datasets(shards):
    import datasets

    rows = datasets.Dataset.from_parquet([str(p) for p in sorted(shards.glob("*.parquet"))],
                                         cache_dir=str(shards / "cache"))
    assert rows[5]["tokens"] == [20, 21, 22, 23]
    assert rows.column_names == ["captions", "tokens", "key"]


def test_caption_dropout_gives_the_null_caption_at_its_rate(shards):
    visits = TokenVisits(TokenShards(shards, "train"), seed=0, caption_dropout=0.25)
    seen = [visits[ItemId(epoch, index)].caption for epoch in range(200) for index in range(6)]
    assert sum(c == "" for c in seen) / len(seen) == pytest.approx(0.25, abs=0.04)
    assert {c for c in seen if c.endswith("3")} == {"caption 3", "other 3"}
    batch = CollateTokens(tiny.text_tokenizer())([visits[ItemId(0, i)] for i in range(3)])
    assert batch.image_tokens.shape == (3, 4)
    assert batch.image_tokens.dtype == torch.int64
    assert batch.text.text_input.shape == (3, tiny.TEXT_LENGTH)


def test_token_corruption_replaces_its_share_of_the_inputs_and_never_a_target(shards):
    read = TokenShards(shards, "train")
    visits = TokenVisits(read, seed=0, caption_dropout=0.0, token_corruption=0.3)
    changed = []
    for epoch in range(300):
        for index in range(6):
            item = visits[ItemId(epoch, index)]
            assert item.image_tokens.tolist() == read.image_tokens(index).tolist()
            assert item.input_tokens.min() >= 0
            assert item.input_tokens.max() < 32
            changed.append((item.input_tokens != item.image_tokens).mean())
    assert numpy.mean(changed) == pytest.approx(0.3 * 31 / 32, abs=0.02)  # a random code is the right one now and then
    again = visits[ItemId(7, 3)]
    assert visits[ItemId(7, 3)].input_tokens.tolist() == again.input_tokens.tolist()
    plain = TokenVisits(read, seed=0, caption_dropout=0.0)[ItemId(0, 0)]
    assert plain.input_tokens.tolist() == plain.image_tokens.tolist()


def test_large_codebooks_get_wider_tokens():
    assert token_dtype(1 << 16) == numpy.uint16
    assert token_dtype((1 << 16) + 1) == numpy.uint32


@pytest.mark.parametrize(("damage", "error", "words"), [
    (lambda f: (f / "tokens.json").unlink(), MissingFileError, "tokens.json is missing"),
    (lambda f: (f / "tokens.json").write_text("{}"), UserError, "missing key"),
    (lambda f: (f / "train-00001-of-00002.parquet").unlink(), MissingFileError, "00001-of-00002"),
    (lambda f: (f / "train-00001-of-00002.parquet").write_bytes(b"PAR1"), UserError, "not a whole token shard"),
    (lambda f: write_shard(f / "train-00001-of-00002.parquet", [["a"]], numpy.zeros((1, 4), numpy.uint16), ["x"]),
     UserError, "holds 5 rows"),
    (lambda f: write_shard(f / "train-00001-of-00002.parquet", [["a"]] * 2, numpy.full((2, 4), 32, numpy.uint16), ["x"] * 2),
     UserError, "outside the codebook of 32"),
    (lambda f: write_shard(f / "train-00001-of-00002.parquet", [["a"]] * 2, numpy.zeros((2, 5), numpy.uint16), ["x"] * 2),
     UserError, "do not fill a grid"),
])
def test_damaged_token_shards_are_named(shards, damage, error, words):
    damage(shards)
    with pytest.raises(error, match=words) as caught:
        TokenShards(shards, "train")
    assert str(shards) in str(caught.value)


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
    index = TokenShards(shards, "train").index
    check_same_tokenizer(index, shards, 32, (2, 2), "f", "tok")
    with pytest.raises(UserError, match=words) as caught:
        check_same_tokenizer(index, shards, codebook, grid, fingerprint, "tok")
    assert "encode_dataset" in str(caught.value)
