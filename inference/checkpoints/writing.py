"""Write a converted checkpoint as a folder with a model card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.rules import ConvertedPart
from tokenizer_image import ImageTokenizer
from tokenloom_common.files import atomic_folder, write_text_atomic
from tokenloom_common.model_card import CARD_NAME, CardFacts, model_card
from tokenloom_common.outputs import check_output_folder
from tokenloom_common.pretrained import OWN_FILES


class _Wording(NamedTuple):
    """How a model card speaks of a kind of result."""

    name: str
    article: str
    pipeline_tag: str | None
    usage: str  # Python code


_MODEL = _Wording(
    "text-to-image model", "A", "text-to-image",
    "from tokenloom import TextToImage\n\n"
    'model = TextToImage.from_pretrained("path/to/this/folder")\n'
    'model.generate({caption}, seed=0).images[0].save("picture.png")')
_IMAGE_TOKENIZER = _Wording(
    "image tokenizer", "An", "image-to-image",
    'from tokenloom import load_tokenizer\n\ntokenizer = load_tokenizer("path/to/this/folder")\n'
    "codes = tokenizer.encode(image)    # image [B, 3, S, S] in [-1, 1] -> codes [B, h, w]")
_TRANSFORMER = _Wording(
    "transformer", "A", None,
    'from seq2seq import load_transformer\n\nmodel = load_transformer("path/to/this/folder")')


def write_converted(converted: ConvertedPart | ConvertedModel, source: str | Path, out: str | Path,
                    license_name: str | None = None) -> tuple[str, int]:
    """Write the folder, whole or not at all -> (name of what it holds, number of parameters).

    UserError if the folder holds other files.
    """
    wording, count = _wording(converted), count_parameters(converted)
    # before the weights are read; at least 2 bytes of each number
    check_output_folder("OUT", out, ("*",), need_bytes=2 * count)
    card = _card(converted, source, license_name)
    folder = Path(out)

    if isinstance(converted, ConvertedModel):
        converted.write(folder, card)
    else:
        # a part alone; a whole model's folder has an index and generation settings too
        with atomic_folder(folder, OWN_FILES) as aside:
            converted.write(aside)
            write_text_atomic(aside / CARD_NAME, card)
    return wording.name, count


def count_parameters(converted: ConvertedPart | ConvertedModel) -> int:
    """Number of parameters in all parts."""
    if isinstance(converted, ConvertedModel):
        tokenizer = converted.image_tokenizer
        of_transformer = count_parameters(converted.seq2seq)
        if isinstance(tokenizer, ConvertedPart):
            return of_transformer + count_parameters(tokenizer)
        # loaded from a folder of ours, as --image-tokenizer
        return of_transformer + sum(parameter.numel() for parameter in tokenizer.parameters())
    return sum(parameter.numel() for parameter in converted.built_on_meta().parameters())


def _wording(converted: ConvertedPart | ConvertedModel) -> _Wording:
    if isinstance(converted, ConvertedModel):
        return _MODEL
    if issubclass(converted.model_class, ImageTokenizer):
        return _IMAGE_TOKENIZER
    return _TRANSFORMER


def _card(converted: ConvertedPart | ConvertedModel, source: str | Path, license_name: str | None
          ) -> str:
    wording = _wording(converted)
    summary = (f"{wording.article} {wording.name} with another project's weights, converted by "
               "Tokenloom: the same numbers in its format.")
    if isinstance(converted, ConvertedModel):
        config = converted.seq2seq.config
        usage = wording.usage.format(caption=_example_caption(converted))
    else:
        config = converted.config
        usage = wording.usage

    name = _source_name(source)
    notes = None
    if converted.notes:
        lines = "\n".join(f"- {note}" for note in converted.notes)
        notes = f"## Assumed in the conversion\n\n{lines}"
    return model_card(CardFacts(
        title=_title(source), summary=summary, usage=usage, pipeline_tag=wording.pipeline_tag,
        tags=("converted",),
        facts=(("converted from", name), ("parameters", f"{count_parameters(converted):,}")),
        license=license_name, source=f"`{name}`", notes=notes, config=config.plain()))


def _source_name(source: str | Path) -> str:
    """The source's own file or folder name in one line, safe inside Markdown backticks."""
    name = Path(os.path.abspath(source)).name  # abspath: `.` and `..` have no name of their own
    return " ".join(name.replace("`", "'").split())


def _title(source: str | Path) -> str:
    name = _source_name(source)
    stem = name if Path(source).is_dir() else Path(name).stem  # dots in a folder's name stay
    return stem.replace("_", " ")


def _example_caption(model: ConvertedModel) -> str:
    """A caption that the model can read, as a Python literal."""
    classes = getattr(model.text_tokenizer.config, "classes", None)
    return json.dumps(classes[0] if classes else "a red heart", ensure_ascii=False)
