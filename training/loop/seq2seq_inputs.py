"""The inputs of a transformer's run, checked to fit together: warm start, tokenizers, data.

Nothing here touches the run folder, so that a run which is refused leaves everything as it was.
"""

from __future__ import annotations

from pathlib import Path

from seq2seq import FrozenTextEncoder, TextSource, TransformerConfig
from tokenizer_image import load_tokenizer
from tokenizer_image.fingerprint import code_fingerprint
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.start_folders import TEXT_FOLDER, facts_of_run
from training.data.run_data import open_training_images, token_order
from training.data.tokens.shards import TokenShards, check_same_tokenizer
from training.data.visits.on_the_fly import OnTheFlyTokens
from training.engine.processes import Processes
from training.loop.drops import PictureDrops
from training.objectives.seq2seq import check_losses
from training.warm_start.code_tables import check_code_tables
from training.warm_start.transformer import (
    check_codes,
    check_start,
    image_tokenizer_folder,
    open_start,
    text_source_of,
)


class Seq2SeqInputs:
    """A transformer's run up to its model's config. All processes must make it."""

    def __init__(self, config: Seq2SeqRunConfig, group: Processes) -> None:
        self.config, self.group = config, group
        self.kept_text = _kept_text(config)
        """The text tokenizer of the run that is continued; None for a fresh run."""
        self.start = None
        """The folder that init_from names, of a fresh run."""
        if self.kept_text is None:  # a continued run has all it needs of that folder in its own
            self.start = group.first_then_others(lambda: open_start(config))
        self._open_image_tokenizer()  # first: the data is checked against its codes

        self.data = self._open(config.data.split)
        held_out_split = config.data.validation_split
        self.held_out = self._open(held_out_split) if held_out_split else None
        self.order = token_order(config.data, self.data, config.seed)
        self.drops: PictureDrops | None = None
        if isinstance(self.data, OnTheFlyTokens):
            self.drops = PictureDrops(config.data, self.data.source, group)

        self.text_source = self._open_text_source()
        self.model_config = self._model_config()
        self._check_model()

    def _open_image_tokenizer(self) -> None:
        self.image_tokenizer_folder = image_tokenizer_folder(self.config, self.start)
        self.image_tokenizer = self.group.first_then_others(
            lambda: load_tokenizer(self.image_tokenizer_folder))
        self.fingerprint = code_fingerprint(self.image_tokenizer)

        start, folder = self.start, self.image_tokenizer_folder
        if start is not None:
            self.group.first_does(
                lambda: check_codes(start, self.image_tokenizer, self.fingerprint, folder))

    def _open(self, split: str) -> TokenShards | OnTheFlyTokens:
        data = self.config.data
        if data.on_the_fly:
            # a detokenizer alone, as some projects publish it, cannot make tokens
            self.image_tokenizer.config.check_encodes(self.image_tokenizer_folder)
            source = self.group.first_then_others(lambda: open_training_images(data, split))
            return OnTheFlyTokens(source, self.image_tokenizer, self.fingerprint)

        shards = self.group.first_then_others(lambda: TokenShards(data.path, split))
        check_same_tokenizer(shards.index, data.path, self.image_tokenizer.codebook_size,
                             self.image_tokenizer.grid, self.fingerprint,
                             self.image_tokenizer_folder)
        return shards

    def _open_text_source(self) -> TextSource:
        config = self.config
        # a tokenizer that is trained on the captions is sent to the others; what is loaded, each
        # process loads itself
        is_loaded = config.init_from is not None or config.text.kind == FrozenTextEncoder.kind
        run = self.group.first_then_others if is_loaded else self.group.first_does
        return run(lambda: text_source_of(config, self.data, self.start, self.kept_text))

    def _model_config(self) -> TransformerConfig:
        """The model as the config describes it, completed from tokenizers and data."""
        derived = {"text_vocab_size": self.text_source.vocab_size,
                   "text_feature_width": self.text_source.feature_width,
                   "text_length": self.text_source.config.text_length,
                   "codebook_size": self.image_tokenizer.codebook_size,
                   "grid": self.image_tokenizer.grid, "tokenizer_fingerprint": self.fingerprint}
        # token shards may have a layout that this run does not want to learn
        layout = self.data.index.layout
        if layout and self.config.use_layout:
            derived |= {"layout_kind": layout.kind, "layout_classes": layout.classes,
                        "layout_grid": layout.grid}
        return self.config.model.build(derived)

    def _check_model(self) -> None:
        start = self.start
        if start is not None:  # configs alone: its weights are read later
            self.group.first_does(lambda: check_start(start, self.model_config))
        check_losses(self.config, self.model_config)
        if self.config.code_tables_from_codebook:
            check_code_tables(self.image_tokenizer)


def _kept_text(config: Seq2SeqRunConfig) -> Path | None:
    run = Path(config.run_dir)
    is_continued = facts_of_run(run, config.checkpoint.resume) is not None
    return run / TEXT_FOLDER if is_continued else None
