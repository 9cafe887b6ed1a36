"""Structured logs: one JSON object a line on stderr, without prompts unless they are asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

SAY_PROMPTS = ("seq2seq.text_tokenizer", "seq2seq.bpe_tokenizer", "seq2seq.frozen_text")
"""Their warnings quote captions that are longer than a model reads; replies say that in `note`."""


class JsonLines(logging.Formatter):
    """Format a record as {"time", "level", "event", ...}, with the fields that `log_event` gave."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        values: dict[str, Any] = {"time": f"{moment}.{int(record.msecs):03d}Z",
                                  "level": record.levelname.lower(), "event": record.getMessage()}
        values |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            values["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        # default=str: a log line must not fail on a value that is no JSON
        return json.dumps(values, default=str)


def start_logging(prompts: bool = False, stream: TextIO | None = None) -> None:
    """Send the process's logs to stderr as JSON lines: ours, and what libraries warn of."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    logging.getLogger().handlers = [handler]
    if not prompts:
        for name in SAY_PROMPTS:
            logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("inference.serving").setLevel(logging.INFO)
    # its warnings are of what clients send, one for each
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def log_event(logger: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Log an event with its fields; None is left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    logger.log(level, event, extra={"fields": given})


def hashed(identifier: str | None) -> str | None:
    """Return a short hash of an end user's identifier: equal for equal users, and no name."""
    if not identifier:
        return None
    return hashlib.sha256(identifier.encode()).hexdigest()[:16]
