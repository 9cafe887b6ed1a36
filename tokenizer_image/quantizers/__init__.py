"""Quantizers: latents -> codes -> vectors. The only importer of vector-quantize-pytorch."""

from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers.base import LossPart, Quantized, Quantizer
from tokenizer_image.quantizers.gumbel import GumbelQuantizer
from tokenizer_image.quantizers.residual import ResidualQuantizer
from tokenizer_image.quantizers.scalar import FiniteScalarQuantizer, LookupFreeQuantizer
from tokenizer_image.quantizers.simvq import SimVQuantizer
from tokenizer_image.quantizers.vector import VectorQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "residual": ResidualQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "simvq": SimVQuantizer,
    "gumbel": GumbelQuantizer,
}
"""QuantizerConfig.kind -> class."""


def build_quantizer(dim: int, codebook_size: int, config: QuantizerConfig) -> Quantizer:
    """Build the quantizer of a config, for latents [B, dim, h, w]."""
    return QUANTIZERS[config.kind](dim, codebook_size, config)


__all__ = ["QUANTIZERS", "LossPart", "Quantized", "Quantizer", "QuantizerConfig", "build_quantizer"]
