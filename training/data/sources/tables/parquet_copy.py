"""The copy of parquet files that `datasets` keeps in its cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tokenloom_common.errors import RunFailedError
from training.data.sources.tables.hf_datasets import (
    STREAM_INSTEAD,
    cache_failure,
    cache_folder,
    cache_name,
    check_cache,
    quiet_datasets,
    unreadable,
)


def copied_parquet(files: list[Path], rows: int, root: Path) -> Any:
    """Return the rows of the copy of parquet files, which is made if there is none.

    rows: how many the files hold. DataError for damaged files; RunFailedError if the cache cannot
    be written, is full, or holds other rows.
    """
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    needed = sum(path.stat().st_size for path in files)
    check_cache(0, STREAM_INSTEAD)
    try:
        dataset = _load(files, needed)
    except (DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        failure = cache_failure(error, needed, STREAM_INSTEAD)
        where = _first_damaged(files) or f"{root}: one of its parquet files"
        raise failure or unreadable(error, f"{where} cannot be read") from None
    if len(dataset) != rows:
        raise RunFailedError(f"{root}: its parquet files hold {rows:,} rows and their copy in "
                             f"{cache_folder()} {len(dataset):,}; remove that copy")
    return dataset


def _load(files: list[Path], needed: int) -> Any:
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet

    # by path, size, time and inode of every file: `datasets` itself was seen to serve the old rows
    # after a folder was replaced by another with the same names
    first, *others = files
    name = f"tokenloom-{cache_name(first, [cache_name(path) for path in others])}"
    with (quiet_datasets(),
          tempfile.TemporaryDirectory(prefix="tokenloom-", dir=cache_folder()) as links):
        paths = []
        for number, path in enumerate(files):
            # `datasets` takes [ ] * and :: in a path for patterns and protocols
            link = Path(links, f"{number}.parquet")
            link.symlink_to(path.absolute())
            paths.append(str(link))
        # the builder and no load_dataset, which would look for patterns in the cache's own path
        builder = Parquet(config_id=name, data_files=DataFilesDict(
            {"train": DataFilesList(paths, origin_metadata=[])}))
        if not Path(builder.cache_dir).is_dir():
            check_cache(needed, STREAM_INSTEAD)
        builder.download_and_prepare()
        return builder.as_dataset(split="train")


def _first_damaged(files: list[Path]) -> str | None:
    """Return the first file that cannot be read to its end; `datasets` does not say which."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in files:
        try:
            with pq.ParquetFile(path) as parquet:
                for group in range(parquet.num_row_groups):
                    parquet.read_row_group(group)
        except (pa.ArrowException, OSError):
            return str(path)
    return None
