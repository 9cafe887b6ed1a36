"""Keys of the scripts on the command line of `tokenloom train`."""

from __future__ import annotations

from collections.abc import Sequence

from tokenloom_common.errors import UserError

STAGE_NAMES = ("tokenizer", "transformer")
"""Their scripts' keys are given as --STAGE.KEY."""
OWN_KEYS = ("config", "run_dir", "seed", "image_tokenizer", "init_from", "data", "data.path",
            "data.split", "data.validation_split", "data.on_the_fly", "model.resolution",
            "checkpoint", "checkpoint.resume")
"""Keys that this command decides itself."""
READING_KEYS = ("data.format", "data.caption_column", "data.image_column", "data.caption_ending",
                "data.encoding", "data.follow_links", "data.max_pixels", "data.max_bad_fraction")
"""Keys of how the user's data is read; the scripts read a copy of it, which has one form."""


def split_overrides(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Take `--tokenizer.KEY VALUE` and `--transformer.KEY VALUE` out of a command line.

    Returns the keys by stage, as the scripts take them, and the other arguments.
    UserError for keys that are decided by this command, and for a key without a value.
    """
    found: dict[str, list[str]] = {stage: [] for stage in STAGE_NAMES}
    others = []
    items = list(arguments)
    while items:
        argument = items.pop(0)
        flag, has_value, value = argument.partition("=")
        stage, dot, key = flag.removeprefix("--").partition(".")
        if not flag.startswith("--") or not dot or stage not in STAGE_NAMES:
            others.append(argument)
            continue
        _check_key(flag, key)
        if not has_value:
            if not items:
                raise UserError(f"{flag} needs a value")
            value = items.pop(0)
        found[stage] += [f"--{key}", value]
    return found, others


def _check_key(flag: str, key: str) -> None:
    if key in READING_KEYS:
        raise UserError(f"{flag}: the scripts read a copy of the data; give --{key}")
    if key in OWN_KEYS:
        instead = "use --size" if key == "model.resolution" else "leave it out"
        raise UserError(f"{flag}: `tokenloom train` decides it; {instead}")
