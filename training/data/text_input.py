"""Which text input a run trains with, and a frozen text encoder's features kept on disk.

    FOLDER/index.json      fingerprint of the encoder, width, length, rows: written last
    FOLDER/captions.json   the captions, in the order of the rows
    FOLDER/features.npy    [positions, F] float16: the real positions of all captions, one caption after another
    FOLDER/offsets.npy     [captions + 1] int64: where each begins
"""

# Axes: B captions, T text positions, F width of the features

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch

from seq2seq import ClassLabels, FrozenTextEncoder, TextBatch, TextSource, TextTokenizer
from seq2seq.text_sources import load_text_source
from tokenloom_common.config import StrictConfig, read_mapping
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.files import atomic_folder, write_json_atomic
from tokenloom_common.progress import progress
from training.config.text import TextConfig

log = logging.getLogger(__name__)

DEFAULT_VOCAB_SIZE = 2048
DEFAULT_TEXT_LENGTH = 32
INDEX_NAME = "index.json"
OWN_FILES = (INDEX_NAME, "captions.json", "features.npy", "offsets.npy")
ENCODE_BATCH = 64


class CaptionRows(Protocol):
    """Data with captions: token shards, or captioned pictures."""

    def __len__(self) -> int: ...
    def captions(self, row: int, /) -> list[str]: ...
    def all_captions(self) -> list[str]: ...


def choose_text_source(text: TextConfig, data: CaptionRows, kept: Path | None) -> TextSource:
    """The one that is named; or the one at `kept`, of the run that is continued; or a new one made of the captions."""
    if text.kind == FrozenTextEncoder.kind:
        return FrozenTextEncoder.load(text.encoder or "", text.text_length or DEFAULT_TEXT_LENGTH, padding=text.padding)
    if text.tokenizer:
        return load_text_source(text.tokenizer)
    if kept is not None and kept.is_dir():
        found = load_text_source(kept)
        if found.kind == text.kind and (text.kind == ClassLabels.kind
                                        or found.config.text_length == (text.text_length or DEFAULT_TEXT_LENGTH)):
            return found  # else the model's config differs too, and resuming is refused for that
    if text.kind == ClassLabels.kind:
        rows = (data.captions(row) for row in range(len(data)))
        return ClassLabels.collect(captions[0] for captions in rows if captions)
    if text.kind != TextTokenizer.kind:
        raise UserError(f"text.kind {text.kind} is not made of captions here; name the folder of one with text.tokenizer")
    return TextTokenizer.train(data.all_captions(), text.vocab_size or DEFAULT_VOCAB_SIZE,
                               text.text_length or DEFAULT_TEXT_LENGTH)


class FeatureIndex(StrictConfig):
    """What index.json holds."""

    fingerprint: str
    feature_width: int
    text_length: int
    captions: int


class CachedFeatures:
    """A frozen encoder's features of known captions, read from disk; others are encoded when asked for.

    In place of the encoder where features are only read: `encode` gives the same within float16's precision.
    """

    def __init__(self, encoder: FrozenTextEncoder, folder: Path) -> None:
        """UserError when the folder holds features of another encoder or length."""
        self.encoder, self.config = encoder, encoder.config
        check_features(folder, encoder)
        self._left = encoder.pads_left
        self._null = encoder.null_features  # of an empty caption, where the encoder's own are not read
        captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        self._rows = {caption: row for row, caption in enumerate(captions)}
        self._features = numpy.load(folder / "features.npy", mmap_mode="r")
        self._offsets = numpy.load(folder / "offsets.npy")

    def __contains__(self, caption: str) -> bool:
        return caption in self._rows

    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Captions -> features [B, T, F] float32 (zeros at padding) and their mask [B, T]."""
        missing = [caption for caption in captions if caption not in self._rows]
        if missing:
            raise UserError(f"no features of {len(missing)} captions ({missing[0][:40]!r}...) in the cache; delete its folder, "
                            "and the next run makes it again")
        length, width = self.config.text_length, self.config.feature_width
        features = torch.zeros(len(captions), length, width)
        mask = torch.zeros(len(captions), length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            if self._null is not None and not caption.strip():
                features[row], mask[row] = self._null.float().cpu(), True
                continue
            first, last = self._offsets[self._rows[caption]: self._rows[caption] + 2]
            at = slice(length - (last - first), length) if self._left else slice(0, last - first)
            features[row, at] = torch.from_numpy(self._features[first:last].astype(numpy.float32))
            mask[row, at] = True
        return TextBatch(features, mask)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoder": None}  # loader workers only read


def check_features(folder: Path, encoder: FrozenTextEncoder) -> FeatureIndex:
    """The index of a cache folder. UserError when it is half-written or of another encoder."""
    if not (folder / INDEX_NAME).is_file():
        raise MissingFileError(f"{folder}: {INDEX_NAME} is missing, so this is no (whole) cache of text features; delete it")
    index = FeatureIndex.parse(read_mapping(folder / INDEX_NAME), str(folder / INDEX_NAME))
    ours = encoder.config
    for what, theirs, wanted in (("encoder (fingerprint)", index.fingerprint, ours.fingerprint),
                                 ("text_length", index.text_length, ours.text_length),
                                 ("width", index.feature_width, ours.feature_width)):
        if theirs != wanted:
            raise UserError(f"{folder}: features of another {what} ({theirs}, not {wanted}); "
                            "name another text.feature_cache, or delete this folder")
    return index


def write_features(folder: Path, encoder: FrozenTextEncoder, captions: Iterable[str]) -> None:
    """Encode every different caption (and the null caption) once; the folder appears whole."""
    encoder = encoder.without_null_features()  # a model's own, and others with this encoder may read the folder too
    unique = sorted({"", *captions}, key=lambda caption: (len(caption), caption))  # like lengths together: less padding
    with atomic_folder(folder, OWN_FILES) as aside:
        offsets = [0]
        with (aside / "features.raw").open("wb") as file, \
                progress(None, "text features", total=len(unique), unit="caption") as bar:
            for start in range(0, len(unique), ENCODE_BATCH):
                some = unique[start: start + ENCODE_BATCH]
                batch = encoder.encode(some)
                for features, mask in zip(*batch, strict=True):
                    file.write(features[mask].half().cpu().numpy().tobytes())
                    offsets.append(offsets[-1] + int(mask.sum()))
                bar.update(len(some))
        raw = numpy.memmap(aside / "features.raw", dtype=numpy.float16, mode="r", shape=(offsets[-1], encoder.feature_width))
        numpy.save(aside / "features.npy", raw)
        (aside / "features.raw").unlink()
        numpy.save(aside / "offsets.npy", numpy.array(offsets, dtype=numpy.int64))
        write_json_atomic(aside / "captions.json", unique)
        write_json_atomic(aside / INDEX_NAME, FeatureIndex(
            fingerprint=encoder.config.fingerprint, feature_width=encoder.feature_width,
            text_length=encoder.config.text_length, captions=len(unique)).plain())


def cached(encoder: FrozenTextEncoder, folder: Path, captions: Iterable[str], may_write: bool) -> CachedFeatures:
    """The cache at `folder`, made (where `may_write`) if it is not there or lacks captions."""
    wanted = {"", *captions}
    if folder.is_dir() and any(folder.iterdir()):
        found = CachedFeatures(encoder, folder)
        lacking = sum(caption not in found for caption in wanted)
        if not lacking:
            return found
        if may_write:
            log.info("%s: %d captions are new; encoding all again", folder, lacking)
            wanted |= set(json.loads((folder / "captions.json").read_text(encoding="utf-8")))
    if may_write:
        write_features(folder, encoder, wanted)
    return CachedFeatures(encoder, folder)
