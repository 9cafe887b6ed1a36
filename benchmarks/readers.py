"""Readers compared by `python -m benchmarks data`: ours and those of datasets and webdataset."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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

BATCH = 256
SIDE = 64
"""Pixels of a side of each image."""
TOKEN_BUFFER = 1 << 20  # a training run's default (training.data.run_data)
IMAGE_BUFFER = 500
"""Rows within which token shards and streamed images are shuffled."""

Batches = Iterator[tuple[numpy.ndarray, Sequence[str]]]
"""Arrays [B, ...] with a caption for each row."""


class Reader(NamedTuple):
    """A way to read a data set.

    order: "shuffled" or "in order"; open: done once; read: one pass over what `open` returned.
    """

    name: str
    order: str
    open: Callable[[], Any]
    read: Callable[[Any], Batches]


# ---- token rows

def token_readers(folder: Path, workers: int) -> list[Reader]:
    """List every reader of token rows; with workers, ours also with so many loader processes."""
    tars = [str(path) for path in sorted(folder.glob("tokens-*.tar"))]
    ours = partial(TokenShards, folder / "tokens", "train")
    rows = partial(_datasets_tokens, folder)

    readers = [Reader("ours", "shuffled", ours, partial(_our_tokens, workers=0))]
    if workers:
        readers.append(Reader(f"ours, {workers} workers", "shuffled", ours,
                              partial(_our_tokens, workers=workers)))
    readers += [Reader("datasets", "shuffled", rows, _datasets_shuffled),
                Reader("datasets", "in order", rows, _datasets_in_order),
                Reader("webdataset", "in order", partial(_webdataset, tars, "npy", "txt"),
                       _batched)]
    return readers


def _our_tokens(shards: TokenShards, workers: int) -> Batches:
    """Read as a training run does: shuffled, with one of each row's captions drawn."""
    order = DataOrder(len(shards), harness.SEED, TOKEN_BUFFER)
    batches = MicroBatches(order, BATCH, accumulation=1, rank=0, world_size=1, first_step=0,
                           last_step=len(shards) // BATCH)
    visits = TokenVisits(shards, harness.SEED, 0.0)  # no caption is dropped: digests must be equal
    for rows in batch_loader(visits, batches, workers, _as_it_is):
        yield rows.image_tokens, rows.captions


def _as_it_is(rows: TokenRows) -> TokenRows:
    return rows  # a module's function, since loader processes get it pickled


def _datasets_tokens(folder: Path) -> Any:
    import datasets

    paths = sorted((folder / "tokens").glob("*.arrow"))
    parts = [datasets.Dataset.from_file(str(path)) for path in paths]
    rows = datasets.concatenate_datasets(parts)
    # uint16 as stored; without it `datasets` gives int64
    return rows.with_format("numpy", columns=["tokens", "captions"], dtype=numpy.uint16)


def _datasets_shuffled(rows: Any) -> Batches:
    # in the order that ours has: what is compared is the reading, not the order
    order = DataOrder(len(rows), harness.SEED, TOKEN_BUFFER)
    indices = order.items(0, len(rows) // BATCH * BATCH).indices
    for batch in indices.reshape(-1, BATCH):
        yield _tokens_and_captions(rows[batch])


def _datasets_in_order(rows: Any) -> Batches:
    for batch in rows.iter(BATCH):
        yield _tokens_and_captions(batch)


def _tokens_and_captions(batch: Any) -> tuple[numpy.ndarray, list[str]]:
    return _matrix(batch["tokens"]), [captions[0] for captions in batch["captions"]]


def _matrix(rows: Any) -> numpy.ndarray:
    """One array [B, N] of rows, which `datasets` may give as an array of objects."""
    if isinstance(rows, numpy.ndarray) and rows.dtype != object:
        return numpy.asarray(rows)
    return numpy.stack(list(rows))


# ---- both

def _webdataset(tars: list[str], *keys: str, decode: str | None = None) -> Any:
    import webdataset

    # in order: its shuffling is a buffer of rows, which would only cost it time
    samples = webdataset.WebDataset(tars, shardshuffle=False)
    decoded = samples.decode(decode) if decode else samples.decode()
    return decoded.to_tuple(*keys)


def _batched(samples: Iterable[tuple[numpy.ndarray, str]]) -> Batches:
    samples = iter(samples)
    while batch := list(itertools.islice(samples, BATCH)):
        yield numpy.stack([array for array, _ in batch]), [caption for _, caption in batch]


# ---- images

def image_readers(folder: Path) -> list[Reader]:
    """List every reader of images."""
    parquet = folder / "parquet"
    tars = [str(path) for path in sorted((folder / "tar").glob("*.tar"))]
    cached = partial(open_dataset, parquet)
    streamed_parquet = partial(open_dataset, parquet, streamed_rows=IMAGE_BUFFER)
    streamed_tar = partial(open_dataset, folder / "tar", streamed_rows=IMAGE_BUFFER)
    datasets = partial(_datasets_images, folder)
    webdataset = partial(_webdataset, tars, "jpg", "txt", decode="rgb8")  # uint8, as ours
    return [
        Reader("ours, parquet, cached", "shuffled", cached, _our_images),
        Reader("ours, parquet, streaming", "shuffled", streamed_parquet, _our_images),
        Reader("ours, tar, streaming", "shuffled", streamed_tar, _our_images),
        Reader("datasets, parquet", "in order", datasets, _datasets_pixels),
        Reader("webdataset, tar", "in order", webdataset, _batched)]


def _our_images(source: CaptionedImages) -> Batches:
    """Read as a training run does: in its order, at SIDE pixels."""
    visits = ImageVisits(source, SIDE, harness.SEED, 0.0)
    shuffle_rows = 0 if source.chunk_bounds is None else IMAGE_BUFFER
    order = DataOrder(len(source), harness.SEED, shuffle_rows, source.chunk_bounds)
    for start in range(0, len(source), BATCH):
        pixels, captions = [], []
        for item in order.items(start, min(BATCH, len(source) - start)):
            pixels.append(visits[item].pixels)
            captions.append(source.captions(item.index)[0])
        yield numpy.stack(pixels), captions


def _datasets_images(folder: Path) -> Any:
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(folder / "parquet/train.parquet"),
                                 split="train", cache_dir=str(folder / "cache"))
    return rows.cast_column("image", datasets.Image())


def _datasets_pixels(rows: Any) -> Batches:
    return _batched((numpy.asarray(row["image"]), row["text"]) for row in rows)
