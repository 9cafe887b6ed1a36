"""Image <-> codes: the image tokenizers, and the conversion of image files to pixels and back.

Knows pixels, nothing of captions.
"""

from tokenizer_image.config import ImageTokenizerConfig, VQGANConfig
from tokenizer_image.dvae import DVAE, DVAEConfig
from tokenizer_image.grid import codes_to_tokens, tokens_to_codes
from tokenizer_image.image_tokenizer import ImageTokenizer, Reconstruction
from tokenizer_image.images import (
    BadImageError,
    float_to_pixels,
    image_grid,
    image_to_pixels,
    open_image,
    pixels_to_float,
    pixels_to_images,
)
from tokenizer_image.kinds import (
    IMAGE_TOKENIZERS,
    PRESETS,
    build_tokenizer,
    load_tokenizer,
    preset,
)
from tokenizer_image.losses import TokenizerLoss, TokenizerLossConfig, tokenizer_loss
from tokenizer_image.perceptual import LPIPS
from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.usage import CodebookUsage, Usage
from tokenizer_image.vit_vqgan import ViTVQGAN, ViTVQGANConfig
from tokenizer_image.vqgan import VQGAN

__all__ = [
    "DVAE", "IMAGE_TOKENIZERS", "LPIPS", "PRESETS", "VQGAN", "BadImageError", "CodebookUsage",
    "DVAEConfig", "ImageTokenizer", "ImageTokenizerConfig", "QuantizerConfig", "Reconstruction",
    "TokenizerLoss", "TokenizerLossConfig", "Usage", "VQGANConfig", "ViTVQGAN", "ViTVQGANConfig",
    "build_tokenizer", "codes_to_tokens", "float_to_pixels", "image_grid", "image_to_pixels",
    "load_tokenizer", "open_image", "pixels_to_float", "pixels_to_images", "preset",
    "tokenizer_loss", "tokens_to_codes",
]
