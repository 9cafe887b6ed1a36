"""Small data sets in files, for tests: folders, parquet and tar shards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bad_images import encode, photo

PNG = encode(photo(), "PNG")
SAMPLES = [("d/0.png", PNG), ("d/0.txt", b"a dog\none dog"), ("d/0.json", b'{"caption": "other", "id": 3}'),
           ("d/1.seg.png", PNG), ("d/1.txt", b"a mask only"), ("d/2.jpg", encode(photo(), "JPEG")),
           ("d/2.json", b'{"prompt": "a cat"}'), ("d/3.txt", b"no picture"), ("d/4.png", PNG),
           ("d/4.pkl", b"cos\nsystem")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` caches out of the user's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_metadata(root: Path, lines: list[object], name: str = "metadata.jsonl") -> Path:
    """A folder with a.png, b.png and the given lines (objects as JSON, str and bytes as they are)."""
    root.mkdir(exist_ok=True)
    for stem in "ab":
        (root / f"{stem}.png").write_bytes(encode(photo(seed=ord(stem)), "PNG"))
    raw = [line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
           for line in lines]
    (root / name).write_bytes(b"\n".join(raw) + b"\n")
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]], links: bool = False) -> Path:
    """A tar shard with these members, and with `links` a symbolic link and a device that pose as samples."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if links:
            for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.CHRTYPE, "device.png")):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "/etc/hostname"
                tar.addfile(info)
    return path


def write_parquet(path: Path, images: list, captions: list, **columns: list) -> Path:
    """A parquet file in the hub's own layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(images, kind), "text": captions, **columns}), path)
    return path


def as_bytes(content: bytes | None) -> dict:
    return {"bytes": content, "path": None}
