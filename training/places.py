"""Where each training script writes: checked before the script imports torch, and again, by the
first process for all, before any work.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from inference.conversions import OWN_NAMES as CONVERTED_FILES
from inference.conversions import is_ours
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError, run_command
from tokenloom_common.outputs import check_output_folder, given_value
from training.config.loading import find_recipe
from training.data.origin import OWN_FILES as ORIGIN_FILES
from training.data.tokens.encoding_progress import RECORDS, SETTINGS_NAME
from training.data.tokens.shards import INDEX_NAME, SUFFIX

TOKEN_FILES = (INDEX_NAME, *ORIGIN_FILES, SETTINGS_NAME, RECORDS, f"*-?????-of-?????{SUFFIX}")
"""Name patterns of a folder of token shards, which is replaced as a whole."""
CONFIG_NAME = "config.json"
OTHER_FOLDERS = {"model_index.json": "a model folder", "matcher_index.json": "a matcher's folder",
                 CONFIG_NAME: "a model's folder", INDEX_NAME: "a folder of token shards"}
"""File -> the kind of folder that it tells, which a run must not write into."""
EXPORTED_FILES = (*CONVERTED_FILES, "matcher", "matcher_index.json")
"""Name patterns of RUN/model, which the end of a run replaces as a whole."""
FEATURE_FILES = ("index.json", "captions.json", "features.npy", "offsets.npy")
"""Names of a cache of text features."""
DEMO_FILES = ("first.png", "data", "model", "model.training", "phases", "samples.png",
              "report.json", ".*")
DEMO_BYTES = 20 << 20  # of the quick one
HEAD_START = 3.0  # seconds: a launcher kills the first process as soon as another has ended


def check_run_dir(run_dir: str | Path, need_bytes: int = 0, data_path: str | None = None) -> None:
    """Raise UserError if a run cannot write there; files of others stay where they are.

    A run also makes a mess of a model, of token shards and of its own data: it moves what has the
    names of its outputs, and its sample pictures would count as data.
    """
    check_output_folder("--run_dir", run_dir, need_bytes=need_bytes)
    folder = Path(run_dir).resolve()  # where links and `x/..` lead
    for name, what in OTHER_FOLDERS.items():
        is_other = (folder / name).is_file()
        if name == CONFIG_NAME:  # any project may have one
            is_other = is_ours(folder)
        if is_other:
            raise UserError(f"--run_dir {run_dir}: is {what} (it holds {name}); give another "
                            "folder")

    if not data_path or not Path(data_path).is_dir():
        return
    if not any(Path(data_path).iterdir()):  # the data's reader says so
        return
    data = Path(data_path).resolve()
    if folder == data or data in folder.parents:
        raise UserError(f"--run_dir {run_dir}: lies in the data folder {data_path}, to which its "
                        "pictures would be added; give another folder")


def check_export_folder(folder: Path) -> None:
    """Raise UserError if the export at the end of a run would lose files of others in `folder`."""
    check_output_folder("--run_dir", folder, EXPORTED_FILES)


def check_token_folder(out: str | Path, need_bytes: int = 0) -> None:
    """Raise UserError if token shards cannot be written there, or files of others would be lost."""
    check_output_folder("--out", out, TOKEN_FILES, need_bytes)


def check_demo_folder(out: str | Path) -> None:
    """Raise UserError if the demo cannot write there, or it holds files of others."""
    check_output_folder("--out", out, DEMO_FILES, DEMO_BYTES, replaced=False)


def check_feature_cache(folder: str | None) -> None:
    """Raise UserError if a cache that is not there yet cannot be written; None: no cache."""
    if folder is None:
        return
    path = Path(folder)
    is_there = path.is_dir() and any(path.iterdir())
    if not is_there:
        check_output_folder("--text.feature_cache", folder, FEATURE_FILES)


SCRIPTS: dict[str, tuple[str, Callable[[str], None]]] = {
    "train_tokenizer.py": ("run_dir", check_run_dir),
    "train_seq2seq.py": ("run_dir", check_run_dir),
    "train_matcher.py": ("run_dir", check_run_dir),
    "encode_dataset.py": ("out", check_token_folder),
    "demo": ("out", check_demo_folder),
}
"""Script -> the key of its config that names the place, and the check of that place."""


def refuse_early(script: str) -> None:
    """Check the place that the command line names; if it is no good, say so and end the process.

    Wrong options are left to the script's own parser, which comes later.
    """
    key, check = SCRIPTS[script]

    def run(argv: Sequence[str] | None) -> int:
        place = _named_place(argv or (), key)
        if place is None:
            return 0
        try:
            check(place)
        except UserError as error:
            # the processes of a machine have the same place: the first one of them speaks
            if os.environ.get("LOCAL_RANK", "0") != "0":
                error.raised_everywhere = True  # type: ignore[attr-defined]
                time.sleep(HEAD_START)
            raise
        return 0

    code = run_command(run, sys.argv[1:], script)
    if code:
        sys.exit(code)


def _named_place(argv: Sequence[str], key: str) -> str | None:
    """Return the value of --KEY, or of the key in the last --config that has it; None: not given.

    None also for arguments that cannot be read.
    """
    given = given_value(argv, f"--{key}")
    if given is not None:
        return given
    config = given_value(argv, "--config")
    if config is None:
        return None
    try:
        value = read_mapping(find_recipe(config)).get(key)
    except (UserError, OSError):
        return None
    return value if isinstance(value, str) else None
