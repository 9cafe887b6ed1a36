"""Reading token shards and images: rows per second of our readers beside `datasets` and webdataset.

Every reader gives the same rows: tokens, or pixels, as arrays with a caption each. A digest of the
rows that each one gave is compared before anything is timed.

examples:
  python -m benchmarks data --quick
  python -m benchmarks data --pictures 2000 --threads 1 --json data.json
  python -m benchmarks data --rows 1000000 --alone
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image

from benchmarks import command_line, harness
from benchmarks.readers import BATCH, SIDE, Batches, Reader, image_readers, token_readers
from tokenloom_common.extras import require_extra
from training.data.tokens.shards import SplitIndex, TokenIndex, write_index, write_shard

GRID = (16, 16)
TOKENS = GRID[0] * GRID[1]
CODES = 1024
SHARD_ROWS = 50_000  # several shards at the default size, as a real set has
TAR_IMAGES = 1000


class Options(NamedTuple):
    """The command line, checked."""

    quick: bool
    rows: int
    pictures: int
    workers: int
    repeats: int
    threads: int
    alone: bool


# ---- the data sets

def make_tokens(folder: Path, rows: int, with_tars: bool) -> None:
    """Write token shards and, for webdataset, tar shards with the same rows."""
    generator = numpy.random.default_rng(harness.SEED)
    (folder / "tokens").mkdir(parents=True)
    shards = -(-rows // SHARD_ROWS)
    files = []
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - start)
        tokens = generator.integers(0, CODES, (count, TOKENS)).astype(numpy.uint16)  # as shards are
        captions = [[f"a picture of thing number {start + row}"] for row in range(count)]
        keys = [f"{start + row:09d}" for row in range(count)]
        name = f"tokens/train-{number:05d}-of-{shards:05d}.arrow"
        files.append(write_shard(folder / name, captions, tokens, keys))
        if with_tars:
            _write_token_tar(folder / f"tokens-{number:05d}.tar", keys, tokens, captions)

    split = SplitIndex(rows=rows, files=files)
    index = TokenIndex(tokenizer_fingerprint="benchmark", codebook_size=CODES, grid=GRID,
                       splits={"train": split})
    write_index(folder / "tokens", index)


def _write_token_tar(path: Path, keys: list[str], tokens: numpy.ndarray,
                     captions: list[list[str]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, row, caption in zip(keys, tokens, captions, strict=True):
            saved = io.BytesIO()
            numpy.save(saved, row)
            _add(tar, f"{key}.npy", saved.getvalue())
            _add(tar, f"{key}.txt", caption[0].encode())


def make_images(folder: Path, count: int) -> None:
    """Write smooth JPEG images as parquet in row groups of 100, and the same in tar shards."""
    rows = _draw_images(count)
    _write_parquet(folder / "parquet/train.parquet", rows)
    (folder / "tar").mkdir()
    for first in range(0, count, TAR_IMAGES):
        with tarfile.open(folder / f"tar/{first // TAR_IMAGES:05d}.tar", "w") as tar:
            for row in rows[first: first + TAR_IMAGES]:
                _add(tar, f"{row['key']}.jpg", row["image"]["bytes"])
                _add(tar, f"{row['key']}.txt", row["text"].encode())


def _draw_images(count: int) -> list[dict[str, Any]]:
    """Rows as an image column of `datasets` has them."""
    generator = numpy.random.default_rng(harness.SEED)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        # smooth, as photographs are: a JPEG of noise would be several times larger
        noise = generator.integers(0, 256, (8, 8, 3)).astype(numpy.uint8)
        image = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        saved = io.BytesIO()
        image.save(saved, "JPEG", quality=90)
        rows.append({"image": {"bytes": saved.getvalue(), "path": None},
                     "text": f"picture {number}", "key": f"{number:09d}"})
    return rows


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True)
    # as `datasets` stores an image column
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = pyarrow.array([row["image"] for row in rows], image_type)
    table = pyarrow.table({"image": images, "text": [row["text"] for row in rows],
                           "key": [row["key"] for row in rows]})
    pyarrow.parquet.write_table(table, path, row_group_size=100)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


# ---- measuring

def digest(batches: Batches) -> tuple[int, str]:
    """Return the number of rows and a digest that does not depend on their order.

    The digest is the sum of each row's own hash.
    """
    rows, total = 0, 0
    for arrays, captions in batches:
        for array, caption in zip(arrays, captions, strict=True):
            content = caption.encode() + numpy.ascontiguousarray(array).tobytes()
            row_hash = hashlib.blake2b(content, digest_size=8).digest()
            total += int.from_bytes(row_hash, "big")  # a sum: an XOR would cancel repeated rows
            rows += 1
    return rows, f"{total % (1 << 64):016x}"


def measure_readers(readers: list[Reader],
                    repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return verdicts and table rows, no rows if a verdict is not ok. Readers take turns."""
    digests = {reader: digest(reader.read(reader.open())) for reader in readers}
    expected = next(iter(digests.values()))
    verdicts = []
    for reader, (rows, content) in digests.items():
        verdicts.append({"reader": reader.name, "order": reader.order, "rows": rows,
                         "digest": content, "ok": (rows, content) == expected})
    if not all(verdict["ok"] for verdict in verdicts):
        return verdicts, []

    open_s: dict[Reader, list[float]] = {reader: [] for reader in readers}
    read_s: dict[Reader, list[float]] = {reader: [] for reader in readers}
    for reader in harness.in_turns(readers, repeats):
        start = time.perf_counter()
        data = reader.open()
        opened = time.perf_counter()
        for _ in reader.read(data):
            pass
        open_s[reader].append(opened - start)
        read_s[reader].append(time.perf_counter() - opened)
        command_line.say("data", f"{reader.name}: {read_s[reader][-1]:.2f} s")
    rows = expected[0]
    return verdicts, [_row(reader, open_s[reader], read_s[reader], rows) for reader in readers]


def _row(reader: Reader, open_s: list[float], read_s: list[float], rows: int) -> dict[str, Any]:
    low, middle, high = harness.quartiles(read_s)  # of seconds: the low one gives the high rate
    open_median = harness.quartiles(open_s)[1]
    return {"reader": reader.name, "order": reader.order, "open_s": round(open_median, 4),
            "rows_per_s": round(rows / middle, 1),
            "quartile1": round(rows / high, 1), "quartile3": round(rows / low, 1)}


def measure(options: Options) -> dict[str, Any]:
    """Return the document."""
    import datasets
    import webdataset

    def chosen(readers: list[Reader]) -> list[Reader]:
        return [one for one in readers if not options.alone or one.name.startswith("ours")]

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # a new cache: opening would be free with one of an earlier run
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        make_tokens(folder, options.rows, with_tars=not options.alone)
        tokens_ok, tokens = measure_readers(chosen(token_readers(folder, options.workers)),
                                            options.repeats)
        make_images(folder, options.pictures)
        images_ok, images = measure_readers(chosen(image_readers(folder)), options.repeats)

    verification = [*tokens_ok, *images_ok]
    return {"benchmark": "data", "schema_version": 1,
            "ok": all(row["ok"] for row in verification), "options": options._asdict(),
            "environment": harness.environment("cpu", "float32"),
            "versions": {"datasets": datasets.__version__, "webdataset": webdataset.__version__},
            "verification": verification, "tokens": tokens, "pictures": images}


# ---- the command

def show(document: dict[str, Any]) -> None:
    """Print the tables."""
    for name in ("tokens", "pictures"):
        print(f"{name}\n{command_line.table(document[name])}\n")


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None]:
    """Parse the options and --out. UserError for what cannot be measured."""
    parser = command_line.command_parser("data", __doc__)
    parser.add_argument("--quick", action="store_true",
                        help="other defaults: 2048 rows, 256 pictures, 1 round")
    parser.add_argument("--rows", type=int, help=f"token rows of {TOKENS}, in whole batches of "
                        f"{BATCH} (default 200192)")
    parser.add_argument("--pictures", type=int,
                        help=f"pictures of {SIDE} x {SIDE} (default 2000)")
    parser.add_argument("--workers", type=int, default=0,
                        help="also measure ours with so many loader processes (default 0)")
    parser.add_argument("--alone", action="store_true",
                        help="ours only: webdataset takes minutes for a million rows")
    command_line.add_run_options(parser, "default 3; quick 1")
    args = parser.parse_args(argv)

    defaults = {"rows": 200_192, "pictures": 2000, "repeats": 3}
    if args.quick:
        defaults = {"rows": 2048, "pictures": 256, "repeats": 1}
    command_line.fill_in(args, defaults, {"rows": 1, "pictures": 1, "repeats": 1, "workers": 0})
    # before data is written, which takes long
    for package in ("datasets", "webdataset"):
        require_extra(package, "this benchmark", "train,bench")

    harness.start("cpu", args.threads)
    rows = -(-args.rows // BATCH) * BATCH  # ours reads whole batches alone, as a run does
    options = Options(args.quick, rows, args.pictures, args.workers, args.repeats,
                      torch.get_num_threads(), args.alone)
    return options, args.out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. RunFailedError if the readers do not give the same rows."""
    options, out = parse(argv)
    return command_line.run_benchmark(lambda: measure(options), show, out, "the other readers")
