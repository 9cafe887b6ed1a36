"""Data readers compared by `python -m benchmarks data`: ours and those of datasets and webdataset."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from benchmarks import harness
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.open_dataset import open_dataset
from training.data.tokens.shards import TokenShards
from training.data.visits.images import ImageVisits
from training.data.visits.loader import batch_loader
from training.data.visits.order import DataOrder, MicroBatches
from training.data.visits.tokens import TokenRows, TokenVisits

TOKENS, CODES, SHARD_ROWS, BATCH, SIDE = 256, 1024, 50_000, 256, 64


Read = Iterator[tuple[numpy.ndarray, Sequence[str]]]
"""Batches: arrays [B, ...] and a caption each."""


class Reader(NamedTuple):
    """A way to read a set. open: what is done once; read: one pass over an opened set, in the order of `order`."""

    name: str
    order: str
    open: Callable[[], Any]
    read: Callable[[Any], Read]


def _visits(shards: TokenShards, workers: int) -> Read:
    """What a training gets: shuffled, a caption drawn for each row."""
    order = DataOrder(len(shards), harness.SEED, 1 << 20)
    batches = MicroBatches(order, BATCH, 1, 0, 1, 0, len(shards) // BATCH)
    for rows in batch_loader(TokenVisits(shards, harness.SEED, 0.0), batches, workers, _as_it_is):
        yield rows.image_tokens, rows.captions


def _as_it_is(rows: TokenRows) -> TokenRows:
    return rows


def _shuffled_rows(length: int) -> list[numpy.ndarray]:
    indices = DataOrder(length, harness.SEED, 1 << 20).items(0, length // BATCH * BATCH).indices
    return list(indices.reshape(-1, BATCH))


def _datasets_tokens(folder: Path) -> Any:
    import datasets

    parts = [datasets.Dataset.from_file(str(path)) for path in sorted((folder / "tokens").glob("*.arrow"))]
    return datasets.concatenate_datasets(parts).with_format("numpy", columns=["tokens", "captions"], dtype=numpy.uint16)


def _datasets_shuffled(rows: Any) -> Read:
    for indices in _shuffled_rows(len(rows)):
        batch = rows[indices]
        yield _matrix(batch["tokens"]), [row[0] for row in batch["captions"]]


def _datasets_in_order(rows: Any) -> Read:
    for batch in rows.iter(BATCH):
        yield _matrix(batch["tokens"]), [row[0] for row in batch["captions"]]


def _matrix(rows: Any) -> numpy.ndarray:
    return numpy.asarray(rows) if isinstance(rows, numpy.ndarray) and rows.dtype != object else numpy.stack(list(rows))


def _webdataset(pattern: list[str], *keys: str, decode: str | None = None) -> Any:
    import webdataset

    shards = webdataset.WebDataset(pattern, shardshuffle=False)
    return (shards.decode(decode) if decode else shards.decode()).to_tuple(*keys)


def _batched(samples: Iterable[tuple[numpy.ndarray, str]]) -> Read:
    samples = iter(samples)
    while batch := list(itertools.islice(samples, BATCH)):
        yield numpy.stack([one[0] for one in batch]), [one[1] for one in batch]


def token_readers(folder: Path, workers: int) -> list[Reader]:
    """Every reader of token rows."""
    tars = [str(path) for path in sorted(folder.glob("tokens-*.tar"))]

    def ours() -> TokenShards:
        return TokenShards(folder / "tokens", "train")

    readers = [Reader("ours", "shuffled", ours, lambda shards: _visits(shards, 0)),
               Reader("datasets", "shuffled", lambda: _datasets_tokens(folder), _datasets_shuffled),
               Reader("datasets", "in order", lambda: _datasets_tokens(folder), _datasets_in_order),
               Reader("webdataset", "in order", lambda: _webdataset(tars, "npy", "txt"), _batched)]
    if workers:
        readers.insert(1, Reader(f"ours, {workers} workers", "shuffled", ours, lambda shards: _visits(shards, workers)))
    return readers


def _our_pictures(source: CaptionedImages) -> Read:
    visits = ImageVisits(source, SIDE, harness.SEED, 0.0)
    shuffle_rows = 0 if source.chunk_bounds is None else 500
    order = DataOrder(len(source), harness.SEED, shuffle_rows, source.chunk_bounds)
    for start in range(0, len(source), BATCH):
        found = [(visits[item].pixels, source.captions(item.index)[0])
                 for item in order.items(start, min(BATCH, len(source) - start))]
        yield numpy.stack([pixels for pixels, _ in found]), [caption for _, caption in found]


def _datasets_pictures(folder: Path) -> Any:
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(folder / "parquet/train.parquet"), split="train",
                                 cache_dir=str(folder / "cache"))
    return rows.cast_column("image", datasets.Image())


def picture_readers(folder: Path) -> list[Reader]:
    """Every reader of pictures."""
    tars = [str(path) for path in sorted((folder / "tar").glob("*.tar"))]
    return [
        Reader("ours, parquet, cached", "shuffled", lambda: open_dataset(folder / "parquet"), _our_pictures),
        Reader("ours, parquet, streaming", "shuffled", lambda: open_dataset(folder / "parquet", streamed_rows=500),
               _our_pictures),
        Reader("ours, tar, streaming", "shuffled", lambda: open_dataset(folder / "tar", streamed_rows=500), _our_pictures),
        Reader("datasets, parquet", "in order", lambda: _datasets_pictures(folder),
               lambda rows: _batched((numpy.asarray(row["image"]), row["text"]) for row in rows)),
        Reader("webdataset, tar", "in order", lambda: _webdataset(tars, "jpg", "txt", decode="rgb8"), _batched)]
