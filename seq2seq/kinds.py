"""Families of transformers by name, and a loader for folders of either."""

from __future__ import annotations

from pathlib import Path

import torch

from seq2seq.decoder_only import DecoderOnly
from seq2seq.encoder_decoder import EncoderDecoder
from seq2seq.image_transformer import ImageTransformer
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import choose
from tokenloom_common.pretrained import resolve_folder

TRANSFORMER_KINDS: dict[str, type[ImageTransformer]] = {
    EncoderDecoder.kind: EncoderDecoder, DecoderOnly.kind: DecoderOnly}


def load_transformer(folder: str | Path, device: str | torch.device = "cpu",
                     revision: str | None = None) -> ImageTransformer:
    """Load a local folder or hub id that save_pretrained wrote, of any family.

    revision: branch, tag or commit of a hub id. UserError naming the file on any damage.
    """
    folder = resolve_folder(folder, revision)
    path = folder / "config.json"
    kind = EncoderDecoder.kind  # its loader says what a folder without config.json lacks
    if path.is_file():
        kind = str(read_mapping(path).get("kind"))
    family = choose(TRANSFORMER_KINDS, kind, f"{path}: kind of transformer")
    return family.from_pretrained(folder, device)
