"""Features of a frozen text encoder, kept on disk.

    FOLDER/index.json      fingerprint of the encoder, width, length, captions: written last
    FOLDER/captions.json   the captions, in the order of the rows
    FOLDER/features.npy    [positions, F] float16: unpadded positions of all captions, end to end
    FOLDER/offsets.npy     [captions + 1] int64: first position of each caption
"""

# Axes: B captions, T text positions, F width of the features

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from seq2seq import FrozenTextEncoder, TextBatch
from tokenloom_common.config import StrictConfig, read_mapping
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.files import atomic_folder, write_json_atomic
from tokenloom_common.progress import progress

log = logging.getLogger(__name__)

INDEX_NAME = "index.json"
CAPTIONS_NAME = "captions.json"
FEATURES_NAME = "features.npy"
OFFSETS_NAME = "offsets.npy"
OWN_FILES = (INDEX_NAME, CAPTIONS_NAME, FEATURES_NAME, OFFSETS_NAME)
ENCODE_BATCH = 64


class FeatureIndex(StrictConfig):
    """Contents of index.json."""

    fingerprint: str
    feature_width: int
    text_length: int
    captions: int


class CachedFeatures:
    """Features of known captions, read from disk, in place of the encoder.

    `encode` returns what the encoder returns, within the precision of float16.
    """

    def __init__(self, encoder: FrozenTextEncoder, folder: Path) -> None:
        """UserError when the folder holds features of another encoder or length."""
        self.encoder = encoder
        self.config = encoder.config
        check_features(folder, encoder)
        self._pads_left = encoder.pads_left
        # a model's own features of the empty caption; the folder holds the encoder's
        self._null = encoder.null_features
        captions = _read_captions(folder)
        self._rows = {caption: row for row, caption in enumerate(captions)}
        self._features = numpy.load(folder / FEATURES_NAME, mmap_mode="r")
        self._offsets = numpy.load(folder / OFFSETS_NAME)

    def __contains__(self, caption: str) -> bool:
        return caption in self._rows

    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Captions -> features [B, T, F] float32 (zeros at padding) and their mask [B, T].

        UserError for captions that are not in the cache.
        """
        missing = [caption for caption in captions if caption not in self._rows]
        if missing:
            raise UserError(f"no features of {len(missing)} captions ({missing[0][:40]!r}...) in "
                            "the cache; delete its folder, and the next run makes it again")
        length = self.config.text_length
        features = torch.zeros(len(captions), length, self.config.feature_width)
        mask = torch.zeros(len(captions), length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            if self._null is not None and not caption.strip():
                # [T, F], learned at every position
                features[row] = self._null.float().cpu()
                mask[row] = True
                continue

            number = self._rows[caption]
            first, end = self._offsets[number: number + 2]
            used = end - first
            # stored without padding: it goes back to the side that the encoder pads
            places = slice(length - used, length) if self._pads_left else slice(0, used)
            stored = self._features[first:end].astype(numpy.float32)
            features[row, places] = torch.from_numpy(stored)
            mask[row, places] = True
        return TextBatch(features, mask)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoder": None}  # loader workers only read


def check_features(folder: Path, encoder: FrozenTextEncoder) -> FeatureIndex:
    """Read the index of a cache. UserError when it is half-written or of another encoder."""
    path = folder / INDEX_NAME
    if not path.is_file():  # it is written last
        raise MissingFileError(f"{folder}: {INDEX_NAME} is missing, so this is no (whole) cache of "
                               "text features; delete it")
    index = FeatureIndex.parse(read_mapping(path), str(path))
    config = encoder.config
    pairs = (("encoder (fingerprint)", index.fingerprint, config.fingerprint),
             ("text_length", index.text_length, config.text_length),
             ("width", index.feature_width, config.feature_width))
    for what, found, wanted in pairs:
        if found != wanted:
            raise UserError(f"{folder}: features of another {what} ({found}, not {wanted}); name "
                            "another text.feature_cache, or delete this folder")
    return index


def write_features(folder: Path, encoder: FrozenTextEncoder, captions: Iterable[str]) -> None:
    """Encode every different caption, and the null caption, once; the folder appears whole."""
    # null features belong to one model; other models with this encoder may read the folder too
    encoder = encoder.without_null_features()
    # captions of like lengths together: less padding; then by text, so that rows have one order
    unique = sorted({"", *captions}, key=lambda caption: (len(caption), caption))

    with atomic_folder(folder, OWN_FILES) as aside:
        # to a file, not to memory: only the end tells how many positions there are
        raw_path = aside / "features.raw"
        offsets = _write_positions(raw_path, encoder, unique)
        raw = numpy.memmap(raw_path, dtype=numpy.float16, mode="r",
                           shape=(offsets[-1], encoder.feature_width))
        numpy.save(aside / FEATURES_NAME, raw)
        raw_path.unlink()
        numpy.save(aside / OFFSETS_NAME, numpy.array(offsets, dtype=numpy.int64))
        write_json_atomic(aside / CAPTIONS_NAME, unique)
        index = FeatureIndex(fingerprint=encoder.config.fingerprint,
                             feature_width=encoder.feature_width,
                             text_length=encoder.config.text_length, captions=len(unique))
        write_json_atomic(aside / INDEX_NAME, index.plain())


def _write_positions(path: Path, encoder: FrozenTextEncoder, captions: Sequence[str]) -> list[int]:
    """Write the unpadded features as raw float16 and return the offsets."""
    offsets = [0]
    bar = progress(None, "text features", total=len(captions), unit="caption")
    with path.open("wb") as file, bar:
        for start in range(0, len(captions), ENCODE_BATCH):
            batch = captions[start: start + ENCODE_BATCH]
            for features, mask in zip(*encoder.encode(batch), strict=True):
                file.write(features[mask].half().cpu().numpy().tobytes())
                offsets.append(offsets[-1] + int(mask.sum()))
            bar.update(len(batch))
    return offsets


def open_features(encoder: FrozenTextEncoder, folder: Path, captions: Iterable[str],
                  may_write: bool) -> CachedFeatures:
    """Open the cache at `folder`; where `may_write`, make it if it is missing or lacks captions."""
    wanted = {"", *captions}
    # an empty folder, which the user may have made, counts as missing
    if folder.is_dir() and any(folder.iterdir()):
        found = CachedFeatures(encoder, folder)
        lacking = sum(caption not in found for caption in wanted)
        if not lacking:
            return found
        if may_write:
            log.info("%s: %d captions are new; encoding all again", folder, lacking)
            wanted.update(_read_captions(folder))  # other runs may read the folder too
    if may_write:
        write_features(folder, encoder, wanted)
    return CachedFeatures(encoder, folder)


def _read_captions(folder: Path) -> list[str]:
    return json.loads((folder / CAPTIONS_NAME).read_text(encoding="utf-8"))
