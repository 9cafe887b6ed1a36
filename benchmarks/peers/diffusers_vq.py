"""The peer of the CNN tokenizers: diffusers' `VQModel` with the weights of one of our VQGANs.

Names and config are those of the export to diffusers
(inference/checkpoints/formats/diffusers_vq.py).
"""

# Axes: B batch, h w code grid, D length of a code vector, H W pixels

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inference.checkpoints.formats.diffusers_vq import diffusers_config, diffusers_state
from tokenizer_image import VQGAN

PICTURE_TOLERANCE = 2e-4  # float32 rounding through some 40 layers: up to 6e-5 was seen
TIE_TOLERANCE = 1e-4  # two codes whose squared distances differ by less, relative, are a tie


def peer_version() -> str | None:
    """Version of diffusers, or None if it cannot be imported."""
    try:
        import diffusers
        from diffusers import VQModel  # noqa: F401  (a lazy import: this is what may fail)
    except (ImportError, RuntimeError):  # diffusers raises RuntimeError when a lazy import fails
        return None
    return str(diffusers.__version__)


class Peer:
    """diffusers' VQModel with our weights behind our `encode` and `decode`, on the same device.

    Its codebook stays float32, as ours does: torch has no `cdist` in bfloat16.
    """

    def __init__(self, tokenizer: VQGAN) -> None:
        from diffusers import VQModel

        weight = tokenizer.post_quant_conv.weight
        model: Any = VQModel(**diffusers_config(tokenizer.config))  # its annotations hide nn.Module
        model.load_state_dict(diffusers_state(tokenizer))
        # not diffusers' own `to`, which warns about dtypes
        nn.Module.to(model.eval(), weight.device, weight.dtype)
        model.quantize.float()
        model.quantize.embedding.weight.data.copy_(tokenizer.codebook)
        self.model = model
        self.grid = tokenizer.grid
        self.dim = tokenizer.config.embed_dim
        self.dtype = weight.dtype

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] -> codes [B, h, w].

        `quantize` is the only public way from latents to codes; it also looks the codes up and
        computes a loss, which costs well below 1 % of the encoder.
        """
        latents = self.model.encode(image).latents.float()
        _, _, (_, _, codes) = self.model.quantize(latents)
        return codes.view(-1, *self.grid)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] -> image [B, 3, H, W], clamped as ours is."""
        shape = (len(codes), *self.grid, self.dim)
        vectors = self.model.quantize.get_codebook_entry(codes, shape)  # [B, D, h, w]
        decoded = self.model.decode(vectors.to(self.dtype), force_not_quantize=True)
        return decoded.sample.clamp(-1.0, 1.0)


@torch.no_grad()
def verify(ours: VQGAN, peer: Peer, image: Tensor) -> dict[str, Any]:
    """Compare codes of an image (up to ties) and decoded images of the same codes, in float32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        codes = ours.encode(image)
        peer_codes = peer.encode(image)
        difference = float((ours.decode(codes) - peer.decode(codes)).abs().max())
        latents = ours.latents(image).double()  # [B, D, h, w]

    gap = 0.0
    if not torch.equal(codes, peer_codes):
        # a tie: both codes are equally near to the latent, and rounding decides
        our_distance = _squared_distance(ours, latents, codes)
        peer_distance = _squared_distance(ours, latents, peer_codes)
        difference_of_distances = (our_distance - peer_distance).abs()
        relative = difference_of_distances / torch.maximum(our_distance, peer_distance)
        gap = float(relative.max())

    codes_used = codes.unique().numel()
    same = gap <= TIE_TOLERANCE and difference <= PICTURE_TOLERANCE
    equal_share = float((codes == peer_codes).double().mean())
    # one code everywhere would prove nothing, unless there is only one position
    ok = same and (codes_used > 1 or codes.numel() == 1)
    return {"codes_equal_share": round(equal_share, 6), "largest_gap_of_a_tie": gap,
            "codes_used": codes_used, "picture_max_abs_difference": difference, "ok": ok}


def _squared_distance(tokenizer: VQGAN, latents: Tensor, codes: Tensor) -> Tensor:
    """Squared distance [B, h, w] of each latent from its code's vector."""
    vectors = tokenizer.quantizer.lookup(codes).double()
    return (latents - vectors).square().sum(dim=1)
