"""Published image-text models as scorers: CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023), read by `transformers`.

Only safetensors are read, and no code that comes with a model is run.
"""

# Axes: P pictures, M captions, E width of the space that both share

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
    """A CLIP or SigLIP with its own tokenizer and its own preparation of pictures."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.model, self._tokenizer, self._image_processor = model, tokenizer, image_processor

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Whether a folder has the config.json of a `transformers` model."""
        return (folder / "config.json").is_file() and "model_type" in read_mapping(folder / "config.json")

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> TransformersScorer:
        """Load a local folder in float32, eval mode. UserError without `transformers`, or when it holds neither of the two."""
        try:
            import transformers
        except ImportError as error:
            raise UserError(f"CLIP and SigLIP need transformers ({error}): pip install 'tokenloom[text]'") from None
        kind = str(read_mapping(folder / "config.json").get("model_type"))
        name = choose(_MODELS, kind, f"model_type in {folder / 'config.json'}, which should be an image-text model,")
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder}: no .safetensors weights; others are not loaded")
        try:
            with _silent(transformers):
                loaded: Any = getattr(transformers, name).from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
                model, report = loaded
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                image_processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(f"{folder}: no {name} can be loaded from it ({one_line(error)[:200]})") from None
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise UserError(f"{folder}: {len(missing)} tensors are missing ({', '.join(missing[:5])}); copy or download it "
                            "again")
        return cls(model.to(device).eval().requires_grad_(False), tokenizer, image_processor)

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        found = self._image_processor(images=[to_rgb(image) for image in images], return_tensors="pt")
        pooled = self.model.vision_model(pixel_values=found["pixel_values"].to(self.model.device)).pooler_output
        return F.normalize(self._projected("visual_projection", pooled), dim=-1)

    def _embed_captions(self, captions: list[str]) -> Tensor:
        clean = [caption.encode("utf-8", "replace").decode() for caption in captions]
        # SigLIP learned from lower case, padded to its full length, without a mask; the second one's tokenizer folds no case
        siglip = self.model.config.model_type == "siglip"
        found = self._tokenizer([caption.lower() for caption in clean] if siglip else clean, truncation=True,
                                padding="max_length" if siglip else True, return_tensors="pt",
                                max_length=self.model.config.text_config.max_position_embeddings)
        mask = None if siglip else found["attention_mask"].to(self.model.device)
        pooled = self.model.text_model(input_ids=found["input_ids"].to(self.model.device), attention_mask=mask).pooler_output
        return F.normalize(self._projected("text_projection", pooled), dim=-1)

    def _projected(self, name: str, pooled: Tensor) -> Tensor:
        """CLIP has a projection after each tower; SigLIP's is inside."""
        projection = getattr(self.model, name, None)
        return pooled if projection is None else projection(pooled)


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Without its reports on choices that are not the user's to make (which picture library is installed)."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
