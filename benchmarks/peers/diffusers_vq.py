"""The peer of the CNN tokenizers: diffusers' `VQModel` with the weights of one of our VQGANs.

Names and config are those of the export to diffusers (inference/checkpoints/formats/diffusers_vq.py).

Axes: B batch, h w code grid, D length of a code vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inference.checkpoints.formats.diffusers_vq import diffusers_config, diffusers_state
from tokenizer_image import VQGAN

PICTURE_TOLERANCE = 2e-4  # float32 rounding through some 40 layers: up to 6e-5 was seen
TIE_TOLERANCE = 1e-4  # two codes whose squared distances differ by less, relative, are a tie


def peer_version() -> str | None:
    """The version of diffusers, or None where it cannot be imported."""
    try:
        import diffusers
        from diffusers import VQModel  # noqa: F401  (a lazy import: this is what may fail)
    except (ImportError, RuntimeError):  # diffusers turns what fails inside its lazy imports into RuntimeError
        return None
    return str(diffusers.__version__)


class Peer:
    """diffusers' VQModel doing what our `encode` and `decode` do, with our weights, on the tokenizer's device and dtype.

    Its codebook stays float32, as ours does: torch has no `cdist` in bfloat16.
    """

    def __init__(self, tokenizer: VQGAN) -> None:
        from diffusers import VQModel

        weight = tokenizer.post_quant_conv.weight
        model: Any = VQModel(**diffusers_config(tokenizer.config))  # its own annotations hide nn.Module
        model.load_state_dict(diffusers_state(tokenizer))
        nn.Module.to(model.eval(), weight.device, weight.dtype)  # diffusers' own `to` warns when a dtype is named
        model.quantize.float()
        model.quantize.embedding.weight.data.copy_(tokenizer.codebook)
        self.model = model
        self.grid, self.dim, self.dtype = tokenizer.grid, tokenizer.config.embed_dim, weight.dtype

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] -> codes [B, h, w]. `quantize` is the only public way from latents to codes; it also looks
        the codes up and computes a loss, which costs well below 1 % of the encoder."""
        return self.model.quantize(self.model.encode(image).latents.float())[2][2].view(-1, *self.grid)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] -> image [B, 3, S, S], clamped as ours is."""
        vectors = self.model.quantize.get_codebook_entry(codes, (len(codes), *self.grid, self.dim))  # [B, D, h, w]
        return self.model.decode(vectors.to(self.dtype), force_not_quantize=True).sample.clamp(-1.0, 1.0)


@torch.no_grad()
def verify(ours: VQGAN, peer: Peer, image: Tensor) -> dict[str, Any]:
    """Whether both give the same codes (up to ties) for an image and the same picture for those codes, in float32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        codes, theirs = ours.encode(image), peer.encode(image)
        difference = float((ours.decode(codes) - peer.decode(codes)).abs().max())
        latents = ours.latents(image).double()  # [B, D, h, w]
    gap = 0.0
    if not torch.equal(codes, theirs):
        mine, other = ((latents - ours.quantizer.lookup(found).double()).square().sum(dim=1) for found in (codes, theirs))
        gap = float(((mine - other).abs() / torch.maximum(mine, other)).max())
    used = codes.unique().numel()
    same = gap <= TIE_TOLERANCE and difference <= PICTURE_TOLERANCE
    return {"codes_equal_share": round(float((codes == theirs).double().mean()), 6), "largest_gap_of_a_tie": gap,
            "codes_used": used, "picture_max_abs_difference": difference, "ok": same and (used > 1 or codes.numel() == 1)}
