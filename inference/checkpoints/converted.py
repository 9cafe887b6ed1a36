"""A whole text-to-image model made of converted parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inference.checkpoints.rules import ConvertedPart
from inference.model_folder import LoadedModel, write_model_folder
from inference.pipeline import TextToImage
from inference.sampling import SamplingParams
from seq2seq import ImageTransformer, TextSource
from tokenizer_image import ImageTokenizer
from tokenizer_image.fingerprint import code_fingerprint


@dataclass(frozen=True)
class ConvertedModel:
    """A transformer with the tokenizers that it was trained with. notes: lines for the user."""

    image_tokenizer: ConvertedPart | ImageTokenizer
    seq2seq: ConvertedPart
    text_tokenizer: TextSource
    generation: SamplingParams
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """UserError as in ConvertedPart.check, for either part."""
        for part in (self.image_tokenizer, self.seq2seq):
            if isinstance(part, ConvertedPart):  # else it was checked when it was loaded
                part.check()

    def write(self, folder: Path, card: str) -> None:
        """Write the model folder, whole or not at all. UserError if the parts do not fit."""
        tokenizer = self.load_tokenizer()
        transformer = self._with_fingerprint(tokenizer)
        write_model_folder(folder, tokenizer, transformer, self.text_tokenizer, self.generation,
                           card)

    def load(self) -> TextToImage:
        """The model in memory, ready to sample."""
        tokenizer = self.load_tokenizer()
        transformer: Any = self._with_fingerprint(tokenizer).load()
        assert isinstance(transformer, ImageTransformer)  # for mypy: load() returns any model
        return TextToImage(LoadedModel(tokenizer, transformer, self.text_tokenizer, self.generation,
                                       folder=self.seq2seq.where))

    def load_tokenizer(self) -> ImageTokenizer:
        """The image tokenizer in memory."""
        if isinstance(self.image_tokenizer, ImageTokenizer):
            return self.image_tokenizer
        loaded: Any = self.image_tokenizer.load()
        return loaded

    def _with_fingerprint(self, tokenizer: ImageTokenizer) -> ConvertedPart:
        """The transformer, bound to its image tokenizer: a model folder refuses any other."""
        # of our loaded weights: no source states one
        fingerprint = code_fingerprint(tokenizer)
        config = self.seq2seq.config.model_copy(update={"tokenizer_fingerprint": fingerprint})
        return replace(self.seq2seq, config=config)
