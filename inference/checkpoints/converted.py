"""A whole model folder out of converted parts."""

from __future__ import annotations

from dataclasses import dataclass
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
    """A transformer with the tokenizers that it was trained with. notes: a line each for the user."""

    image_tokenizer: ConvertedPart | ImageTokenizer
    seq2seq: ConvertedPart
    text_tokenizer: TextSource
    generation: SamplingParams
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """UserError as in ConvertedPart.check, of either part."""
        for part in (self.image_tokenizer, self.seq2seq):
            if isinstance(part, ConvertedPart):
                part.check()

    def write(self, folder: Path, card: str) -> None:
        """The model folder, which appears whole. UserError if the parts do not belong together."""
        tokenizer = self.tokenizer()
        write_model_folder(folder, tokenizer, self._fitted(tokenizer), self.text_tokenizer, self.generation, card)

    def load(self) -> TextToImage:
        """The model in memory, ready to sample."""
        tokenizer = self.tokenizer()
        transformer: Any = self._fitted(tokenizer).load()
        assert isinstance(transformer, ImageTransformer)
        return TextToImage(LoadedModel(tokenizer, transformer, self.text_tokenizer, self.generation, self.seq2seq.where))

    def tokenizer(self) -> ImageTokenizer:
        """The image tokenizer in memory."""
        if isinstance(self.image_tokenizer, ImageTokenizer):
            return self.image_tokenizer
        loaded: Any = self.image_tokenizer.load()
        return loaded

    def _fitted(self, tokenizer: ImageTokenizer) -> ConvertedPart:
        """The transformer, bound to the tokenizer whose codes it speaks."""
        from dataclasses import replace

        config = self.seq2seq.config.model_copy(update={"tokenizer_fingerprint": code_fingerprint(tokenizer)})
        return replace(self.seq2seq, config=config)
