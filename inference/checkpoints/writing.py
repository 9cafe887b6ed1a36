"""A converted checkpoint as a folder with a model card."""

from __future__ import annotations

import json
import os
from pathlib import Path

from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.rules import ConvertedPart
from tokenizer_image import ImageTokenizer
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError
from tokenloom_common.files import atomic_folder, refuse_others, write_text_atomic
from tokenloom_common.model_card import CARD_NAME, CardFacts, model_card
from tokenloom_common.pretrained import OWN_FILES

_USAGE = {
    "text-to-image model": 'from tokenloom import TextToImage\n\nmodel = TextToImage.from_pretrained("path/to/this/folder")\n'
                           'model.generate({caption}, seed=0).images[0].save("picture.png")',
    "image tokenizer": 'from tokenloom import load_tokenizer\n\ntokenizer = load_tokenizer("path/to/this/folder")\n'
                       "codes = tokenizer.encode(image)    # image [B, 3, S, S] in [-1, 1] -> codes [B, h, w]",
    "transformer": 'from seq2seq import load_transformer\n\nmodel = load_transformer("path/to/this/folder")'}
_ARTICLE = {"text-to-image model": "A", "image tokenizer": "An", "transformer": "A"}
_TAGS = {"text-to-image model": "text-to-image", "image tokenizer": "image-to-image", "transformer": None}


def write_converted(converted: ConvertedPart | ConvertedModel, source: str | Path, out: str | Path,
                    license_name: str | None = None) -> tuple[str, int]:
    """Write the folder, which appears whole -> (what it is, its parameters). UserError if it holds other files."""
    what, count, card = what_it_is(converted), count_parameters(converted), _card(converted, source, license_name)
    folder = Path(out)
    if isinstance(converted, ConvertedModel):
        converted.write(folder, card)
        return what, count
    own = (*OWN_FILES, CARD_NAME)
    refuse_others(folder, own)
    with atomic_folder(folder, own) as aside:
        converted.write(aside)
        write_text_atomic(aside / CARD_NAME, card)
    return what, count


def refuse_loss(source: str | Path, out: str | Path) -> None:
    """UserError if writing the folder `out` would replace the source, or another project's model."""
    folder, given = Path(out).resolve(), Path(source).resolve()
    if folder == given or folder in given.parents:
        raise UserError(f"{out}: holds the source {source}, which would be lost; give another folder")
    if (folder / "config.json").is_file() and not is_ours(folder):
        raise UserError(f"{out}: holds another project's config.json, which would be lost; give another folder")


def is_ours(folder: Path) -> bool:
    """Whether a folder has the config.json of a part of ours."""
    path = folder / "config.json"
    try:
        return path.is_file() and {"kind", "schema_version"} <= read_mapping(path).keys()
    except UserError:
        return False


def what_it_is(converted: ConvertedPart | ConvertedModel) -> str:
    """A whole model, an image tokenizer, or a transformer alone."""
    if isinstance(converted, ConvertedModel):
        return "text-to-image model"
    return "image tokenizer" if issubclass(converted.model_class, ImageTokenizer) else "transformer"


def count_parameters(converted: ConvertedPart | ConvertedModel) -> int:
    """Learned numbers of all that was converted."""
    if isinstance(converted, ConvertedModel):
        tokenizer = converted.image_tokenizer
        return count_parameters(converted.seq2seq) + (
            sum(parameter.numel() for parameter in tokenizer.parameters()) if isinstance(tokenizer, ImageTokenizer)
            else count_parameters(tokenizer))
    return sum(parameter.numel() for parameter in converted.built_on_meta().parameters())


def _card(converted: ConvertedPart | ConvertedModel, source: str | Path, license_name: str | None) -> str:
    what = what_it_is(converted)
    config = converted.seq2seq.config if isinstance(converted, ConvertedModel) else converted.config
    usage = _USAGE[what]
    if isinstance(converted, ConvertedModel):
        usage = usage.format(caption=_caption(converted))
    notes = "\n".join(f"- {note}" for note in converted.notes)
    summary = f"{_ARTICLE[what]} {what} with another project's weights, converted by Tokenloom: the same numbers in its format."
    return model_card(CardFacts(
        title=_title(source), summary=summary, usage=usage, pipeline_tag=_TAGS[what], tags=("converted",),
        facts=(("converted from", _name(source)), ("parameters", f"{count_parameters(converted):,}")),
        license=license_name, source=f"`{_name(source)}`",
        notes=f"## Assumed in the conversion\n\n{notes}" if notes else None, config=config.plain()))


def _name(source: str | Path) -> str:
    """The file's or folder's own name in one line, of `.` and `..` too."""
    return " ".join(Path(os.path.abspath(source)).name.replace("`", "'").split())


def _title(source: str | Path) -> str:
    name = _name(source)
    return (name if Path(source).is_dir() else Path(name).stem).replace("_", " ")


def _caption(model: ConvertedModel) -> str:
    """One that the model can read, in quotes."""
    classes = getattr(model.text_tokenizer.config, "classes", None)
    return json.dumps(classes[0] if classes else "a red heart", ensure_ascii=False)
