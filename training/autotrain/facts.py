"""Facts that the choices follow from: the data, the machine, the model to start from."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inference.memory.available import available_memory
from inference.model_folder import load_model_folder
from seq2seq import TextTokenizer
from tokenloom_common.errors import DataError
from tokenloom_common.progress import progress
from training.autotrain.launching import launcher_devices, process_count
from training.data.sources.captioned_images import BAD_ITEM_ERRORS, CaptionedImages
from training.data.sources.drops import format_reasons
from training.data.sources.open_dataset import list_splits, open_dataset
from training.data.sources.tree import counted
from training.evaluation.image_metrics.pixel_metrics import psnr
from training.evaluation.reconstruction import reconstructed_batches

LOOKED_AT = 400  # images that are decoded for sizes and reading speed, spread over the data
READ_CAPTIONS = 20_000  # that the statistics are taken of
HELD_OUT_SPLITS = ("validation", "val", "valid", "dev", "test", "unseen_concept")
"""Names of a split that is held out, the first that is there."""
LEAST_VOCABULARY, MOST_VOCABULARY = 320, 4096
LONGEST_TEXT = 96  # ids; longer captions are cut
SHARE_WHOLE = 0.99  # of the captions that no text length may cut
TRIED = 64  # images and their captions that a model to start from is tried on
KNOWN_PSNR = 21.0  # dB; below it reconstructions look blurred
KNOWN_CAPTIONS = 0.9  # share of captions


@dataclass(frozen=True)
class DataFacts:
    """The training images and their captions.

    shorter_side: median in pixels. held_out: the data's own held-out split and its images.
    captions, distinct, words: captions read, different ones, different words.
    vocabulary, text_ids: entries of a text tokenizer for them, ids that 99 % of the captions fit
    into. read_seconds: to read one image.
    """

    images: int
    shorter_side: int
    held_out: str | None
    held_out_images: int
    captions: int
    distinct: int
    words: int
    mean_words: float
    vocabulary: int
    text_ids: int
    read_seconds: float


@dataclass(frozen=True)
class MachineFacts:
    """Devices and the processes that train on them. memory: free bytes of a device, if known."""

    cores: int
    gpus: int
    gpu_name: str | None
    processes: int
    memory: int | None

    @property
    def devices(self) -> str:
        """The devices in words."""
        if self.gpus:
            return f"{self.processes} of {counted(self.gpus, 'GPU')} ({self.gpu_name})"
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{counted(self.cores, 'CPU core')}, {processes}"


@dataclass(frozen=True)
class StartFacts:
    """A trained model to start from, and how it takes the data.

    codebook_size: of its image tokenizer; width: of its transformer.
    psnr: of the data's images through its image tokenizer, in dB.
    captions_fit: share of the captions that its transformer reads whole.
    """

    folder: str
    size: int
    grid: tuple[int, int]
    codebook_size: int
    width: int
    psnr: float
    captions_fit: float

    @property
    def knows_data(self) -> bool:
        """Whether its codes and words do for the data, so that its transformer helps too."""
        return self.psnr >= KNOWN_PSNR and self.captions_fit >= KNOWN_CAPTIONS


def look_at_data(source: CaptionedImages, split: str | None, reading: dict[str, Any]) -> DataFacts:
    """Decode some of the images, read the captions. DataError if none of them is usable."""
    sides, seconds = _sizes(source)
    existing = list_splits(source.path, **reading)
    others = [name for name in HELD_OUT_SPLITS if name in existing and name != split]
    # the only split is what is trained on, whatever it is called
    held_out = others[0] if others and len(existing) > 1 else None
    held_out_images = 0
    if held_out is not None:
        held_out_images = len(open_dataset(source.path, split=held_out, **reading))

    rows = _spread(len(source), READ_CAPTIONS)
    of_rows = [captions for row in rows if (captions := source.captions(row))]
    captions = [caption for of_row in of_rows for caption in of_row]
    words = Counter(word for caption in captions for word in _words(caption))
    vocabulary = _vocabulary(words)
    tokenizer = TextTokenizer.train(captions, vocabulary, LONGEST_TEXT)
    return DataFacts(
        images=len(source), shorter_side=int(statistics.median(sides)), held_out=held_out,
        held_out_images=held_out_images, captions=len(captions), distinct=len(set(captions)),
        words=len(words), mean_words=words.total() / len(captions), vocabulary=vocabulary,
        text_ids=_text_ids(tokenizer, captions), read_seconds=seconds)


def _sizes(source: CaptionedImages) -> tuple[list[int], float]:
    """Return the shorter sides of images spread over the data, and the seconds to read one."""
    sides = []
    unusable: Counter[str] = Counter()
    rows = _spread(len(source), LOOKED_AT)
    started = time.perf_counter()
    for row in progress(rows, "look at the data", unit="image"):
        try:
            sides.append(min(source[row].image.size))
        except BAD_ITEM_ERRORS as error:
            unusable[error.reason] += 1
    if not sides:
        raise DataError(f"{source.path}: holds no usable item ({format_reasons(unusable)}); look "
                        "with `tokenloom data check`")
    return sides, (time.perf_counter() - started) / len(rows)


def _spread(total: int, count: int) -> list[int]:
    """Row numbers that lie evenly over the data, at most `count`."""
    if total <= count:
        return list(range(total))
    return [number * total // count for number in range(count)]


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


def _vocabulary(words: Counter[str]) -> int:
    """Entries of a text tokenizer: one for each word that comes twice, and as many parts of words.

    Words that come once teach nothing as a whole.
    """
    repeated = sum(count > 1 for count in words.values())
    wanted = LEAST_VOCABULARY + 2 * repeated
    return min(MOST_VOCABULARY, -(-wanted // 8) * 8)


def _text_ids(tokenizer: TextTokenizer, captions: Sequence[str]) -> int:
    """Ids that nearly all captions need, their end included."""
    counts = []
    some = [captions[row] for row in _spread(len(captions), 2000)]
    for caption in some:
        counts.append(int(tokenizer.encode([caption]).text_mask.sum()))
    counts.sort()
    # two more: the tokenizer of the run is trained on a part of these captions
    return counts[min(len(counts) - 1, int(SHARE_WHOLE * len(counts)))] + 2


def look_at_machine() -> MachineFacts:
    """Count this machine's devices."""
    launcher_devices()  # refuses now what cannot be launched later
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = torch.cuda.get_device_name() if gpus else None
    memory = available_memory("cuda" if gpus else "cpu")
    processes = process_count()
    if memory is not None and not gpus:
        memory //= processes  # a CPU's processes share it
    return MachineFacts(len(os.sched_getaffinity(0)), gpus, name, processes, memory)


def look_at_start(folder: str | Path, source: CaptionedImages) -> StartFacts:
    """Try a trained model folder on some of the data's images and captions."""
    model = load_model_folder(folder)
    tokenizer, text = model.image_tokenizer, model.text_tokenizer
    rows = _spread(len(source), TRIED)
    values = [psnr(batch.reconstruction, batch.original)
              for batch in reconstructed_batches(tokenizer, source, rows, TRIED, Counter(),
                                                 quiet=True)]
    fit = [isinstance(text, TextTokenizer) and text.count(caption) <= text.config.text_length
           for row in rows for caption in source.captions(row)]
    config = tokenizer.config
    return StartFacts(str(folder), config.resolution, config.grid, config.codebook_size,
                      model.seq2seq.config.width, float(torch.cat(values).mean()),
                      sum(fit) / max(1, len(fit)))
