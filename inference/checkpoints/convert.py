"""Convert a published checkpoint: find its kind, run the kind's converter, check the result."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart
from inference.conversions import CHECKPOINT_KINDS
from tokenloom_common.errors import MissingFileError, choose
from tokenloom_common.pretrained import PretrainedModule

log = logging.getLogger(__name__)

def convert(kind: str | None, source: str | Path, options: ConvertOptions | None = None
            ) -> ConvertedPart | ConvertedModel:
    """Read a published checkpoint as parts of ours, checked and not yet written.

    kind: a name in CHECKPOINT_KINDS; None finds it from the source's files and tensor names.
    """
    path = Path(source)
    if not str(source):  # Path("") is the current folder
        raise MissingFileError("the source is an empty name")
    if not path.exists():
        raise MissingFileError(f"{source}: no such file or folder")
    if kind is not None:
        choose(CHECKPOINT_KINDS, kind, "kind of checkpoint")
    options = options or ConvertOptions()
    options.check()  # here and not in the command: from_checkpoint gets them from Python callers

    if kind is None:
        from inference.checkpoints.detect import detect  # needs readers of several kinds

        kind = detect(path)

    # imported by name: no user of one kind waits for the imports of the others
    module = kind.replace("-", "_")
    converter = importlib.import_module(f"inference.checkpoints.formats.{module}")
    converted: ConvertedPart | ConvertedModel = converter.convert(path, options)
    converted.check()  # a mismatch is found before a folder is made
    return converted


def from_checkpoint(kind: str | None, source: str | Path, config: str | Path | None = None, *,
                    resolution: int | None = None, image_tokenizer: str | Path | None = None,
                    text_encoder: str | None = None, classes: str | Path | None = None,
                    weight_set: str | None = None, like_transformers: bool = False
                    ) -> PretrainedModule | object:
    """Load a published checkpoint: an image tokenizer, a transformer, or a whole TextToImage.

    kind: a name in `inference.checkpoints.CHECKPOINT_KINDS`; None finds it from the source. The
    rest: see ConvertOptions. UserError in one line for a file of another kind, missing, unexpected
    or mis-shaped tensors, a file that asks for code. What was assumed, and which of several sets of
    weights was taken, is logged as warnings.
    """
    options = ConvertOptions(
        config=_optional_path(config), resolution=resolution,
        image_tokenizer=_optional_path(image_tokenizer), text_encoder=text_encoder,
        classes=_optional_path(classes), weight_set=weight_set, like_transformers=like_transformers)
    converted = convert(kind, source, options)
    for note in converted.notes:
        log.warning("%s: %s", source, note)
    return converted.load()


def _optional_path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)
