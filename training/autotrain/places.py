"""Where `tokenloom train` writes: checked before it imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenloom_common.errors import UserError
from tokenloom_common.outputs import check_output_folder

SAMPLES, CURVES, REPORT = "samples.png", "curves.png", "report.html"
MODEL_FILES = ("model_index.json", "generation_config.json", "README.md", "ATTRIBUTION.md",
               "tokenizer_image", "seq2seq", "text_tokenizer")
OUT_NAMES = (*MODEL_FILES, SAMPLES, CURVES, REPORT)
"""What --OUT holds: the model folder, the sheets and the page."""
PLAN, TIME, FIGURES = "plan.json", "time.json", "figures.json"
TRAINING_NAMES = (PLAN, TIME, FIGURES, "data", "tokenizer", "tokenizer.yaml", "tokens",
                  "transformer", "transformer.yaml", "transformer_best", "phases", ".*")
NEED_BYTES = 64 << 20  # of the smallest models with their checkpoints


def training_folder(out: str | Path) -> Path:
    """The folder beside `out` that holds plan, data, runs and checkpoints."""
    path = Path(out)
    return path.with_name(f"{path.name}.training")


def check_places(out: str, data: str | None) -> None:
    """UserError if the model or its training cannot be written there, or something would be lost.

    That is: files of others, a model that this command did not make, or the data itself.
    """
    folder = check_output_folder("--out", out, OUT_NAMES, NEED_BYTES)
    if not folder.name or folder.name == "..":
        raise UserError(f"--out {out}: give the path of a folder of its own, such as my_model")
    training = training_folder(out)
    check_output_folder("--out", training, TRAINING_NAMES, NEED_BYTES, replaced=False)
    if (folder / MODEL_FILES[0]).exists() and read_plan(training) is None:
        raise UserError(f"--out {out}: holds a model that was not trained there ({training} is "
                        "not); give another folder")
    if data is None or not Path(data).is_dir():
        return
    source = Path(data).resolve()
    for place in (folder.resolve(), training.resolve()):
        if place == source or source in place.parents or place in source.parents:
            raise UserError(f"--out {out}: lies in the data folder {data}, or holds it; give "
                            "another folder")


def read_plan(training: Path) -> dict[str, Any] | None:
    """Read the plan of a training that was begun; None where there is none."""
    try:
        plan = json.loads((training / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) and "arguments" in plan else None
