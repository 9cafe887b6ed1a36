"""A frozen pretrained text encoder, such as T5, BERT, or the text tower of CLIP or SigLIP.

Imagen (Saharia et al. 2022, https://arxiv.org/abs/2205.11487) showed how much a frozen language
model helps; LlamaGen reads T5. A model folder holds the encoder's name and fingerprint, not its
weights, and refuses an encoder with another fingerprint.
"""

# Axes: B captions, T text positions, F width of the features

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seq2seq.frozen_text_files import encoder_fingerprint, load_encoder
from seq2seq.text_tokenizer import TextBatch
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.file_contents import not_whole
from tokenloom_common.hub import is_hub_id
from tokenloom_common.pretrained import SavedAsConfig, read_config

log = logging.getLogger(__name__)

NULL_NAME = "null.safetensors"


class FrozenTextConfig(StrictConfig):
    """The encoder, and how much of a caption it reads."""

    name: str = Field(min_length=1, description="local folder or hub id")
    revision: str | None = Field(
        None, description="commit of the hub id that was read; none = what the hub calls main")
    fingerprint: str = Field(min_length=8, description="of its weights, vocabulary and config")
    feature_width: int = Field(ge=1, description="F: width of its last layer")
    text_length: int = Field(
        ge=2, le=4096, description="T: positions per caption, its special ones included")
    padding: Literal["right", "left"] = Field(
        "right", description="where a short caption's padding is; left: LlamaGen, whose last text "
        "slot predicts the first token and is always real")
    null_features: bool = Field(
        False, description=f"{NULL_NAME} beside this file holds features [T, F] that stand for no "
        "caption (LlamaGen learns them)")


class FrozenTextEncoder(SavedAsConfig):
    """Captions -> features of the encoder's last layer, padded to T.

    null_features [T, F]: stand for no caption, in place of the features of an empty one.
    """

    kind: ClassVar[str] = "frozen"
    own_files: ClassVar[tuple[str, ...]] = ("config.json", NULL_NAME)
    vocab_size: ClassVar[None] = None

    def __init__(self, tokenizer: Any, model: Any, config: FrozenTextConfig,
                 null_features: Tensor | None = None) -> None:
        assert config.null_features == (null_features is not None)
        self.config, self.null_features = config, null_features
        self._tokenizer, self._model = tokenizer, model
        self._warned = False

    @classmethod
    def load(cls, name: str, text_length: int, device: str | torch.device = "cpu",
             padding: Literal["right", "left"] = "right", null_features: Tensor | None = None,
             revision: str | None = None) -> FrozenTextEncoder:
        """Load an encoder in float32, eval mode.

        revision: branch, tag or commit of a hub id. The config keeps the commit, so that a model
        finds its encoder again after the hub's has changed.
        UserError without `transformers`, or when `name` holds no text encoder.
        """
        loaded = load_encoder(name, revision)
        settings = loaded.model.config
        longest = getattr(settings, "max_position_embeddings", None)  # T5 has no limit
        if longest is not None and text_length > longest:
            raise UserError(f"text_length {text_length}: {name} reads at most {longest} positions; "
                            "lower it")

        # a snapshot's folder is named after its commit
        commit = loaded.folder.name if is_hub_id(name) else None
        config = FrozenTextConfig(
            name=name, revision=commit,
            fingerprint=encoder_fingerprint(loaded.folder),
            # T5's config names its width d_model
            feature_width=getattr(settings, "hidden_size", None) or settings.d_model,
            text_length=text_length, padding=padding, null_features=null_features is not None)
        return cls(loaded.tokenizer, loaded.model.to(device), config, null_features)

    @property
    def feature_width(self) -> int:
        """F: width of the features."""
        return self.config.feature_width

    @property
    def pads_left(self) -> bool:
        """Whether padding is left: by the config, or by the encoder's tokenizer (Gemma, Qwen)."""
        return self.config.padding == "left" or self._tokenizer.padding_side == "left"

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Captions -> features [B, T, F] float32, zeros at padding, and their mask [B, T].

        Too long captions are cut, with one warning. An empty one is the null caption; with null
        features, all of its T positions are real.
        """
        for row, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise UserError(f"caption {row} is {type(caption).__name__}, expected text")

        length = self.config.text_length
        # lone surrogates, which JSON may hold, have no UTF-8
        clean = [caption.encode("utf-8", "replace").decode() for caption in captions]
        tokens = self._tokenizer(clean, padding="max_length", truncation=True, max_length=length,
                                 return_tensors="pt", return_attention_mask=True)
        device = next(self._model.parameters()).device
        ids = tokens["input_ids"].to(device)
        mask = tokens["attention_mask"].to(device).bool()
        # only a caption that fills the last position can have been cut
        if not self._warned and bool(mask[:, -1].any()):
            self._warn_if_cut(clean)

        features = self._features(ids, mask)
        # moved after encoding, as LlamaGen does: T5 itself is padded on the right
        if self.config.padding == "left":
            features, mask = to_the_right_end(features, mask), to_the_right_end(mask, mask)
        if self.null_features is not None:
            is_empty = [not caption.strip() for caption in clean]
            empty = torch.tensor(is_empty, dtype=torch.bool, device=device)  # [B]
            null = self.null_features.float().to(device)
            features = torch.where(empty[:, None, None], null, features)
            mask = mask | empty[:, None]
        return TextBatch(features, mask)

    def _features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask [B, T] -> features [B, T, F] float32, zeros at padding."""
        # columns from `end` on are padding in every caption of the batch: do not compute them
        read = mask.any(dim=0).nonzero()
        end = int(read.max()) + 1 if len(read) else 1
        output = self._model(input_ids=ids[:, :end], attention_mask=mask[:, :end].long())

        features = output.last_hidden_state.float()  # [B, end, F]
        features = torch.nn.functional.pad(features, (0, 0, 0, ids.shape[1] - end))
        return torch.where(mask[..., None], features, 0.0)

    def _warn_if_cut(self, captions: Sequence[str]) -> None:
        for caption in captions:
            needed = len(self._tokenizer(caption)["input_ids"])
            if needed > self.config.text_length:
                log.warning("a caption needs %d positions and is cut to text_length %d (%.40r...); "
                            "further cuts are not reported",
                            needed, self.config.text_length, caption)
                self._warned = True
                return

    def null_caption(self, count: int = 1) -> TextBatch:
        """Encode the empty caption `count` times, for caption dropout and guidance."""
        return self.encode([""] * count)

    @property
    def null_each(self) -> bool:
        """Whether `null_for` gives each caption a null caption of its own."""
        return self.null_features is not None

    def null_for(self, captions: TextBatch) -> TextBatch:
        """Unconditional text for classifier-free guidance.

        One null caption for all `captions`; or, with null features, one for each, padded where the
        caption is (LlamaGen).
        """
        if self.null_features is None:
            return self.null_caption()
        features = self.null_features.to(captions.text_input)
        return TextBatch(features.expand(len(captions.text_mask), -1, -1), captions.text_mask)

    def without_null_features(self) -> FrozenTextEncoder:
        """Return the same encoder, which reads an empty caption like any other."""
        if self.null_features is None:
            return self
        config = self.config.model_copy(update={"null_features": False})
        return FrozenTextEncoder(self._tokenizer, self._model, config)

    def words(self, caption: str) -> list[str]:
        """Return the piece at each position that is not padding."""
        tokens = self._tokenizer(caption, truncation=True, max_length=self.config.text_length)
        return self._tokenizer.convert_ids_to_tokens(tokens["input_ids"])

    def vocabulary(self) -> list[str]:
        """Return all pieces that the encoder's tokenizer knows."""
        return list(self._tokenizer.get_vocab())

    def to(self, device: str | torch.device) -> FrozenTextEncoder:
        """Move the encoder; returns itself."""
        self._model.to(device)
        return self

    @classmethod
    def from_pretrained(cls, folder: str | Path, encoder: str | None = None) -> FrozenTextEncoder:
        """Load the encoder that the folder names, or the one at `encoder`.

        UserError unless its fingerprint is the one in the folder.
        """
        wanted = read_config(Path(folder), cls.kind, FrozenTextConfig)
        name = encoder or wanted.name
        # a revision is a commit of the named repository; another copy is told by its fingerprint
        revision = wanted.revision if name == wanted.name else None
        try:
            loaded = cls.load(name, wanted.text_length, revision=revision)
        except MissingFileError as error:
            raise MissingFileError(
                f"{folder}: this model reads captions through the text encoder {wanted.name} "
                f"({error}); say where it is with text_encoder=FOLDER (--text-encoder FOLDER)"
            ) from None

        found = loaded.config.fingerprint
        if found != wanted.fingerprint:
            raise UserError(f"{name}: not the text encoder that the model was trained with "
                            f"({wanted.name}, fingerprint {wanted.fingerprint}; this one has "
                            f"{found}); give that one")
        null = read_null_features(Path(folder), wanted) if wanted.null_features else None
        # with `wanted`, so that saving again writes the same config
        return cls(loaded._tokenizer, loaded._model, wanted, null)

    def write_files(self, folder: Path) -> None:
        """Write config.json, and the null features if there are any, into an existing folder."""
        super().write_files(folder)
        if self.null_features is not None:
            # safetensors refuses tensors that are not contiguous
            save_file({"null": self.null_features.contiguous().cpu()}, folder / NULL_NAME)


def to_the_right_end(rows: Tensor, mask: Tensor) -> Tensor:
    """Move the real positions of rows [B, T, ..], by mask [B, T], to the end, in their order."""
    order = mask.long().argsort(dim=1, stable=True)  # [B, T]: padding, which is 0, first
    return rows[torch.arange(len(rows), device=mask.device)[:, None], order]


def read_null_features(folder: Path, config: FrozenTextConfig) -> Tensor:
    """Read the null features [T, F] of a folder. UserError if missing, damaged or misshapen."""
    path = folder / NULL_NAME
    if not path.is_file():
        raise MissingFileError(f"{path}: missing; copy the model folder again")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError):
        raise not_whole(path, "safetensors file", "copy it again") from None

    wanted = (config.text_length, config.feature_width)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != {"null": wanted}:
        raise UserError(f"{path}: expected one tensor 'null' {list(wanted)}, found {found}; copy "
                        "it again")
    return tensors["null"]
