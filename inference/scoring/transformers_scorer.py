"""Published image-text models as scorers: CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023),
read by `transformers`.

Only safetensors are read, and no code that comes with a model is run.
"""

# Axes: P images, M captions, E width of the shared space

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from inference.scoring.scorer import ImageTextScorer
from tokenizer_image.images import to_rgb
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError, choose, one_line

_MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}  # model_type of config.json -> class


class TransformersScorer(ImageTextScorer):
    """A CLIP or SigLIP with its own tokenizer and image preprocessing."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._image_processor = image_processor

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Whether a folder has the config.json of a `transformers` model."""
        config = folder / "config.json"
        return config.is_file() and "model_type" in read_mapping(config)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> TransformersScorer:
        """Load a local folder in float32, in eval mode.

        UserError without `transformers`, or if the folder holds neither CLIP nor SigLIP.
        """
        try:
            import transformers
        except ImportError as error:
            raise UserError(f"CLIP and SigLIP need transformers ({error}): "
                            "pip install 'tokenloom[text]'") from None
        path = folder / "config.json"
        kind = str(read_mapping(path).get("model_type"))
        name = choose(_MODELS, kind, f"model_type in {path}, which should be an image-text model,")
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder}: no .safetensors weights; others are not loaded")
        try:
            with _silent(transformers):
                # output_loading_info: a missing tensor would be drawn at random, with a warning
                model, report = getattr(transformers, name).from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=False)
                image_processor = transformers.AutoImageProcessor.from_pretrained(
                    folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError,
                SafetensorError) as error:
            raise UserError(f"{folder}: no {name} can be loaded from it "
                            f"({one_line(error)[:200]})") from None
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(f"{folder}: {len(missing)} tensors are missing "
                            f"({', '.join(missing[:5])}); copy or download it again")
        return cls(model.to(device).eval().requires_grad_(False), tokenizer, image_processor)

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        rgb = [to_rgb(image) for image in images]
        inputs = self._image_processor(images=rgb, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device)
        # the tower itself: what get_image_features returns changed from transformers 4 to 5
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self._projected("visual_projection", pooled), dim=-1)

    def _embed_captions(self, captions: list[str]) -> Tensor:
        # lone surrogates, which the tokenizers refuse, become "?"
        texts = [caption.encode("utf-8", "replace").decode() for caption in captions]
        padding: bool | str = True
        # SigLIP was trained on lower case, padded to full length, without a mask; the tokenizer of
        # SigLIP 2 does not lower the case itself
        siglip = self.model.config.model_type == "siglip"
        if siglip:
            texts = [text.lower() for text in texts]
            padding = "max_length"
        inputs = self._tokenizer(texts, truncation=True, padding=padding, return_tensors="pt",
                                 max_length=self.model.config.text_config.max_position_embeddings)

        device = self.model.device
        mask = None if siglip else inputs["attention_mask"].to(device)
        pooled = self.model.text_model(input_ids=inputs["input_ids"].to(device),
                                       attention_mask=mask).pooler_output
        return F.normalize(self._projected("text_projection", pooled), dim=-1)

    def _projected(self, name: str, pooled: Tensor) -> Tensor:
        """Apply CLIP's projection after a tower; SigLIP has it inside."""
        projection = getattr(self.model, name, None)
        return pooled if projection is None else projection(pooled)


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Silence its reports on what is not the user's choice (which image library is installed)."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
