"""Models, inputs and cases of `python -m benchmarks tokenizer`.

Each case function takes JSON values, so that a child process builds the same case, and returns
what is measured.
"""

# Axes: B batch, S pixels of a side, D latent channels

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DTYPES, SEED, Case
from benchmarks.peers.diffusers_vq import Peer
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.config import VQGAN_PRESETS
from tokenizer_image.tiling import decode_tiled, encode_tiled


def sized(config: VQGANConfig, resolution: int, **changes: Any) -> VQGANConfig:
    """Return the same network for another resolution; attention stays at its level.

    UserError if the downsampling factor does not divide the resolution.
    """
    attention = [side * resolution // config.resolution for side in config.attention_resolutions]
    # random codes: with k-means they are all zeros until training
    quantizer = {**config.quantizer.plain(), "kmeans_init": False}
    values = {**config.plain(), "resolution": resolution, "attention_resolutions": attention,
              "quantizer": quantizer, **changes}
    return VQGANConfig.parse(values, f"--resolution {resolution}")


def make_image(batch: int, side: int, device: str = "cpu", dtype: str = "float32") -> Tensor:
    """Draw seeded noise [B, 3, S, S] in [-1, 1]."""
    noise = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(SEED))
    return (noise * 2 - 1).to(device, DTYPES[dtype])


def make_tokenizer(preset: str, resolution: int, device: str, dtype: str) -> VQGAN:
    """Make a VQGAN with seeded weights, equal at every resolution; latents spread over its codes.

    Untrained latents would all fall on one code, and equal codes would then prove nothing.
    """
    torch.manual_seed(SEED)
    config = sized(VQGAN_PRESETS[preset], resolution)
    tokenizer = VQGAN(config).eval()
    with torch.no_grad():
        latents = tokenizer.latents(make_image(4, 4 * config.downsampling))  # [4, D, 4, 4]
        codes = tokenizer.codebook  # [K, D]
        spread = codes.std(dim=0) / latents.std(dim=(0, 2, 3))  # [D]

        # the encoder's last layer gives the latents the mean and deviation of the codes
        last = tokenizer.quant_conv
        assert last.bias is not None
        last.weight.mul_(spread[:, None, None, None])
        last.bias.sub_(latents.mean(dim=(0, 2, 3))).mul_(spread).add_(codes.mean(dim=0))
    return tokenizer.to(device, DTYPES[dtype])


def make_codes(tokenizer: VQGAN, shape: tuple[int, ...]) -> Tensor:
    """Draw seeded random codes on the tokenizer's device."""
    generator = torch.Generator().manual_seed(SEED)
    codes = torch.randint(tokenizer.codebook_size, shape, generator=generator)
    return codes.to(tokenizer.last_layer.device)


def step_case(side: str, step: str, batch: int, **model: Any) -> Case:
    """`encode` or `decode` of `ours` or the `peer`."""
    tokenizer = make_tokenizer(**model)
    runner = Peer(tokenizer) if side == "peer" else tokenizer
    if step == "encode":
        image = make_image(batch, model["resolution"], model["device"], model["dtype"])
        return lambda: runner.encode(image)
    codes = make_codes(tokenizer, (batch, *tokenizer.grid))
    return lambda: runner.decode(codes)


def large_case(step: str, tiled: bool, side: int, **model: Any) -> Case:
    """An image of `side` pixels, whole (by a tokenizer of that resolution) or tile by tile."""
    resolution = model["resolution"] if tiled else side
    tokenizer = make_tokenizer(**{**model, "resolution": resolution})
    if step == "encode":
        image = make_image(1, side, model["device"], model["dtype"])
        if tiled:
            return lambda: encode_tiled(tokenizer, image, batch_size=1)
        return lambda: tokenizer.encode(image)

    cells = side // tokenizer.config.downsampling
    codes = make_codes(tokenizer, (1, cells, cells * tokenizer.depth))
    if tiled:
        return lambda: decode_tiled(tokenizer, codes, batch_size=1)
    return lambda: tokenizer.decode(codes)


def nearest_case(preset: str, codebook_size: int, latents: int, device: str) -> Case:
    """The quantizer's search alone, in a tiny network with codes of length 8."""
    quantizer = {**VQGAN_PRESETS[preset].quantizer.plain(), "kmeans_init": False}
    debug = VQGAN_PRESETS["debug"]
    config = sized(debug, debug.resolution, codebook_size=codebook_size, embed_dim=8,
                   quantizer=quantizer)
    torch.manual_seed(SEED)
    search = VQGAN(config).eval().to(device).quantizer.nearest

    generator = torch.Generator().manual_seed(SEED)
    vectors = torch.randn(1, 8, latents // 16, 16, generator=generator).to(device)
    return lambda: search(vectors)


def training_case(checkpointing: bool, batch: int, **model: Any) -> Case:
    """Forward and backward of one training step without an optimizer."""
    tokenizer = make_tokenizer(**model).train()
    # gradients are allocated before the case, so that its memory is that of activations
    for parameter in tokenizer.parameters():
        parameter.grad = torch.full_like(parameter, 0.0)
    tokenizer.gradient_checkpointing = checkpointing
    image = make_image(batch, model["resolution"], model["device"], model["dtype"])

    def step() -> None:
        result = tokenizer(image)
        terms = sum(part.value * part.weight for part in result.losses.values())
        loss = F.l1_loss(result.reconstruction, image) + terms
        tokenizer.zero_grad(set_to_none=False)
        loss.backward()

    return step
