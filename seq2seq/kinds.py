"""The families of transformers by name, and loading a folder whichever family it holds."""

from __future__ import annotations

from pathlib import Path

import torch

from seq2seq.decoder_only import DecoderOnly
from seq2seq.encoder_decoder import EncoderDecoder
from seq2seq.image_transformer import ImageTransformer
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import choose
from tokenloom_common.pretrained import resolve_folder

KINDS: dict[str, type[ImageTransformer]] = {kind.kind: kind for kind in (EncoderDecoder, DecoderOnly)}


def load_transformer(folder: str | Path, device: str | torch.device = "cpu", revision: str | None = None) -> ImageTransformer:
    """Load a local folder or hub id that save_pretrained wrote, of any family. UserError naming the file on any damage.

    revision: of a hub id: branch, tag or commit.
    """
    folder = resolve_folder(folder, revision)
    path = folder / "config.json"
    kind = str(read_mapping(path).get("kind")) if path.is_file() else EncoderDecoder.kind  # which then says what is missing
    return choose(KINDS, kind, f"{path}: kind of transformer").from_pretrained(folder, device)
