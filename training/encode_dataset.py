"""Turn captioned images into token shards with a trained image tokenizer.

A run that was stopped is started again with the same command, also on another number of processes,
and continues after its last whole shard.

CPU:  python training/encode_dataset.py --image_tokenizer RUN/model --data.path DIR --out TOKENS
real: deepspeed training/encode_dataset.py --image_tokenizer RUN/model --data.path DIR --out TOKENS
"""

from __future__ import annotations

import sys

from training.places import check_token_folder, refuse_early

if __name__ == "__main__":
    refuse_early("encode_dataset.py")  # before the imports below, which take seconds

import errno
import fcntl
import logging
import os
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from tokenizer_image import load_tokenizer
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.errors import DataError, RunFailedError, UserError, run_command
from tokenloom_common.files import publish_folder
from tokenloom_common.progress import progress
from training.config.encoding import EncodeRunConfig
from training.config.loading import load_config
from training.data.origin import data_origin, write_origin
from training.data.run_data import open_images
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.drops import (
    ALWAYS_TOLERATED,
    DOWNLOAD_FAILED,
    DropCounter,
    format_reasons,
)
from training.data.sources.open_dataset import list_splits
from training.data.tokens.encoding_progress import (
    FAILURE_MARK,
    FinishedShard,
    Shard,
    check_whole,
    count_drop_reasons,
    cut_into_shards,
    find_done,
    prepare_folder,
    remove_records,
)
from training.data.tokens.layouts import Layouts
from training.data.tokens.shard_encoder import OthersFailedError, ShardEncoder
from training.data.tokens.shards import ShardFile, SplitIndex, TokenIndex, write_index
from training.data.tokens.views import view_names
from training.engine.agreement import check_same, check_shared
from training.engine.launch import processes
from training.engine.processes import Processes, peers_may_go
from training.loop.drops import count_opened
from training.loop.log import setup_console

log = logging.getLogger("training.encode_dataset")  # under a launcher __name__ is "__main__"

PATIENCE = timedelta(hours=12)
"""How long processes wait for one another: one may have hours of shards before it when the others
are done."""


class DatasetEncoder:
    """Encodes splits; each process writes every world_size-th shard of those that are not done."""

    def __init__(self, config: EncodeRunConfig, group: Processes) -> None:
        self.config, self.group = config, group
        self.tokenizer = group.first_then_others(
            lambda: load_tokenizer(config.image_tokenizer, group.device))
        self.tokenizer.config.check_encodes(config.image_tokenizer)
        self.fingerprint = code_fingerprint(self.tokenizer)
        self.drops = DropCounter(config.data.path, config.data.max_bad_fraction)

        out = Path(config.out)
        if not out.name:
            raise UserError(f"--out {config.out}: give the path of a folder of its own, such as "
                            "runs/tokens")
        self.out = out.resolve() if out.is_symlink() else out  # a rename would replace the link
        # beside it, since a rename is atomic on one file system only; a stopped run continues there
        self.aside = self.out.with_name(f".{self.out.name}.tmp")
        self.shards = ShardEncoder(self.tokenizer, config, self.aside, self.drops, group.device)
        self._lock: IO[str] | None = None

    def run(self) -> None:
        """Encode every split into `out`, which appears whole at the end."""
        check_shared(self.group, self.out.parent, f"--out {self.out}")
        try:
            self.group.first_does(self._hold)
            self._run()
        finally:
            if self._lock is not None:
                # while it is locked, or the file of the next run could be deleted
                Path(self._lock.name).unlink(missing_ok=True)
                self._lock.close()

    def _run(self) -> None:
        splits = self.group.first_does(self._splits)
        sources = {split: self._open(split) for split in splits}
        # an earlier run's, if there is one: its shards are cut that way, whatever ran it
        shard_rows: int = self.group.first_does(
            lambda: prepare_folder(self.aside, self._facts(sources)))
        shards = {split: cut_into_shards(split, len(source), shard_rows)
                  for split, source in sources.items()}

        done = self.group.first_does(lambda: self._find_done(shards))
        self.group.first_does(lambda: self._check_room(shards, done))
        for split, of_split in shards.items():
            done |= self._encode_split(sources[split], of_split, done)
        self.group.first_does(lambda: self._publish(shards, done))

    # ---- what there is to do

    def _hold(self) -> None:
        """Hold `out` against other runs until this one ends; on the first process."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        path = self.out.with_name(f".{self.out.name}.lock")
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a run that ended in this moment may have deleted the file that was locked here
            is_ours = path.is_file() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            file.close()
            raise UserError(f"{self.out}: another run is encoding into it; wait for it, stop it, "
                            "or give another --out")
        self._lock = file

    def _splits(self) -> list[str]:
        # before hours of work, since publishing replaces the folder
        check_token_folder(self.out)
        if self.out.is_dir() and any(self.out.iterdir()):
            log.warning("%s: the token shards there will be replaced", self.out)
        if self.config.splits is not None:
            return list(self.config.splits)
        return list_splits(self.config.data.path, **self.config.data.reading())

    def _open(self, split: str) -> CaptionedImages:
        source = self.group.first_then_others(lambda: open_images(self.config.data, split))
        count_opened(self.drops, source, self.group)
        return source

    def _facts(self, sources: dict[str, CaptionedImages]) -> dict[str, Any]:
        """Return the facts that an earlier run, whose shards are kept, must share with this one."""
        config = self.config
        data = {**config.data.reading(), "path": str(Path(config.data.path).resolve())}
        rows = {split: [len(source), source.identity()] for split, source in sources.items()}
        # so that every process has a shard of the longest split to write
        longest = max(len(source) for source in sources.values())
        rows_per_process = -(-longest // self.group.world_size)  # rounded up
        return {"image tokenizer": self.fingerprint, "data": data, "layout": config.layout.plain(),
                "views": config.views.plain(), "rows": rows,
                "shard_rows asked for": config.shard_rows,
                "shard_rows": min(config.shard_rows, rows_per_process)}

    def _find_done(self, shards: dict[str, list[Shard]]) -> dict[str, FinishedShard]:
        """Return the whole shards that an earlier run left, by name."""
        done = {}
        for of_split in shards.values():
            for shard in of_split:
                found = find_done(self.aside, shard)
                if found:
                    done[shard.name] = found
        return done

    def _check_room(self, shards: dict[str, list[Shard]], done: dict[str, FinishedShard]) -> None:
        """Raise UserError if the tokens that are still to be written would fill the disk."""
        missing = [shard for of_split in shards.values() for shard in of_split
                   if shard.name not in done]
        rows = sum(len(shard.rows) for shard in missing)
        check_token_folder(self.out, need_bytes=rows * self.shards.row_bytes())

    # ---- encode

    def _encode_split(self, source: CaptionedImages, shards: list[Shard],
                      done: dict[str, FinishedShard]) -> dict[str, FinishedShard]:
        """Encode the shards that are not done -> those that every process wrote, by name."""
        missing = [shard for shard in shards if shard.name not in done]
        own = missing[self.group.rank:: self.group.world_size]
        if self.group.is_first:  # of earlier shards, one process alone counts the unusable images
            for shard in shards:
                if shard.name in done:
                    self.shards.count(done[shard.name].dropped)

        problem: Exception | None = None
        written: dict[str, FinishedShard] = {}
        total = sum(len(shard.rows) for shard in own)
        with progress(None, f"encode {shards[0].split}", total=total, unit="picture",
                      quiet=not self.group.is_first) as bar:
            try:
                for shard in own:
                    written[shard.name] = self.shards.encode(source, shard, bar)
            except OthersFailedError:
                pass  # they raise the reason below, together with this process
            except Exception as error:
                problem = self._explained(error)
                # stops the others at their next batch
                (self.aside / f"{FAILURE_MARK}{self.group.rank}").touch()
        self.group.raise_together(problem)

        everyone: dict[str, FinishedShard] = {}
        for of_process in self.group.gather(written):
            everyone |= of_process
        return everyone

    def _explained(self, error: Exception) -> Exception:
        if getattr(error, "errno", None) != errno.ENOSPC:
            return error
        return RunFailedError(f"{self.aside}: no space left on the device; the shards that are "
                              "whole stay: free some space, and start the same command again")

    # ---- publish

    def _publish(self, shards: dict[str, list[Shard]], done: dict[str, FinishedShard]) -> None:
        """Check all shards together, write their index, and rename the folder to `out`."""
        files: dict[str, list[ShardFile]] = {}
        for split, of_split in shards.items():
            written = [done[shard.name].file for shard in of_split]
            files[split] = [file for file in written if file is not None]
        rows = {split: sum(file.rows for file in of_split) for split, of_split in files.items()}
        total = sum(rows.values())

        dropped: Counter[str] = count_drop_reasons(list(done.values())) + self.drops.opened
        failed = dropped.pop(DOWNLOAD_FAILED, 0)  # of data that is read in place; no damage
        self._check_dropped(total, dropped, failed)  # before anything appears in `out`
        check_whole(self.aside, [file for of_split in files.values() for file in of_split])

        layouts = None
        if self.config.layout.kind != "none":
            layouts = Layouts(self.config.layout).index()
        splits = {split: SplitIndex(rows=rows[split], files=of_split)
                  for split, of_split in files.items()}
        write_index(self.aside, TokenIndex(
            tokenizer_fingerprint=self.fingerprint, codebook_size=self.tokenizer.codebook_size,
            grid=self.tokenizer.grid, views=view_names(self.config.views), layout=layouts,
            dropped=dict(dropped), splits=splits))
        write_origin(data_origin(self.config.data.path), self.aside,
                     "Image tokens and captions of this data, made by Tokenloom's encode_dataset; "
                     "tokens.json says with what.")
        # the records are removed last: a run that is killed before continues from them
        publish_folder(self.aside, self.out)
        remove_records(self.out)
        if failed:
            log.info("left out: %s downloads failed", f"{failed:,}")
        if dropped:
            log.warning("passed over %d unusable pictures (%s)", dropped.total(),
                        format_reasons(dropped))
        log.info("token shards: %s (%s rows)", self.out, f"{total:,}")

    def _check_dropped(self, rows: int, dropped: Counter[str], failed: int) -> None:
        """Raise DataError when nothing is left, or all processes together dropped too much."""
        path, fraction = self.config.data.path, self.config.data.max_bad_fraction
        seen = self.drops.seen  # all rows: every process opened every split
        if not rows:
            reasons = format_reasons(dropped) or f"{failed:,} downloads failed"
            raise DataError(f"{path}: not one picture could be encoded ({reasons})")
        if dropped.total() > max(ALWAYS_TOLERATED, fraction * seen):
            raise DataError(f"{path}: {dropped.total():,} of {seen:,} are unusable "
                            f"({format_reasons(dropped)}), more than --data.max_bad_fraction "
                            f"{fraction:g} allows")


def run(argv: Sequence[str] | None) -> int:
    """Encode from command-line arguments."""
    config = load_config(EncodeRunConfig, sys.argv[1:] if argv is None else argv,
                         "encode_dataset.py", __doc__ or "")
    with processes(config.threads, PATIENCE) as group, peers_may_go(group):
        setup_console(group.is_first)
        # each process writes shards of its own, which must be made in the same way
        check_same(group, config.plain(), "the config")
        group.first_does(lambda: check_token_folder(config.out))
        DatasetEncoder(config, group).run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and turn errors into one line and an exit code."""
    return run_command(run, argv, "encode_dataset.py")


if __name__ == "__main__":
    sys.exit(main())
