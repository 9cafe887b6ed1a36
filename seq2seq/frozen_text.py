"""A pretrained text encoder, frozen: T5, BERT and its kin, CLIP's and SigLIP's text tower, by local folder or hub id.

Imagen (Saharia et al. 2022, https://arxiv.org/abs/2205.11487) showed how much a frozen language model helps; LlamaGen reads T5.
The encoder's weights are not copied into a model: the model keeps its name and a fingerprint, and refuses another one.
"""

# Axes: B captions, T text positions, F width of the features

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seq2seq.text_tokenizer import TextBatch
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import MissingFileError, UserError, one_line
from tokenloom_common.hub import is_hub_id, resolve_folder
from tokenloom_common.pretrained import SavedAsConfig, read_config

log = logging.getLogger(__name__)

_TEXT_TOWERS = {"clip": "CLIPTextModel", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}
NULL_NAME = "null.safetensors"
_HASHED = ("*.safetensors", "tokenizer.json", "spiece.model", "vocab.txt", "config.json")


class FrozenTextConfig(StrictConfig):
    """Which encoder, and how much of a caption it reads."""

    name: str = Field(min_length=1, description="local folder or hub id")
    revision: str | None = Field(None, description="commit of the hub id that was read; none = what the hub calls main")
    fingerprint: str = Field(min_length=8, description="of its weights, vocabulary and config")
    feature_width: int = Field(ge=1, description="F: width of its last layer")
    text_length: int = Field(ge=2, le=4096, description="T: positions per caption, its special ones included")
    padding: Literal["right", "left"] = Field("right", description="where a short caption's padding is; left: LlamaGen, whose "
                                              "last text slot predicts the first token and is always real")
    null_features: bool = Field(False, description=f"{NULL_NAME} beside this file holds features [T, F] that stand for no "
                                "caption (LlamaGen learns them)")


class FrozenTextEncoder(SavedAsConfig):
    """Captions -> the features of the encoder's last layer, padded to T.

    null_features [T, F]: what stands for no caption, if not the features of an empty one.
    """

    kind: ClassVar[str] = "frozen"
    own_files: ClassVar[tuple[str, ...]] = ("config.json", NULL_NAME)
    vocab_size: ClassVar[None] = None

    def __init__(self, tokenizer: Any, model: Any, config: FrozenTextConfig, null_features: Tensor | None = None) -> None:
        assert config.null_features == (null_features is not None)
        self.config, self.null_features = config, null_features
        self._tokenizer, self._model = tokenizer, model
        self._warned = False

    @classmethod
    def load(cls, name: str, text_length: int, device: str | torch.device = "cpu",
             padding: Literal["right", "left"] = "right", null_features: Tensor | None = None,
             revision: str | None = None) -> FrozenTextEncoder:
        """Load an encoder in float32, eval mode. UserError without `transformers`, or when `name` holds no text encoder.

        revision: of a hub id: branch, tag or commit. The config keeps the commit, so that a model finds its encoder again
        after the hub's has changed.
        """
        tokenizer, model, folder = _load(name, revision)
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and text_length > longest:
            raise UserError(f"text_length {text_length}: {name} reads at most {longest} positions; lower it")
        width = getattr(model.config, "hidden_size", None) or model.config.d_model
        commit = folder.name if is_hub_id(name) else None  # a snapshot's folder is named after its commit
        config = FrozenTextConfig(name=name, revision=commit, fingerprint=_fingerprint(folder), feature_width=width,
                                  text_length=text_length, padding=padding, null_features=null_features is not None)
        return cls(tokenizer, model.to(device), config, null_features)

    @property
    def feature_width(self) -> int:
        """F."""
        return self.config.feature_width

    @property
    def pads_left(self) -> bool:
        """Whether a short caption's padding is on its left: as the config says, or where the encoder's own tokenizer puts it
        there (Gemma's, Qwen's)."""
        return self.config.padding == "left" or self._tokenizer.padding_side == "left"

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Captions -> features [B, T, F] float32 (zeros at padding) and their mask [B, T]. Too long ones are cut, with one
        warning; an empty caption is the null caption (with features of its own, all of its T positions are real)."""
        for row, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise UserError(f"caption {row} is {type(caption).__name__}, expected text")
        length = self.config.text_length
        clean = [caption.encode("utf-8", "replace").decode() for caption in captions]
        found = self._tokenizer(clean, padding="max_length", truncation=True, max_length=length, return_tensors="pt",
                                return_attention_mask=True)
        device = next(self._model.parameters()).device
        mask = found["attention_mask"].to(device).bool()
        if not self._warned and bool(mask[:, -1].any()):
            self._warn_if_cut(clean)
        ids = found["input_ids"].to(device)
        read = mask.any(dim=0).nonzero()
        end = int(read.max()) + 1 if len(read) else 1  # what follows is padding in every caption of the batch
        features = self._model(input_ids=ids[:, :end], attention_mask=mask[:, :end].long()).last_hidden_state.float()
        features = torch.nn.functional.pad(features, (0, 0, 0, length - end))
        features = torch.where(mask[..., None], features, 0.0)
        if self.config.padding == "left":
            features, mask = to_the_right_end(features, mask), to_the_right_end(mask, mask)
        if self.null_features is not None:
            empty = torch.tensor([not caption.strip() for caption in clean], dtype=torch.bool, device=device)
            features = torch.where(empty[:, None, None], self.null_features.float().to(device), features)
            mask = mask | empty[:, None]
        return TextBatch(features, mask)

    def _warn_if_cut(self, captions: Sequence[str]) -> None:
        for caption in captions:
            needed = len(self._tokenizer(caption)["input_ids"])
            if needed > self.config.text_length:
                log.warning("a caption needs %d positions and is cut to text_length %d (%.40r...); further cuts are not "
                            "reported", needed, self.config.text_length, caption)
                self._warned = True
                return

    def null_caption(self, count: int = 1) -> TextBatch:
        """The features of an empty caption, `count` times: what training drops captions to and guidance starts from."""
        return self.encode([""] * count)

    @property
    def null_each(self) -> bool:
        """Whether each caption has a null caption of its own."""
        return self.null_features is not None

    def null_for(self, captions: TextBatch) -> TextBatch:
        """What guidance leads away from for encoded captions: one null caption for all of them; or, with null features, one for
        each, whose padding is where the caption's is (LlamaGen)."""
        if self.null_features is None:
            return self.null_caption()
        features = self.null_features.to(captions.text_input)
        return TextBatch(features.expand(len(captions.text_mask), -1, -1), captions.text_mask)

    def without_null_features(self) -> FrozenTextEncoder:
        """The same encoder, which reads an empty caption as any other."""
        if self.null_features is None:
            return self
        return FrozenTextEncoder(self._tokenizer, self._model, self.config.model_copy(update={"null_features": False}))

    def words(self, caption: str) -> list[str]:
        """The piece at each position that is not padding."""
        ids = self._tokenizer(caption, truncation=True, max_length=self.config.text_length)["input_ids"]
        return self._tokenizer.convert_ids_to_tokens(ids)

    def to(self, device: str | torch.device) -> FrozenTextEncoder:
        """Move the encoder; returns itself."""
        self._model.to(device)
        return self

    @classmethod
    def from_pretrained(cls, folder: str | Path, encoder: str | None = None) -> FrozenTextEncoder:
        """Load the encoder that the folder names, or the one at `encoder`. UserError unless its fingerprint is the same."""
        wanted = read_config(Path(folder), cls.kind, FrozenTextConfig)
        name = encoder or wanted.name
        try:
            loaded = cls.load(name, wanted.text_length, revision=wanted.revision if name == wanted.name else None)
        except MissingFileError as error:
            raise MissingFileError(f"{folder}: this model reads captions through the text encoder {wanted.name} ({error}); "
                                   "say where it is with text_encoder=FOLDER (--text-encoder FOLDER)") from None
        if loaded.config.fingerprint != wanted.fingerprint:
            raise UserError(f"{name}: not the text encoder that the model was trained with ({wanted.name}, fingerprint "
                            f"{wanted.fingerprint}; this one has {loaded.config.fingerprint}); give that one")
        null = read_null_features(Path(folder), wanted) if wanted.null_features else None
        return cls(loaded._tokenizer, loaded._model, wanted, null)

    def write_files(self, folder: Path) -> None:
        """config.json, and the null features where there are any, into an existing folder."""
        super().write_files(folder)
        if self.null_features is not None:
            save_file({"null": self.null_features.contiguous().cpu()}, folder / NULL_NAME)


def to_the_right_end(rows: Tensor, mask: Tensor) -> Tensor:
    """rows [B, T, ..], of which mask [B, T] says the real ones -> these last, in their order."""
    take = mask.long().argsort(dim=1, stable=True)  # [B, T]
    return rows[torch.arange(len(rows), device=mask.device)[:, None], take]


def read_null_features(folder: Path, config: FrozenTextConfig) -> Tensor:
    """The null features [T, F] of a folder. UserError when the file is missing or holds something else."""
    path = folder / NULL_NAME
    if not path.is_file():
        raise MissingFileError(f"{path}: missing; copy the model folder again")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({one_line(error)}); copy it again") from None
    wanted = (config.text_length, config.feature_width)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != {"null": wanted}:
        raise UserError(f"{path}: expected one tensor 'null' {list(wanted)}, found {found}; copy it again")
    return tensors["null"]


def _load(name: str, revision: str | None) -> tuple[Any, Any, Path]:
    """Tokenizer, text encoder in eval mode, and the folder that they came from."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"a frozen text encoder needs transformers ({error}): pip install 'tokenloom[text]'") from None
    folder = resolve_folder(name, revision, patterns=("*.json", "*.safetensors", "*.model", "*.txt"))
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"{folder}: no config.json, so not a folder of a text encoder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no .safetensors weights; others are not loaded")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tower = _TEXT_TOWERS.get(config.model_type)
        loader = getattr(transformers, tower) if tower else (
            transformers.T5EncoderModel if config.model_type == "t5" else transformers.AutoModel)
        # an image-text model's text tower leaves the other half of the weights unused, which is not worth a report
        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            loaded: Any = loader.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
            model, report = loaded
        finally:
            transformers.logging.set_verbosity(before)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{name}: no text encoder can be loaded from it ({one_line(error)[:200]})") from None
    missing = [key for key in report["missing_keys"] if "pooler" not in key]
    if missing:
        raise UserError(f"{name}: {len(missing)} tensors of the text encoder are missing ({', '.join(sorted(missing)[:5])})")
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder") and config.model_type != "t5":
        model = model.get_encoder()
    return tokenizer, model.eval().requires_grad_(False), folder


def _fingerprint(folder: Path) -> str:
    """16 hex digits of the weights, the vocabulary and the config."""
    digest = hashlib.sha256()
    for pattern in _HASHED:
        for path in sorted(folder.glob(pattern)):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
