"""Load a pretrained text encoder with `transformers`, and tell its files apart by a fingerprint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from tokenloom_common.errors import MissingFileError, UserError, one_line
from tokenloom_common.extras import require_extra
from tokenloom_common.hub import resolve_folder

TEXT_TOWERS = {"clip": "CLIPTextModel", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}
"""model_type of an image-text model -> name of its text tower's class in transformers."""
READ = ("*.json", "*.safetensors", "*.model", "*.txt")
"""Files that are downloaded; no weights in pickles."""
HASHED = ("*.safetensors", "tokenizer.json", "spiece.model", "vocab.txt", "config.json")
"""Files that the fingerprint covers."""


class LoadedEncoder(NamedTuple):
    """Tokenizer, text encoder in eval mode, and the folder that they came from."""

    tokenizer: Any
    model: Any
    folder: Path


def load_encoder(name: str, revision: str | None) -> LoadedEncoder:
    """Load a local folder or hub id. UserError unless it holds a whole encoder in safetensors."""
    transformers = require_extra("transformers", "a frozen text encoder", "text")
    folder = resolve_folder(name, revision, patterns=READ)
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"{folder}: no config.json, so not a folder of a text encoder")
    # other weights are pickles, which can run code
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no .safetensors weights; others are not loaded")

    try:
        # trust_remote_code: never run Python from a model's repository
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model, report = _load_weights(transformers, folder, config.model_type)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{name}: needs Python code of its own, which is never run; give an "
                            "encoder that transformers itself knows") from None
        reason = one_line(error)[:200]
        raise UserError(f"{name}: no text encoder can be loaded from it ({reason})") from None

    # the pooler comes after the last layer, whose features are all that is read
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise UserError(f"{name}: {len(missing)} tensors of the text encoder are missing "
                        f"({', '.join(missing[:5])})")

    # T5EncoderModel has no decoder to leave out
    two_stacks = getattr(model.config, "is_encoder_decoder", False) and config.model_type != "t5"
    if two_stacks and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    return LoadedEncoder(tokenizer, model.eval().requires_grad_(False), folder)


def _load_weights(transformers: Any, folder: Path, model_type: str) -> tuple[Any, dict[str, Any]]:
    """Load the model in float32 -> (model, transformers' loading report)."""
    if model_type in TEXT_TOWERS:
        loader = getattr(transformers, TEXT_TOWERS[model_type])
    elif model_type == "t5":
        loader = transformers.T5EncoderModel
    else:
        loader = transformers.AutoModel

    # loading a text tower leaves the image tower's weights unused, which is not worth a warning
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return loader.from_pretrained(folder, dtype=torch.float32, use_safetensors=True,
                                      output_loading_info=True)
    finally:
        transformers.logging.set_verbosity(before)


def encoder_fingerprint(folder: Path) -> str:
    """Return 16 hex digits of the weights, the vocabulary and the config."""
    digest = hashlib.sha256()
    for pattern in HASHED:
        for path in sorted(folder.glob(pattern)):  # file systems list in any order
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
