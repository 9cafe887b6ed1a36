"""Errors that a person can act on, and the exit code that each one ends a command with.

0 done, 1 failed (with its reason in one line), 2 the user's mistake, 3 resume refused, 4 data
unusable, 143/130 stopped by a signal after a checkpoint.
"""

from __future__ import annotations

import argparse
import codecs
import difflib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS,
              errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
"""Errors of the operating system about a path that the user gave; a full disk is none of these."""

SHOWN_ERRORS = "tokenloom-shown"
"""Error handler of stdout and stderr: see _shown."""

_FOREIGN_OPTION = re.compile(
    # Python arguments and functions
    r"trust_remote_code|weights_only|add_safe_globals|allow_pickle|strict\s*=\s*False|use_safetensors"
    r"|ignore_mismatched_sizes|use_auth_token|\btoken\s*=|force_download|verification_mode"
    r"|ignore_verifications|character_coverage|LOAD_TRUNCATED_IMAGES|MAX_IMAGE_PIXELS|model_max_length"
    r"|find_unused_parameters|zero_allow_untested|zero_force_ds|gradient_accumulation_steps"
    r"|train_micro_batch_size|max_shard_size|map_location|from_tf|from_flax|use_fast\b|torch\._dynamo"
    # variables of the environment and other programs
    r"|HF_TOKEN|CUDA_LAUNCH_BLOCKING|TORCH_USE_CUDA_DSA|TORCHDYNAMO_|TORCH_LOGS|PYTORCH_\w*ALLOC_CONF"
    r"|huggingface-cli|hf auth|errors\.pydantic\.dev")
"""What advice of libraries names and no option of ours is."""
_LEAD_IN = re.compile(r"^(please|you can|you have|to do so|consider|try |alternatively|if you |"
                      r"make sure|this file can still|for debugging|for more|in pytorch|\(\d\))",
                      re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class UserError(ValueError):
    """The user's mistake: the message says what, where and what to do, in one line."""

    exit_code = 2


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named is not there, or half of it is missing."""

    def __str__(self) -> str:  # OSError would print its errno tuple
        return str(self.args[0]) if self.args else ""


class ResumeError(UserError):
    """A run cannot be continued from the checkpoint that is there."""

    exit_code = 3


class DataError(UserError):
    """The data holds nothing usable, or too many unusable items."""

    exit_code = 4


class RunFailedError(RuntimeError):
    """The work itself failed (not a wrong input): the message is the reason in one line."""

    exit_code = 1


class StoppedBySignalError(Exception):
    """A run stopped by SIGTERM or SIGINT after it had saved its checkpoint."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number} after a checkpoint; the same command "
                         "goes on from there")
        self.exit_code = 128 + signal_number


MANY_NAMES = 24
"""More names than this, as a whole config has, are listed by their sections."""


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest valid name, or the list of names when none is close."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    if len(names) > MANY_NAMES:
        names = _sections(names)
    return f"; valid names: {', '.join(sorted(names))}" if names else ""


def _sections(names: list[str]) -> list[str]:
    """Shorten dotted names to their sections: "model.width" and "model.heads" to "model.*"."""
    sections = {name.split(".")[0] for name in names if "." in name}
    return [*(f"{section}.*" for section in sections),
            *(name for name in names if "." not in name and name not in sections)]


def choose(table: dict, name: str, what: str):
    """Return the entry of a table by its name; UserError that lists the names otherwise."""
    if name in table:
        return table[name]
    near = nearest_name(name, table)  # the nearest one, or all of them
    valid = "" if "valid names" in near else f" (valid: {', '.join(table)})"
    raise UserError(f"unknown {what} '{name}'{near}{valid}")


def one_line(error: BaseException) -> str:
    """An exception's message folded to one line, with its type unless the error is ours."""
    text = " ".join(str(error).split())
    # shorter than "[Errno 2] No such file or directory: 'x'", and in the form of our own errors
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    if isinstance(error, (UserError, RunFailedError, StoppedBySignalError)):
        return text
    text = without_foreign_advice(text)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def without_foreign_advice(text: str) -> str:
    """Cut a library's message where its advice about options of its own begins.

    No option of ours is called `trust_remote_code` or `--character_coverage`, and some of that
    advice is unsafe. A message without such advice stays whole.
    """
    sentences = _SENTENCE_END.split(text)
    if not any(_FOREIGN_OPTION.search(sentence) for sentence in sentences):
        return text

    kept = []
    for sentence in sentences:
        if _FOREIGN_OPTION.search(sentence) or _LEAD_IN.search(sentence):
            break
        kept.append(sentence)
    return " ".join(kept)


class OneLineParser(argparse.ArgumentParser):
    """Report a wrong option in one line like every other mistake, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None,
                prog: str) -> int:
    """Run a command's main; turn its errors into one line on stderr and the right exit code.

    TOKENLOOM_DEBUG=1 shows the traceback as well.
    """
    try:
        _escape_what_cannot_be_shown()
        try:
            return main(argv)
        finally:
            # here, where a BrokenPipeError is caught; at the interpreter's exit it is a traceback
            if sys.stdout is not None:  # None where the caller closed it
                sys.stdout.flush()

    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it
    except StoppedBySignalError as stop:
        if os.environ.get("RANK", "0") == "0":  # all ranks stop together
            print(f"{prog}: {stop}", file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:  # the reader of our stdout went away (`| head`); nothing is left to say
        # the interpreter flushes stdout once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("TOKENLOOM_DEBUG"):
            raise
        _print_error(error, prog)
        # a wrong path is the user's mistake even if no code of ours foresaw it
        wrong_path = isinstance(error, OSError) and error.errno in WRONG_PATH
        return int(getattr(error, "exit_code", 2 if wrong_path else 1))


def _escape_what_cannot_be_shown() -> None:
    """Let stdout and stderr write as \\u732b what their encoding lacks, instead of raising.

    A caption or a file's name must not end a command on a terminal of Latin-1, ASCII or Shift-JIS.
    """
    codecs.register_error(SHOWN_ERRORS, _shown)
    for stream in (sys.stdout, sys.stderr):
        # others, such as a StringIO, take every character
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors=SHOWN_ERRORS)


def _shown(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return how the first character that cannot be encoded is shown; a handler of codecs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name, as Python holds it
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return character.encode("ascii", "backslashreplace").decode(), error.start + 1


def _print_error(error: Exception, prog: str) -> None:
    """Print the error in one line; of ranks that agreed on one error, rank 0 alone."""
    is_rank_0 = os.environ.get("RANK", "0") == "0"
    if getattr(error, "raised_everywhere", False) and not is_rank_0:
        return
    where = getattr(error, "raised_on", None)  # the machine that failed, if ranks agreed on it
    place = f" (on {where})" if where else ""
    text = one_line(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
        text = f"{text.rstrip('.')}; take fewer pictures at a time: --batch-size, train.batch_size"
    print(f"{prog}: error: {text}{place}", file=sys.stderr)
