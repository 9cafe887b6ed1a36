"""Models and inputs measured by `python -m benchmarks tokenizer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import SEED, Case
from benchmarks.peers.diffusers_vq import Peer
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.config import VQGAN_PRESETS
from tokenizer_image.tiling import decode_tiled, encode_tiled


def sized(config: VQGANConfig, resolution: int, **changes: Any) -> VQGANConfig:
    """The same network for another resolution: attention stays at its level. UserError if f does not divide it."""
    attention = [side * resolution // config.resolution for side in config.attention_resolutions]
    quantizer = {**config.quantizer.plain(), "kmeans_init": False}  # random codes instead of zeros; nothing learns here
    return VQGANConfig.parse({**config.plain(), "resolution": resolution, "attention_resolutions": attention,
                              "quantizer": quantizer, **changes}, f"--resolution {resolution}")


def make_image(batch: int, side: int, device: str = "cpu", dtype: str = "float32") -> Tensor:
    """Seeded noise [B, 3, S, S] in [-1, 1]."""
    noise = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(SEED))
    return (noise * 2 - 1).to(device, harness.DTYPES[dtype])


def make_tokenizer(preset: str, resolution: int, device: str, dtype: str) -> VQGAN:
    """A VQGAN with seeded weights, the same for every resolution, whose latents spread over its random codes.

    Untrained latents would all fall on one code, and equal codes would then say nothing.
    """
    torch.manual_seed(SEED)
    config = sized(VQGAN_PRESETS[preset], resolution)
    tokenizer = VQGAN(config).eval()
    with torch.no_grad():
        latents, codes = tokenizer.latents(make_image(4, 4 * config.downsampling)), tokenizer.codebook
        spread = codes.std(dim=0) / latents.std(dim=(0, 2, 3))  # [D]
        last = tokenizer.quant_conv
        assert last.bias is not None
        last.weight.mul_(spread[:, None, None, None])
        last.bias.sub_(latents.mean(dim=(0, 2, 3))).mul_(spread).add_(codes.mean(dim=0))
    return tokenizer.to(device, harness.DTYPES[dtype])


def step_case(side: str, step: str, batch: int, **model: Any) -> Case:
    """`encode` or `decode` of `ours` or the `peer`."""
    tokenizer = make_tokenizer(**model)
    runner = Peer(tokenizer) if side == "peer" else tokenizer
    if step == "encode":
        image = make_image(batch, model["resolution"], model["device"], model["dtype"])
        return lambda: runner.encode(image)
    codes = make_codes(tokenizer, (batch, *tokenizer.grid))
    return lambda: runner.decode(codes)


def make_codes(tokenizer: VQGAN, shape: tuple[int, ...]) -> Tensor:
    """Seeded random codes, on the tokenizer's device."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(tokenizer.codebook_size, shape, generator=generator).to(tokenizer.last_layer.device)


def large_case(step: str, tiled: bool, side: int, **model: Any) -> Case:
    """A picture of `side` pixels, whole (a tokenizer of that resolution) or in tiles of the model's own, one at a time."""
    tokenizer = make_tokenizer(**{**model, "resolution": model["resolution"] if tiled else side})
    if step == "encode":
        image = make_image(1, side, model["device"], model["dtype"])
        return (lambda: encode_tiled(tokenizer, image, batch_size=1)) if tiled else (lambda: tokenizer.encode(image))
    cells = side // tokenizer.config.downsampling
    codes = make_codes(tokenizer, (1, cells, cells * tokenizer.depth))
    return (lambda: decode_tiled(tokenizer, codes, batch_size=1)) if tiled else (lambda: tokenizer.decode(codes))


def nearest_case(preset: str, codebook_size: int, latents: int, device: str) -> Case:
    """The quantizer's search alone, in a tiny network; codes of length 8."""
    quantizer = {**VQGAN_PRESETS[preset].quantizer.plain(), "kmeans_init": False}
    debug = VQGAN_PRESETS["debug"]
    torch.manual_seed(SEED)
    tokenizer = VQGAN(sized(debug, debug.resolution, codebook_size=codebook_size, embed_dim=8, quantizer=quantizer))
    search = tokenizer.eval().to(device).quantizer.nearest
    vectors = torch.randn(1, 8, latents // 16, 16, generator=torch.Generator().manual_seed(SEED)).to(device)
    return lambda: search(vectors)
