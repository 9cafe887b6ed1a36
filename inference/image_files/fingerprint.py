"""Fingerprint of a model folder: tells within a moment whether two folders draw alike."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tokenloom_common.model_card import CARD_NAME

WHOLE_BYTES = 64 << 20  # of a file: hashed in about 0.1 s
_BLOCK_BYTES = 1 << 20
_BLOCKS = 16  # of a larger file


def model_fingerprint(folder: Path) -> str:
    """Return 16 hex digits over the files of a model's parts: settings, vocabulary and weights.

    Files up to WHOLE_BYTES are hashed whole; of a larger one its size and 16 blocks of 1 MiB,
    spread evenly from its first byte (a safetensors header) to its last. A training step changes
    all weights, so that blocks tell two models apart, where headers and sizes would not; gigabytes
    are not read. Left out is what does not decide a picture: the card, and the files beside the
    parts (sampling defaults, the index), since a recipe has the parameters. Weights of a frozen
    text encoder that the folder only names are not seen.
    """
    digest = hashlib.blake2b(digest_size=8)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/**/*")
                   if path.is_file() and path.name != CARD_NAME and path.name[0] != ".")
    for name in names:
        size = (folder / name).stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        _update(digest, folder / name, size)
    return digest.hexdigest()


def _update(digest: hashlib.blake2b, path: Path, size: int) -> None:
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return
        last = size - _BLOCK_BYTES
        for number in range(_BLOCKS):
            file.seek(last * number // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
