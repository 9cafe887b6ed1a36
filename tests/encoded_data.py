"""Captioned pictures, one of them damaged, and token shards of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny
from tokenloom_common.config import merge
from training.config.encoding import EncodeRunConfig
from training.data.tokens.shards import TokenShards
from training.encode_dataset import DatasetEncoder
from training.engine.processes import Processes

ROWS = 21


def make_data(folder: Path) -> Path:
    """A tokenizer of 16 px, and a folder of 21 pictures with two captions each, one of them
    damaged, in two splits."""
    tiny.vqgan().save_pretrained(folder / "tokenizer")
    for split, rows in (("train", ROWS), ("validation", 5)):
        (folder / "data" / split).mkdir(parents=True)
        for row, picture in enumerate(tiny.pictures(rows, side=20, seed=rows)):
            picture.save(folder / "data" / split / f"{row:02d}.png")
            (folder / "data" / split
             / f"{row:02d}.txt").write_text(f"{tiny.CAPTIONS[row]}\nnumber {row}\n")
    (folder / "data/train/07.png").write_bytes(b"no picture")
    return folder


def encode(made: Path, out: Path, group: Processes, **changes: Any) -> TokenShards:
    """Encode the train split into `out`."""
    base = {"image_tokenizer": str(made / "tokenizer"), "data": {"path": str(made / "data")},
            "out": str(out), "splits": ["train"], "batch_size": 4, "shard_rows": 6}
    DatasetEncoder(EncodeRunConfig.parse(merge(base, changes), "test"), group).run()
    return TokenShards(out, "train")
