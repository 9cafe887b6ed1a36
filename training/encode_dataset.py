"""Turn captioned pictures into token shards with a trained image tokenizer.

A run that was stopped is started again with the same command, also on another number of processes, and goes on after its last
whole shard.

CPU:  python training/encode_dataset.py --image_tokenizer RUN/model --data.path DIR --out TOKENS
real: deepspeed training/encode_dataset.py --image_tokenizer RUN/model --data.path DIR --out TOKENS
"""

# Axes: B pictures, V views, S side in pixels, N image tokens, L layout tokens

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy
import torch
from torch.utils.data import Dataset

from tokenizer_image import load_tokenizer
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.grid import codes_to_tokens
from tokenizer_image.images import pixels_to_float
from tokenloom_common.errors import DataError, RunFailedError, UserError, run_command
from tokenloom_common.files import publish_folder, refuse_others
from tokenloom_common.progress import progress
from training.config.encoding import EncodeRunConfig
from training.config.loading import load_config
from training.data.origin import OWN_FILES as ORIGIN_FILES
from training.data.origin import data_origin, write_origin
from training.data.run_data import open_pictures
from training.data.sources.captioned_images import BAD_ITEM_ERRORS, CaptionedImages
from training.data.sources.drops import ALWAYS_TOLERATED, DropCounter, in_words
from training.data.sources.open_dataset import list_splits
from training.data.tokens.encoding_plan import (
    FAILED,
    NOTES,
    PLAN,
    DoneShard,
    Shard,
    check_whole,
    cut,
    find_done,
    mark_done,
    prepare,
    reasons,
    remove_notes,
)
from training.data.tokens.layouts import Layouts
from training.data.tokens.shards import (
    INDEX_NAME,
    SUFFIX,
    SplitIndex,
    TokenIndex,
    token_dtype,
    write_index,
    write_shard,
)
from training.data.tokens.views import picture_views, view_names
from training.data.visits.loader import careful_loader
from training.engine.agreement import check_same, check_shared
from training.engine.launch import processes
from training.engine.processes import Processes, peers_may_go
from training.loop.drops import count_opened
from training.loop.log import setup_console

log = logging.getLogger("training.encode_dataset")  # under a launcher __name__ is "__main__"

OWN_FILES = (INDEX_NAME, *ORIGIN_FILES, PLAN, NOTES, f"*-?????-of-?????{SUFFIX}", "*-?????-of-?????.parquet")
PATIENCE = timedelta(hours=12)
"""That processes wait for one another: one may have hours of shards before it when the others are done."""


class _OthersFailedError(Exception):
    """Another process met an error and will say so."""


class EncodedRow(NamedTuple):
    """A picture, read: its views [V, S, S, 3] uint8 and layouts [V, L]; views none and a reason if it cannot be used."""

    key: str
    captions: list[str]
    views: numpy.ndarray | None
    layouts: numpy.ndarray | None
    reason: str = ""


class Rows(Dataset):
    """Pictures of a split by row, ready to be encoded."""

    def __init__(self, source: CaptionedImages, resolution: int, config: EncodeRunConfig) -> None:
        self.source, self.resolution, self.config = source, resolution, config
        self.layouts = Layouts(config.layout) if config.layout.kind != "none" else None

    def __getitem__(self, row: int) -> EncodedRow:
        try:
            item = self.source[row]
            views = picture_views(item.image, self.resolution, self.config.views)
            layouts = None if self.layouts is None else self.layouts.of_views(
                self.source, row, views, mirror=self.config.views.flip)
        except BAD_ITEM_ERRORS as error:
            return EncodedRow(self.source.key(row), [], None, None, error.reason)
        return EncodedRow(item.key, list(item.captions), views, layouts)


class DatasetEncoder:
    """Encodes splits; each process writes every world_size-th shard of those that are not done."""

    def __init__(self, config: EncodeRunConfig, group: Processes) -> None:
        self.config, self.group = config, group
        self.tokenizer = group.first_then_others(lambda: load_tokenizer(config.image_tokenizer, group.device))
        self.tokenizer.config.check_encodes(config.image_tokenizer)
        self.fingerprint = code_fingerprint(self.tokenizer)
        self.drops = DropCounter(config.data.path, config.data.max_bad_fraction)
        out = Path(config.out)
        if not out.name:
            raise UserError(f"--out {config.out}: give the path of a folder of its own, such as runs/tokens")
        self.out = out.resolve() if out.is_symlink() else out
        self._held: IO[str] | None = None
        self.aside = self.out.with_name(f".{self.out.name}.tmp")

    def run(self) -> None:
        """Encode every split into `out`, which appears whole at the end."""
        check_shared(self.group, self.out.parent, f"--out {self.out}")
        try:
            self.group.first_does(self._hold)
            self._run()
        finally:
            if self._held is not None:
                Path(self._held.name).unlink(missing_ok=True)
                self._held.close()

    def _run(self) -> None:
        splits = self.group.first_does(self._splits)
        sources = {split: self._open(split) for split in splits}
        shard_rows: int = self.group.first_does(lambda: prepare(self.aside, self._facts(sources)))
        shards = {split: cut(split, len(source), shard_rows) for split, source in sources.items()}
        done = self.group.first_does(lambda: {
            shard.name: found for part in shards.values() for shard in part if (found := find_done(self.aside, shard))})
        for split, part in shards.items():
            done |= self._encode_split(sources[split], part, done)
        self.group.first_does(lambda: self._publish(shards, done))

    def _open(self, split: str) -> CaptionedImages:
        source = self.group.first_then_others(lambda: open_pictures(self.config.data, split))
        count_opened(self.drops, source, self.group)
        return source

    def _hold(self) -> None:
        """Of all runs, one encodes into a folder at a time: the first process's, until it ends."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        path = self.out.with_name(f".{self.out.name}.lock")
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.is_file() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            mine = False
        if not mine:  # or the run that had it ended in this moment and took the file away
            file.close()
            raise UserError(f"{self.out}: another run is encoding into it; wait for it, stop it, or give another --out")
        self._held = file

    def _splits(self) -> list[str]:
        refuse_others(self.out, OWN_FILES)
        if self.out.is_dir() and any(self.out.iterdir()):
            log.warning("%s: the token shards there will be replaced", self.out)
        return list(self.config.splits) if self.config.splits is not None else list_splits(self.config.data.path)

    def _facts(self, sources: dict[str, CaptionedImages]) -> dict[str, Any]:
        """What an earlier run must share with this one, whose shards are kept."""
        config = self.config
        longest = max(len(source) for source in sources.values())
        rows = {split: [len(source), source.identity()] for split, source in sources.items()}
        columns = {name: getattr(config.data, name) for name in ("caption_column", "image_column")}
        return {"image tokenizer": self.fingerprint, "data": {"path": str(Path(config.data.path).resolve()), **columns},
                "layout": config.layout.plain(), "views": config.views.plain(), "rows": rows,
                "shard_rows asked for": config.shard_rows,
                # every process has a shard to write
                "shard_rows": min(config.shard_rows, -(-longest // self.group.world_size))}

    def _encode_split(self, source: CaptionedImages, shards: list[Shard], done: dict[str, DoneShard]) -> dict[str, DoneShard]:
        """Encode what is not done -> the shards that every process wrote, by name."""
        missing = [shard for shard in shards if shard.name not in done]
        mine = missing[self.group.rank:: self.group.world_size]
        if not self.group.rank:
            for shard in shards:
                if shard.name in done:
                    self._count(done[shard.name].dropped)
        problem: Exception | None = None
        wrote: dict[str, DoneShard] = {}
        with progress(None, f"encode {shards[0].split}", total=sum(len(shard.rows) for shard in mine), unit="picture",
                      quiet=not self.group.is_first) as bar:
            try:
                for shard in mine:
                    wrote[shard.name] = self._encode_shard(source, shard, bar)
            except _OthersFailedError:
                pass
            except Exception as error:
                problem = self._in_words(error)
                (self.aside / f"{FAILED}{self.group.rank}").touch()
        self.group.raise_together(problem)
        return {name: one for part in self.group.gather(wrote) for name, one in part.items()}

    def _in_words(self, error: Exception) -> Exception:
        if getattr(error, "errno", None) != errno.ENOSPC:
            return error
        return RunFailedError(f"{self.aside}: no space left on the device; the shards that are whole stay: free some space, "
                              "and start the same command again")

    def _encode_shard(self, source: CaptionedImages, shard: Shard, bar: Any) -> DoneShard:
        rows: list[EncodedRow] = []
        tokens: list[numpy.ndarray] = []
        dropped: list[tuple[str, str]] = []
        reader = Rows(source, self.tokenizer.config.resolution, self.config)
        for batch in careful_loader(reader, list, sampler=shard.rows, batch_size=self.config.batch_size,
                                    num_workers=self.config.workers):
            if any(self.aside.glob(f"{FAILED}*")):
                raise _OthersFailedError
            good = [row for row in batch if row.views is not None]
            bad = [(row.key, row.reason) for row in batch if row.views is None]
            self._count(bad)
            dropped += bad
            if good:
                tokens.append(self._encode(numpy.stack([row.views for row in good])))
                rows += [row._replace(views=None) for row in good]
            bar.update(len(batch))
        file = None
        if rows:
            layouts = [row.layouts.reshape(-1) for row in rows if row.layouts is not None]
            file = write_shard(self.aside / shard.name, [row.captions for row in rows], numpy.concatenate(tokens),
                               [row.key for row in rows], numpy.stack(layouts) if layouts else None)
        done = DoneShard(file, dropped)
        mark_done(self.aside, shard, done)
        return done

    def _count(self, dropped: list[tuple[str, str]]) -> None:
        for key, reason in dropped:
            self.drops.record(reason, key, seen_before=True)

    def _encode(self, views: numpy.ndarray) -> numpy.ndarray:
        """Pixels [B, V, S, S, 3] uint8 -> tokens [B, V * N]."""
        image = pixels_to_float(views.reshape(-1, *views.shape[2:]))
        codes = torch.cat([self.tokenizer.encode(part.to(self.group.device)).cpu()
                           for part in image.split(self.config.batch_size)])  # [B * V, h, w]
        return codes_to_tokens(codes).numpy().astype(token_dtype(self.tokenizer.codebook_size)).reshape(len(views), -1)

    def _publish(self, shards: dict[str, list[Shard]], done: dict[str, DoneShard]) -> None:
        files = {split: [file for shard in part if (file := done[shard.name].file)] for split, part in shards.items()}
        rows = sum(file.rows for part in files.values() for file in part)
        found: Counter[str] = reasons(list(done.values())) + self.drops.opened
        if not rows:
            raise DataError(f"{self.config.data.path}: not one picture could be encoded ({in_words(found)})")
        limit = max(ALWAYS_TOLERATED, self.config.data.max_bad_fraction * self.drops.seen)
        if found.total() > limit:  # a process counts its own
            raise DataError(f"{self.config.data.path}: {found.total():,} of {self.drops.seen:,} are unusable "
                            f"({in_words(found)}), more than max_bad_fraction {self.config.data.max_bad_fraction:g} allows")
        check_whole(self.aside, [file for part in files.values() for file in part])
        layouts = Layouts(self.config.layout).index() if self.config.layout.kind != "none" else None
        write_index(self.aside, TokenIndex(
            tokenizer_fingerprint=self.fingerprint, codebook_size=self.tokenizer.codebook_size, grid=self.tokenizer.grid,
            views=view_names(self.config.views), layout=layouts, dropped=dict(found),
            splits={split: SplitIndex(rows=sum(file.rows for file in part), files=part) for split, part in files.items()}))
        write_origin(data_origin(self.config.data.path), self.aside,
                     "Image tokens and captions of this data, made by Tokenloom's encode_dataset; tokens.json says with what.")
        publish_folder(self.aside, self.out)
        remove_notes(self.out)
        if found:
            log.warning("passed over %d unusable pictures (%s)", found.total(), in_words(found))
        log.info("token shards: %s (%s rows)", self.out, f"{rows:,}")


def run(argv: Sequence[str] | None) -> int:
    """Encode from command-line arguments."""
    config = load_config(EncodeRunConfig, sys.argv[1:] if argv is None else argv, "encode_dataset.py", __doc__ or "")
    with processes(config.threads, PATIENCE) as group, peers_may_go(group):
        setup_console(group.is_first)
        check_same(group, config.plain(), "the config")
        DatasetEncoder(config, group).run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: errors become one line and an exit code."""
    return run_command(run, argv, "encode_dataset.py")


if __name__ == "__main__":
    sys.exit(main())
