"""Latents -> codes and back: a wrapper around vector-quantize-pytorch, and the only importer of it.

The library runs in training only. It would otherwise start k-means in eval mode too, and it decides at construction,
once for the whole process, whether training is distributed; here both are decided when they are needed.

Axes: B batch, h w code grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch import distributed as dist
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import batched_sample_vectors, noop

from tokenizer_image.config import QuantizerConfig


class Quantized(NamedTuple):
    """What quantizing gives: vectors [B, D, h, w] float, codes [B, h, w] int64, commit_loss [] float32, weighted."""

    vectors: Tensor
    codes: Tensor
    commit_loss: Tensor


class Quantizer(nn.Module):
    """One codebook of K vectors; a latent takes the nearest one. Always in float32, whatever the rest runs in."""

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = codebook_size
        self.vq = VectorQuantize(
            dim=dim, codebook_size=codebook_size, decay=config.ema_decay, use_cosine_sim=config.l2_normalize,
            commitment_weight=config.commitment_weight, kmeans_init=config.kmeans_init,
            kmeans_iters=config.kmeans_iterations, rotation_trick=config.rotation_trick,
            threshold_ema_dead_code=float(config.dead_code_fraction > 0), accept_image_fmap=True,
            learnable_codebook=config.learn_codebook_by_gradient, ema_update=not config.learn_codebook_by_gradient,
            sync_codebook=False)
        self._ranks_agree = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Follow `.to(device)` but not `.bfloat16()`: a moving average with decay 0.99 stands still in bfloat16."""
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            same = moved.dtype == tensor.dtype or not tensor.is_floating_point()
            return moved if same else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)

    @property
    def codebook(self) -> Tensor:
        """The code vectors [K, D] float32; of length 1 with l2_normalize."""
        return self.vq.codebook

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Latents [B, D, h, w] -> codes [B, h, w] int64 in [0, K). Changes nothing; ties go to the lowest code."""
        with torch.autocast(latents.device.type, enabled=False):
            flat = rearrange(latents.float(), "b d h w -> (b h w) d")
            if self.config.l2_normalize:  # the length of a latent does not change which code is nearest
                scores = flat @ self.codebook.T  # [B*h*w, K]
            else:  # |z - e|^2 without |z|^2
                scores = torch.addmm(self.codebook.square().sum(dim=1).neg(), flat, self.codebook.T, alpha=2)
            codes = scores.argmax(dim=1)
        return rearrange(codes, "(b h w) -> b h w", b=latents.shape[0], h=latents.shape[2])

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w] float32."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def forward(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] -> the nearest codes, with gradients passed through to the latents.

        In training mode the codebook learns from this batch (k-means at first, moving average, dead codes restarted),
        over all processes where torch.distributed is initialised.
        """
        with torch.autocast(latents.device.type, enabled=False):
            if self.training:
                self._prepare(latents)
                vectors, codes, loss = self.vq(latents.float())
                return Quantized(vectors.to(latents.dtype), codes, loss.squeeze())
            codes = self.nearest(latents)
            vectors = self.lookup(codes)
            target = F.normalize(latents.float(), dim=1, eps=1e-6) if self.config.l2_normalize else latents.float()
            loss = F.mse_loss(target, vectors) * self.config.commitment_weight
            passed = target + (vectors - target).detach()
            return Quantized(passed.to(latents.dtype), codes, loss)

    def _prepare(self, latents: Tensor) -> None:
        """Tell the library what depends on this batch and on the processes that train together."""
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        book = self.vq._codebook
        # The library's threshold counts latents per step. Ours is relative, so that it holds for any batch and K.
        mean_use = latents.shape[0] * latents.shape[2] * latents.shape[3] * ranks / self.codebook_size
        book.threshold_ema_dead_code = self.config.dead_code_fraction * mean_use
        book.reset_cluster_size = mean_use  # a restarted code gets time to be found before it can die again
        together = ranks > 1
        book.use_ddp = together
        book.all_reduce_fn = book.kmeans_all_reduce_fn = dist.all_reduce if together else noop
        book.sample_fn = book.replace_sample_fn = _sample_over_ranks if together else batched_sample_vectors
        if together and not self._ranks_agree:
            for tensor in (book.embed.data, book.embed_avg, book.cluster_size):
                dist.broadcast(tensor, src=0)
            self._ranks_agree = True


def _sample_over_ranks(latents: Tensor, count: int) -> Tensor:
    """Latents [1, n, D] of this process -> `count` latents [1, count, D] drawn over all processes, the same on each.

    The library's own version broadcasts asynchronously into buffers that it reads without waiting for them.
    """
    local = latents[0]
    drawn = local[torch.randint(len(local), (count,), device=local.device)] if len(local) < count \
        else local[torch.randperm(len(local), device=local.device)[:count]]
    parts = [torch.empty_like(drawn) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, drawn.contiguous())
    owner = torch.arange(count, device=local.device) % len(parts)  # row i comes from rank i mod ranks
    return torch.stack(parts)[owner, torch.arange(count, device=local.device)][None]
