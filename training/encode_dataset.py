"""Turn captioned pictures into token shards with a trained image tokenizer.

CPU:  python training/encode_dataset.py --image_tokenizer RUN/model --data.path DIR --out TOKENS
real: deepspeed training/encode_dataset.py --image_tokenizer RUN/model --data.path DIR --out TOKENS
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch

from tokenizer_image import load_tokenizer
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.grid import codes_to_tokens
from tokenizer_image.images import image_to_pixels, pixels_to_float
from tokenloom_common.errors import DataError, run_command
from tokenloom_common.files import publish_folder, refuse_others
from tokenloom_common.progress import progress
from training.agreement import check_same, check_shared
from training.config_loading import load_config
from training.data.drops import DropCounter, in_words
from training.data.layouts import Layouts
from training.data.sources import BAD_ITEM_ERRORS, CaptionedImages, list_splits, open_dataset
from training.data.token_shards import INDEX_NAME, SplitIndex, TokenIndex, token_dtype, write_index, write_shard
from training.engine import processes
from training.log import setup_console
from training.process_group import Processes, peers_may_go
from training.token_config import EncodeRunConfig

log = logging.getLogger("training.encode_dataset")  # under a launcher __name__ is "__main__"


class DatasetEncoder:
    """Encodes splits; each process writes every world_size-th shard."""

    def __init__(self, config: EncodeRunConfig, group: Processes) -> None:
        self.config, self.group = config, group
        self.tokenizer = group.first_then_others(lambda: load_tokenizer(config.image_tokenizer, group.device))
        self.drops = DropCounter(config.data.path, config.data.max_bad_fraction)
        self.layouts = Layouts(config.layout) if config.layout.kind != "none" else None

    def run(self) -> None:
        """Encode every split into `out`, which appears whole at the end."""
        out = Path(self.config.out)
        aside = out.with_name(f".{out.name}.tmp")
        check_shared(self.group, out.parent, f"--out {out}")
        splits = self.group.first_does(lambda: self._prepare(out, aside))
        index = {split: self._encode_split(split, aside) for split in splits}
        reasons: Counter[str] = sum(self.group.gather(self.drops.reasons), Counter())
        self.group.first_does(lambda: self._publish(index, reasons, aside, out))

    def _prepare(self, out: Path, aside: Path) -> list[str]:
        refuse_others(out, (INDEX_NAME, "*-?????-of-?????.parquet"))
        if out.is_dir() and any(out.iterdir()):
            log.warning("%s: the token shards there will be replaced", out)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if self.config.splits is not None:
            return list(self.config.splits)
        return list_splits(self.config.data.path)

    def _encode_split(self, split: str, aside: Path) -> SplitIndex:
        data = self.config.data
        source = self.group.first_then_others(lambda: open_dataset(
            data.path, split=split, caption_column=data.caption_column, image_column=data.image_column))
        self.group.first_does(lambda: self.drops.record_opened(source))
        size = min(self.config.shard_rows, -(-len(source) // self.group.world_size))  # every process has a shard to write
        shards = [range(start, min(len(source), start + size)) for start in range(0, len(source), size)]
        mine = range(self.group.rank, len(shards), self.group.world_size)
        problem: Exception | None = None
        with progress(None, f"encode {split}", total=sum(len(shards[number]) for number in mine), unit="picture",
                      quiet=not self.group.is_first) as bar:
            try:
                for number in mine:
                    name = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
                    self._encode_shard(source, shards[number], aside / name, bar)
            except Exception as error:
                problem = error
        self.group.raise_together(problem)
        return self.group.first_does(lambda: _split_index(aside, split))

    def _encode_shard(self, source: CaptionedImages, rows: range, path: Path, bar) -> None:
        captions: list[list[str]] = []
        keys: list[str] = []
        tokens: list[numpy.ndarray] = []
        layouts: list[numpy.ndarray] = []
        for start in range(rows.start, rows.stop, self.config.batch_size):
            pixels = []
            for row in range(start, min(start + self.config.batch_size, rows.stop)):
                try:
                    item = source[row]
                    square = image_to_pixels(item.image, self.tokenizer.config.resolution)
                    if self.layouts is not None:
                        layouts.append(self.layouts.of(source, row, square))
                    pixels.append(square)
                except BAD_ITEM_ERRORS as error:
                    self.drops.record(error.reason, source.key(row))
                    continue
                captions.append(list(item.captions))
                keys.append(item.key)
            self.drops.record_good(len(pixels))
            if pixels:
                tokens.append(self._encode(pixels))
            bar.update(len(pixels))
        if tokens:
            write_shard(path, captions, numpy.concatenate(tokens), keys, numpy.stack(layouts) if layouts else None)

    def _encode(self, pixels: list[numpy.ndarray]) -> numpy.ndarray:
        image = pixels_to_float(torch.from_numpy(numpy.stack(pixels))).to(self.group.device)
        codes = self.tokenizer.encode(image)  # [B, h, w]
        return codes_to_tokens(codes).cpu().numpy().astype(token_dtype(self.tokenizer.codebook_size))

    def _publish(self, splits: dict[str, SplitIndex], reasons: Counter[str], aside: Path, out: Path) -> None:
        rows = sum(split.rows for split in splits.values())
        if not rows:
            raise DataError(f"{self.config.data.path}: not one picture could be encoded ({in_words(reasons)})")
        write_index(aside, TokenIndex(
            tokenizer_fingerprint=code_fingerprint(self.tokenizer), codebook_size=self.tokenizer.codebook_size,
            grid=self.tokenizer.grid, layout=self.layouts and self.layouts.index(), splits=splits, dropped=dict(reasons)))
        publish_folder(aside, out)
        if reasons:
            log.warning("passed over %d unusable pictures (%s)", reasons.total(), in_words(reasons))
        log.info("token shards: %s (%s rows)", out, f"{rows:,}")


def _split_index(folder: Path, split: str) -> SplitIndex:
    import pyarrow.parquet

    files = sorted(folder.glob(f"{split}-?????-of-?????.parquet"))
    return SplitIndex(rows=sum(pyarrow.parquet.read_metadata(f).num_rows for f in files), files=[f.name for f in files])


def run(argv: Sequence[str] | None) -> int:
    """Encode from command-line arguments."""
    config = load_config(EncodeRunConfig, sys.argv[1:] if argv is None else argv, "encode_dataset.py", __doc__ or "")
    with processes(config.threads) as group, peers_may_go(group):
        setup_console(group.is_first)
        check_same(group, config.plain(), "the config")
        DatasetEncoder(config, group).run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: errors become one line and an exit code."""
    return run_command(run, argv, "encode_dataset.py")


if __name__ == "__main__":
    sys.exit(main())
