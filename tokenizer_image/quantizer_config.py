"""Config of every quantizer: how latents become codes."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tokenloom_common.config import StrictConfig

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

# Options that each kind reads. Setting one that its kind does not read is an error, never ignored.
_VQ = {"commitment_weight", "learn_codebook_by_gradient", "ema_decay", "dead_code_fraction",
       "kmeans_init", "kmeans_iterations", "rotation_trick"}
READ_BY_KIND: dict[str, set[str]] = {
    "vq": {*_VQ, "l2_normalize", "raw_search"},
    "residual": {*_VQ, "depth"},
    "fsq": {"levels"},
    "lfq": {"commitment_weight", "entropy_weight", "diversity_gamma", "entropy_temperature",
            "spherical"},
    "simvq": {"commitment_weight", "rotation_trick"},
    "gumbel": {"kl_weight", "temperature_start", "temperature_end", "temperature_steps",
               "straight_through"},
}


class QuantizerConfig(StrictConfig):
    """How latents become codes, and how the codebook learns."""

    kind: Literal["vq", "residual", "fsq", "lfq", "simvq", "gumbel"] = "vq"
    """vq: a codebook of vectors. residual: `depth` codebooks, each for the residual of those
    before. fsq: every number of a latent rounded to a few levels (Mentzer et al. 2023, arXiv
    2309.15505). lfq: the sign of every number (Yu et al. 2023, arXiv 2310.05737). simvq: a
    frozen random codebook behind a learned linear map (Zhu et al. 2024, arXiv 2411.02038).
    gumbel: a learned score for every code, sampled in training (arXiv 1611.01144)."""
    l2_normalize: bool = True
    """vq: compare directions only, on the unit sphere (ViT-VQGAN; LlamaGen's default)."""
    raw_search: bool = False
    """vq: search codes among vectors of any length by Euclidean distance, and scale them to length
    1 for the decoder only, as Janus does in transformers. Needs l2_normalize and
    learn_codebook_by_gradient, whose vectors keep their own lengths."""
    commitment_weight: float = Field(default=0.25, ge=0)
    """Weight of the commitment term, latents to codes: beta of VQ-VAE, van den Oord et al. 2017,
    eq. 3. Where the optimizer moves codes (learn_codebook_by_gradient, simvq), the term that moves
    them has weight 1. fsq has neither."""
    learn_codebook_by_gradient: bool = False
    """False: the codebook follows a moving average of its latents (VQ-VAE-2). True: the optimizer
    moves it (as in LlamaGen)."""
    ema_decay: Fraction = 0.99
    """Decay of the moving averages: of the codes, and of how often each is used."""
    dead_code_fraction: Fraction = 0.03
    """A code used less than this fraction of the mean use is restarted at a latent of the batch.
    0 = never."""
    kmeans_init: bool = True
    """Place the codes by k-means over the latents of the first training batch."""
    kmeans_iterations: Positive = 10
    rotation_trick: bool = True
    """Rotate gradients with the latent (Fifty et al. 2024, arXiv 2410.06424)."""
    depth: int = Field(default=1, ge=1, le=32)
    """residual: codebooks, and so codes per position, adjacent in the token sequence."""
    levels: tuple[Annotated[int, Field(ge=3, le=64)], ...] = ()
    """fsq: levels of each number of a latent. codebook_size is their product, embed_dim their
    count."""
    entropy_weight: float = Field(default=0.1, ge=0)
    """lfq: weight of (entropy of a latent's code - diversity_gamma x entropy of batch's codes)."""
    diversity_gamma: float = Field(default=1.0, ge=0)
    entropy_temperature: float = Field(default=0.01, gt=0)
    """lfq: temperature of the soft assignment in the entropies."""
    spherical: bool = False
    """lfq: binary spherical quantization: all on the unit sphere (arXiv 2406.07548)."""
    kl_weight: float = Field(default=5e-4, ge=0)
    """gumbel: weight of the KL from a position's codes to uniform ones, which keeps all in use."""
    temperature_start: float = Field(default=1.0, gt=0)
    """gumbel: temperature at the first step: soft, so that every code gets a gradient."""
    temperature_end: float = Field(default=1 / 16, gt=0)
    """gumbel: temperature at the end. Lower brings training nearer to the codes that are decoded
    later, at a noisier gradient."""
    temperature_steps: int = Field(default=150_000, ge=0)
    """gumbel: steps of the temperature's fall, along half a cosine; at most the run's length."""
    straight_through: bool = True
    """gumbel: decode the one sampled code, with the soft sample's gradients. False: decode the
    soft sample itself."""

    @model_validator(mode="after")
    def _validate(self) -> Self:
        self._check_unread_options()
        if self.kind == "fsq" and not self.levels:
            raise ValueError("kind 'fsq' needs levels, for example [8, 5, 5, 5] for 1,000 codes, "
                             "[8, 8, 8, 5, 5, 5] for 64,000")
        if self.kind == "residual" and self.depth < 2:
            raise ValueError(f"kind 'residual' with depth {self.depth} is plain vq; "
                             "use depth 2 or more")
        if self.temperature_end > self.temperature_start:
            raise ValueError(
                f"temperature_end {self.temperature_end} is above temperature_start "
                f"{self.temperature_start}; the temperature falls, so swap them")
        if self.raw_search:
            self._check_raw_search()
        return self

    def _check_unread_options(self) -> None:
        read = READ_BY_KIND[self.kind] | {"kind"}
        for name, field in type(self).model_fields.items():
            if name in read or getattr(self, name) == field.get_default():
                continue
            readers = [kind for kind, names in READ_BY_KIND.items() if name in names]
            raise ValueError(f"kind '{self.kind}' does not read {name} "
                             f"(kinds that do: {', '.join(readers)}); leave it out")

    def _check_raw_search(self) -> None:
        if not (self.l2_normalize and self.learn_codebook_by_gradient):
            raise ValueError(
                "raw_search needs vectors that keep their own lengths and are normalised at "
                "look-up: set l2_normalize and learn_codebook_by_gradient, or leave raw_search out")
        if self.kmeans_init or self.dead_code_fraction:
            raise ValueError(
                "raw_search compares lengths, which kmeans_init and dead_code_fraction would all "
                "set to 1; set kmeans_init false and dead_code_fraction 0")

    def check_sizes(self, embed_dim: int, codebook_size: int) -> None:
        """Raise ValueError if this code vector length or this codebook size is impossible."""
        if self.kind == "fsq":
            dims = len(self.levels)
            product = math.prod(self.levels)
            if embed_dim != dims or codebook_size != product:
                raise ValueError(
                    f"quantizer.levels {list(self.levels)} give embed_dim {dims} and codebook_size "
                    f"{product}, got {embed_dim} and {codebook_size}; set them to that")
        if self.kind == "lfq" and codebook_size != 2**embed_dim:
            raise ValueError(
                f"kind 'lfq' has 2^embed_dim codes: embed_dim {embed_dim} gives codebook_size "
                f"{2**embed_dim}, got {codebook_size}; set embed_dim to log2 of the codebook_size "
                "that you want")
        if self.kind == "vq" and self.l2_normalize and embed_dim < 2:
            raise ValueError("embed_dim 1 leaves two directions with quantizer.l2_normalize; "
                             "use 8, or at least 2")
