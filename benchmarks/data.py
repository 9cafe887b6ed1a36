"""Reading data: rows a second of our readers beside `datasets` and webdataset, for token shards and for pictures.

Every reader gives the same rows: tokens as arrays with a caption each, pictures as arrays of pixels with a caption each. Before
anything is timed, a digest of what each one gave is compared.

examples:
  python -m benchmarks data --quick
  python -m benchmarks data --pictures 2000 --threads 1 --json data.json
  python -m benchmarks data --rows 1000000 --alone
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from PIL import Image

from benchmarks import harness
from benchmarks.readers import (
    BATCH,
    CODES,
    SHARD_ROWS,
    SIDE,
    TOKENS,
    Read,
    Reader,
    picture_readers,
    token_readers,
)
from tokenloom_common.errors import UserError
from training.data.tokens.shards import SplitIndex, TokenIndex, write_index, write_shard


class Options(NamedTuple):
    """What is measured."""

    quick: bool
    rows: int
    pictures: int
    workers: int
    repeats: int
    threads: int
    alone: bool


def make_tokens(folder: Path, rows: int, with_tars: bool) -> None:
    """Token shards, and (where asked for) tar shards with the same rows for webdataset."""
    generator = numpy.random.default_rng(harness.SEED)
    (folder / "tokens").mkdir(parents=True)
    files = []
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - start)
        tokens = generator.integers(0, CODES, (count, TOKENS)).astype(numpy.uint16)
        captions = [[f"a picture of thing number {start + row}"] for row in range(count)]
        keys = [f"{start + row:09d}" for row in range(count)]
        name = f"tokens/train-{number:05d}-of-{-(-rows // SHARD_ROWS):05d}.arrow"
        files.append(write_shard(folder / name, captions, tokens, keys))
        if with_tars:
            _token_tar(folder / f"tokens-{number:05d}.tar", keys, tokens, captions)
    write_index(folder / "tokens", TokenIndex(tokenizer_fingerprint="benchmark", codebook_size=CODES, grid=(16, 16),
                                              splits={"train": SplitIndex(rows=rows, files=files)}))


def _token_tar(path: Path, keys: list[str], tokens: numpy.ndarray, captions: list[list[str]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, row, caption in zip(keys, tokens, captions, strict=True):
            saved = io.BytesIO()
            numpy.save(saved, row)
            _add(tar, f"{key}.npy", saved.getvalue())
            _add(tar, f"{key}.txt", caption[0].encode())


def make_pictures(folder: Path, count: int) -> None:
    """Smooth JPEG pictures of SIDE pixels as parquet in row groups of 100, and the same in tar shards of 1000."""
    import pyarrow
    import pyarrow.parquet

    generator = numpy.random.default_rng(harness.SEED)
    (folder / "parquet").mkdir(parents=True)
    (folder / "tar").mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3)).astype(numpy.uint8))
        saved = io.BytesIO()
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(saved, "JPEG", quality=90)
        rows.append({"image": {"bytes": saved.getvalue(), "path": None}, "text": f"picture {number}", "key": f"{number:09d}"})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.table({
        "image": pyarrow.array([row["image"] for row in rows], kind), "text": [row["text"] for row in rows],
        "key": [row["key"] for row in rows]}), folder / "parquet/train.parquet", row_group_size=100)
    for number in range(0, count, 1000):
        with tarfile.open(folder / f"tar/{number // 1000:05d}.tar", "w") as tar:
            for row in rows[number: number + 1000]:
                _add(tar, f"{row['key']}.jpg", row["image"]["bytes"])
                _add(tar, f"{row['key']}.txt", row["text"].encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


# Token rows


# Pictures


# Measuring

def digest(batches: Read) -> tuple[int, str]:
    """How many rows, and what they hold whatever their order: the sum of each row's own hash."""
    rows, total = 0, 0
    for arrays, captions in batches:
        for array, caption in zip(arrays, captions, strict=True):
            rows += 1
            found = hashlib.blake2b(caption.encode() + numpy.ascontiguousarray(array).tobytes(), digest_size=8)
            total += int.from_bytes(found.digest(), "big")
    return rows, f"{total % (1 << 64):016x}"


def measure_readers(readers: list[Reader], repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Verdicts and rows of a table; readers take turns, every second round backwards."""
    found = {reader: digest(reader.read(reader.open())) for reader in readers}
    expected = next(iter(found.values()))
    verdicts = [{"reader": reader.name, "order": reader.order, "rows": rows, "digest": what, "ok": (rows, what) == expected}
                for reader, (rows, what) in found.items()]
    if not all(verdict["ok"] for verdict in verdicts):
        return verdicts, []
    opened: dict[Reader, list[float]] = {reader: [] for reader in readers}
    passed: dict[Reader, list[float]] = {reader: [] for reader in readers}
    for number in range(repeats):
        for reader in readers if number % 2 == 0 else reversed(readers):
            start = time.perf_counter()
            data = reader.open()
            middle = time.perf_counter()
            for _ in reader.read(data):
                pass
            opened[reader].append(middle - start)
            passed[reader].append(time.perf_counter() - middle)
            print(f"benchmarks data: {reader.name}: {passed[reader][-1]:.2f} s", file=sys.stderr, flush=True)
    return verdicts, [_row(reader, opened[reader], passed[reader], expected[0]) for reader in readers]


def _row(reader: Reader, opened: list[float], passed: list[float], rows: int) -> dict[str, Any]:
    low, middle, high = harness.quartiles(passed)
    return {"reader": reader.name, "order": reader.order, "open_s": round(harness.quartiles(opened)[1], 4),
            "rows_per_s": round(rows / middle, 1), "quartile1": round(rows / high, 1), "quartile3": round(rows / low, 1)}


def _chosen(readers: list[Reader], alone: bool) -> list[Reader]:
    return [reader for reader in readers if not alone or reader.name.startswith("ours")]


def measure(options: Options) -> dict[str, Any]:
    """The document."""
    import datasets
    import webdataset

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        make_tokens(folder, options.rows, not options.alone)
        tokens_ok, tokens = measure_readers(_chosen(token_readers(folder, options.workers), options.alone), options.repeats)
        make_pictures(folder, options.pictures)
        pictures_ok, pictures = measure_readers(_chosen(picture_readers(folder), options.alone), options.repeats)
    verification = [*tokens_ok, *pictures_ok]
    return {"benchmark": "data", "schema_version": 1, "ok": all(row["ok"] for row in verification),
            "options": options._asdict(), "environment": harness.environment("cpu", "float32"),
            "versions": {"datasets": datasets.__version__, "webdataset": webdataset.__version__}, "verification": verification,
            "tokens": tokens, "pictures": pictures}


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None]:
    """Options and --out. UserError for what cannot be measured."""
    parser = harness.command_parser("data", __doc__)
    parser.add_argument("--quick", action="store_true", help="other defaults: 2048 rows, 256 pictures, 1 round")
    parser.add_argument("--rows", type=int, help=f"token rows of {TOKENS}, in whole batches of {BATCH} (default 200192)")
    parser.add_argument("--pictures", type=int, help=f"pictures of {SIDE} x {SIDE} (default 2000)")
    parser.add_argument("--workers", type=int, default=0, help="also measure ours with so many loader processes (default 0)")
    parser.add_argument("--alone", action="store_true", help="ours only: webdataset takes minutes for a million rows")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, help="rounds of each timing (default 3; quick 1)")
    parser.add_argument("--out", "--json", dest="out", help="also write the JSON document to this file")
    args = parser.parse_args(argv)
    defaults = {"rows": 200_192, "pictures": 2000, "repeats": 3}
    if args.quick:
        defaults = {"rows": 2048, "pictures": 256, "repeats": 1}
    harness.fill_in(args, defaults, {"rows": 1, "pictures": 1, "repeats": 1, "workers": 0})
    for package in ("datasets", "webdataset"):
        try:
            __import__(package)
        except ImportError:
            raise UserError(f"this benchmark reads with {package} too: pip install 'tokenloom[train,bench]'") from None
    harness.start("cpu", args.threads)
    import torch

    rows = -(-args.rows // BATCH) * BATCH
    return Options(args.quick, rows, args.pictures, args.workers, args.repeats, torch.get_num_threads(), args.alone), args.out


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show, write. RunFailedError if the readers do not give the same rows."""
    options, name = parse(argv)
    out = harness.check_output(name)
    document = measure(options)
    for what in ("tokens", "pictures"):
        print(f"{what}\n{harness.table(document[what])}\n")
    harness.finish(document, out)
    harness.require_same_work(document, "the other readers")
    return 0
