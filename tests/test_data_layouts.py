"""Every row of the tables in docs/data.md: the layout is built in small, and `data check` reads it as the row says."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests import published_sets as published
from tests.bad_images import encode
from tests.published_sets import put
from tests.source_files import as_bytes, own_cache, write_parquet, write_tar  # noqa: F401
from tokenloom_common.errors import run_command
from training.commands.data import main

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
N = 4


class Seen(NamedTuple):
    """What a check is to report: usable items, splits, and words of its output."""

    usable: int = N
    splits: dict[str, int] | None = None  # None: all in train
    words: tuple[str, ...] = ()
    without: int | None = None  # usable items without the row's options; None: as many
    code: int = 0


LAYOUTS: dict[str, Callable[[Path], Seen]] = {}
"""First cell of a row -> a function that builds the layout and returns what a check sees."""


def row(start: str) -> Callable:
    """Build the row whose first cell begins with `start`."""
    def keep(build: Callable[[Path], Seen]) -> Callable[[Path], Seen]:
        LAYOUTS[start] = build
        return build
    return keep


def png(seed: int = 0) -> bytes:
    return published.image_bytes(seed, "PNG")


def images(folder: Path, count: int = N, ending: str | None = ".txt", text: str | bytes = "a cat") -> None:
    """0.png, 1.png ... with a text beside each."""
    for number in range(count):
        put(folder / f"{number}.png", png(number))
        if ending:
            put(folder / f"{number}{ending}", text)


def lines(path: Path, rows: list[str], encoding: str = "utf-8") -> None:
    put(path, ("\r\n".join(rows) + "\r\n").encode(encoding))


def members(*texts: str) -> list[tuple[str, bytes]]:
    """Tar members: N images, and beside each a member of each ending."""
    found = []
    for number in range(N):
        found.append((f"{number}.jpg", published.image_bytes(number)))
        found += [(f"{number}{ending}", b'{"caption": "a cat"}' if ending == ".json" else b"7") for ending in texts]
    return found


# ---- folders of pictures ----

@row("`cat.png` and `cat.txt` side by side")
def _sidecars(root):
    images(root / "a/b")
    images(root / "10_sks dog", text="sks dog, best quality\nanother")
    return Seen(2 * N, words=("captions           12", ".txt files"))


@row("`cat.png` and `cat.caption`")
def _caption_files(root):
    images(root, ending=".caption")
    return Seen(words=(".caption files",))


@row("`cat.png` and captions with another ending")
def _tags(root):
    images(root, ending=".tags")
    return Seen(words=(".tags files",), without=0)


@row("`cat.png` and `cat.json`")
def _records(root):
    images(root, ending=".json", text='{"caption": "a cat", "url": "https://x"}')
    return Seen()


@row("`metadata.jsonl`")
def _metadata(root):
    images(root, ending=None)
    lines(root / "metadata.jsonl", [json.dumps({"file_name": f"{n}.png", "text": ["a", "b"]}) for n in range(N)])
    return Seen(words=("captions           8", "metadata.jsonl"))


@row("a list of another name")
def _list(root):
    images(root / "pics", ending=None)
    lines(root / "labels.csv", ["image,caption", *(f"pics/{n}.png,a cat" for n in range(N))])
    return Seen(words=("labels.csv",))


@row("a list with columns of other names")
def _named_columns(root):
    images(root, ending=None)
    lines(root / "liste.csv", ["datei,titel", *(f"{n}.png,Katze" for n in range(N))])
    return Seen(without=0)


@row("a list saved by Excel or on Windows")
def _windows(root):
    images(root / "pics", ending=None)
    lines(root / "metadata.csv", ["file_name;text", *(f"pics\\{n}.png;un café" for n in range(N))], "utf-16")
    return Seen(words=("encodings          UTF-16 1",))


@row("a list with several rows for a picture")
def _repeated(root):
    images(root, ending=None)
    lines(root / "metadata.csv", ["file_name,text", *(f"{n}.png,caption {k}" for n in range(N) for k in range(5))])
    return Seen(5 * N, words=("duplicate pictures 16",))


@row("captions in UTF-16")
def _utf16(root):
    images(root, text="красный".encode("utf-16"))
    images(root / "marked", text="красный".encode("utf-8-sig"))
    return Seen(2 * N, words=("UTF-16 4", "UTF-8 4"))


@row("captions in an old encoding")
def _old_encoding(root):
    images(root, text="un café".encode("cp1252"))
    return Seen(without=0)


@row("folders that are classes")
def _classes(root):
    for name in ("cat", "dog"):
        images(root / name, 2, ending=None)
    return Seen(words=("duplicate captions 2",), without=0)


@row("`train/`, `val2017/`, `test_images/`")
def _splits(root):
    for split, count in (("train", N), ("val2017", 2), ("test_images", 1)):
        images(root / split / "group_0", count)
    return Seen(splits={"test": 1, "train": N, "validation": 2}, words=("--data.validation_split validation",))


@row("a snapshot in the hub's cache")
def _snapshot(root):
    images(root / "blobs")
    (root / "snapshots/0123abcd").mkdir(parents=True)
    for blob in (root / "blobs").iterdir():
        (root / "snapshots/0123abcd" / blob.name).symlink_to(Path("../../blobs") / blob.name)
    return Seen()


@row("folders that are links to elsewhere")
def _links(root):
    images(root.with_name("elsewhere"))
    root.mkdir()
    (root / "pics").symlink_to("../elsewhere")
    return Seen(without=0)


@row("JPEGs of 48 megapixels")
def _phone(root):
    put(root / "0.jpg", encode(Image.new("RGB", (8000, 6000), "red"), "JPEG"))
    put(root / "0.txt", "red")
    return Seen(1)


@row("other pictures above 25 megapixels")
def _large(root):
    put(root / "0.png", encode(Image.new("1", (8000, 6000)), "PNG"))
    put(root / "0.txt", "black")
    return Seen(1, without=0)


# ---- tables and shards ----

@row("parquet with `image` and `text`")
def _parquet(root):
    write_parquet(root / "a.parquet", [as_bytes(png(n)) for n in range(N)], [["a", "b"]] * N)
    return Seen(words=("captions           8",))


@row("parquet with columns of other names")
def _parquet_columns(root):
    root.mkdir()
    pq.write_table(pa.table({"image": [png(n) for n in range(N)], "titel": ["a"] * N}), root / "a.parquet")
    return Seen(without=0)


@row("`train-*.parquet` and `validation-*.parquet`")
def _parquet_splits(root):
    for split, count in (("train", N), ("validation", 2)):
        write_parquet(root / f"{split}-00000-of-00001.parquet", [as_bytes(png())] * count, ["a"] * count)
    return Seen(splits={"train": N, "validation": 2})


@row("parquet of img2dataset")
def _failed_downloads(root):
    root.mkdir()
    ok = [True] * N + [False] * 3
    table = {"jpg": [png(n) if good else None for n, good in enumerate(ok)], "caption": ["a"] * len(ok),
             "status": ["success" if good else "failed_to_download" for good in ok]}
    pq.write_table(pa.table(table), root / "00000.parquet")
    return Seen(words=("downloads failed   3", f"usable images      {N} of {N}"))


def _labelled() -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "hen"])})
    rows = {"image": [as_bytes(png(n)) for n in range(N)], "label": [0] * N}
    return datasets.Dataset.from_dict(rows, features=features)


@row("parquet with `image` and `label`")
def _labels(root):
    root.mkdir()
    _labelled().to_parquet(root / "a.parquet")
    return Seen(words=("'cat'",))


@row("a folder of `save_to_disk`")
def _saved(root):
    datasets.DatasetDict({"train": _labelled(), "test": _labelled().select([0])}).save_to_disk(root)
    return Seen(splits={"test": 1, "train": N}, words=("save_to_disk",))


@row("webdataset tars")
def _tars(root):
    root.mkdir()
    write_tar(root / "0.tar", members(".txt"))
    write_tar(root / "1.tar", members(".json"))
    return Seen(2 * N)


@row("tars of img2dataset")
def _img2dataset(root):
    root.mkdir()
    write_tar(root / "00000.tar", members(".txt", ".json"))
    pq.write_table(pa.table({"url": ["https://x"], "key": ["0"], "status": ["success"], "caption": ["a"]}),
                   root / "00000.parquet")
    put(root / "00000_stats.json", "{}")
    return Seen(words=("tar",))


@row("a tar that was made of a folder")
def _tar_of_folder(root):
    root.mkdir()
    everything = members(".txt")
    write_tar(root / "0.tar", [(f"./pics/{name}", content) for name, content in everything[::2] + everything[1::2]])
    return Seen()


@row("`.tar.gz`")
def _packed_tar(root):
    root.mkdir()
    packed = gzip.compress(write_tar(root / "0.tar", members(".txt")).read_bytes())
    (root / "0.tar").unlink()
    put(root / "0.tar.gz", packed)
    return Seen()


@row("tars with `0.jpg` and `0.cls`")
def _tar_classes(root):
    root.mkdir()
    write_tar(root / "0.tar", members(".cls"))
    return Seen(words=("'7'",))


# ---- published sets ----

@row("COCO 2014 or 2017")
def _coco(root):
    published.coco(root, {"train": N, "val": 2})
    return Seen(splits={"train": N, "validation": 2})


@row("Karpathy's")
def _karpathy(root):
    published.karpathy(root, "dataset_coco.json", ["train", "restval", "val", "test"], "val2014")
    return Seen(2, splits={"test": 1, "train": 2, "validation": 1})


@row("Flickr30k")
def _flickr30k(root):
    published.flickr(root, "results.csv", published.results_csv())
    return Seen(3)


@row("Flickr8k")
def _flickr8k(root):
    published.flickr(root, "Flickr8k.token.txt", "".join(f"{n}.jpg#0\ta cat\n" for n in range(3)), 3, "Flicker8k_Dataset")
    for name, line in (("train", "0.jpg\n1.jpg"), ("dev", "2.jpg")):
        put(root / f"Flickr_8k.{name}Images.txt", line)
    return Seen(2, splits={"train": 2, "validation": 1})


@row("DiffusionDB")
def _diffusiondb(root):
    published.diffusiondb(root)
    return Seen()


@row("`captions.csv`")
def _captions(root):
    published.flickr(root, "captions.tsv", "".join(f"{n}.jpg\ta cat\n" for n in range(N)), N, "pics")
    return Seen()


@row("LAION or Conceptual Captions")
def _urls(root):
    root.mkdir()
    pq.write_table(pa.table({"URL": ["https://x/0.jpg"] * N, "TEXT": ["a"] * N}), root / "part-00000.parquet")
    return Seen(0, code=2, words=("URLs", "img2dataset"))


# ---- the rows are run ----

def table_rows() -> list[tuple[str, str]]:
    """First and second cell of every row of the tables of what people have."""
    cells = [[cell.strip() for cell in line.strip("| \n").split(" | ")]
             for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [row for row in cells if len(row) == 3]
    return [(have, give) for have, give, _ in rows if have != "you have"]


def check(capsys, *argv: str) -> tuple[int, str]:
    code = run_command(main, ["check", *argv], "tokenloom data")
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_every_row_is_built_once():
    for have, _ in table_rows():
        assert len([start for start in LAYOUTS if have.startswith(start)]) == 1, have
    assert len(table_rows()) == len(LAYOUTS) > 30


@pytest.mark.parametrize(("have", "give"), table_rows(), ids=[have[:40] for have, _ in table_rows()])
def test_data_is_read_as_the_page_says(tmp_path, capsys, have, give):
    source = tmp_path / "my data"
    (build,) = (build for start, build in LAYOUTS.items() if have.startswith(start))
    seen = build(source)
    path = source
    if "snapshot" in give:
        path = source / "snapshots/0123abcd"
    command = re.search(r"`tokenloom (data import .*?)`", give)
    if command:
        path = tmp_path / "imported"
        words = command[1].replace("SRC", shlex.quote(str(source))).replace("DIR", shlex.quote(str(path)))
        assert run_command(main, shlex.split(words)[1:], "tokenloom data") == 0
        assert f"next: tokenloom data check {path}" in capsys.readouterr().out
    options = shlex.split(" ".join(re.findall(r"`(--data\.[^`]+)`", give)))

    report = tmp_path / "report.json"
    code, shown = check(capsys, str(path), *options, "--json", str(report))
    assert code == seen.code, shown
    assert all(word in shown for word in seen.words), shown
    if code:
        return
    found = json.loads(report.read_text())
    assert found["usable"] == seen.usable, shown
    assert found["splits"] == (seen.splits or {"train": found["items"]})
    for name, value in zip(options[::2], options[1::2], strict=True):
        assert f"{name} {value}" in found["next"]

    if options:
        without, shown = check(capsys, str(path))
        assert without in (1, 2) and seen.without == 0
        for option in options[::2]:  # the message names the option that helps
            assert option in shown, shown
