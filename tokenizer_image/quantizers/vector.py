"""Codebooks of vectors: one, several in a row for the residuals, and one behind a learned linear map.

The library runs in training only. It would otherwise start k-means in eval mode too, and it decides at construction,
once for the whole process, whether training is distributed; here both are decided when they are needed.

Axes: B batch, h w latent grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch import distributed as dist
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import (
    batched_sample_vectors,
    kmeans,
    noop,
    rotate_to,
)

from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers.base import (
    LossPart,
    Quantized,
    Quantizer,
    nearest_code,
    process_count,
)

LEAST_USE = 1e-6  # a moving average of fewer latents than this says nothing about where a code belongs


class Choice(NamedTuple):
    """target: what is compared with codes, with gradients to the latents [B, D, h, w]. vectors: the chosen codes', with
    gradients to a codebook that is learned by gradient. codes [B, h, w]."""

    target: Tensor
    vectors: Tensor
    codes: Tensor


class VectorQuantizer(Quantizer):
    """One codebook of K vectors; a latent takes the nearest one."""

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        by_gradient = config.learn_codebook_by_gradient
        # the library's cosine codebook cannot be learned by gradient; unit vectors on both sides of its Euclidean one can
        self._unit_by_gradient = by_gradient and config.l2_normalize
        self.vq = VectorQuantize(
            dim=dim, codebook_size=codebook_size, decay=config.ema_decay,
            use_cosine_sim=config.l2_normalize and not by_gradient, kmeans_init=config.kmeans_init,
            threshold_ema_dead_code=float(config.dead_code_fraction > 0), accept_image_fmap=True,
            learnable_codebook=by_gradient, ema_update=not by_gradient,
            vq_bridge=_UnitLength() if self._unit_by_gradient else None, sync_codebook=False,
            commitment_weight=0.0, rotation_trick=False)  # gradients and loss terms are made here
        book = self.vq._codebook
        book.init_embed_, book.update_ema, book.replace = self._place_codes, self._move_codes, self._restart_codes
        self._ranks_agree = False

    @property
    def codebook(self) -> Tensor:
        """The code vectors [K, D] float32; of length 1 with l2_normalize."""
        codebook = self.vq.codebook.float()
        return F.normalize(codebook, dim=1) if self._unit_by_gradient else codebook

    def code_tensors(self) -> dict[str, Tensor]:
        """The codebook, and with raw_search its vectors at their own lengths."""
        own = {"raw_codebook": self.vq.codebook.float()} if self.config.raw_search else {}
        return {**super().code_tensors(), **own}

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w] int64 in [0, K); ties go to the lowest code."""
        if self.config.raw_search:
            return nearest_code(latents, self.vq.codebook.float(), unit_length=False)
        # the length of a latent does not change which unit vector is nearest
        return nearest_code(latents, self.codebook, unit_length=self.config.l2_normalize)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w] float32."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] float32 -> the nearest codes, with gradients passed through to the latents.

        In training mode the codebook learns from this batch (k-means at first, moving average or gradient, dead codes
        restarted), over all processes where torch.distributed is initialised.
        """
        choice = self.choose(latents)
        vectors = _pass_gradients(choice.target, choice.vectors, self.config.rotation_trick)
        return Quantized(vectors, choice.codes, _loss_parts([choice], self.config))

    def choose(self, latents: Tensor) -> Choice:
        """The nearest codes before gradients are passed; in training mode the codebook learns as `quantize` says."""
        target = F.normalize(latents, dim=1, eps=1e-6) if self.config.l2_normalize else latents
        if self.config.raw_search and self.training:
            self._agree()
        if self.config.raw_search or not self.training:
            with torch.no_grad():
                codes = self.search(latents)
            return Choice(target, self.lookup(codes), codes)
        self._prepare(latents)
        vectors, codes, _ = self.vq(target.detach())
        return Choice(target, vectors, codes)

    def _prepare(self, latents: Tensor) -> None:
        """Tell the library what depends on this batch and on the processes that train together."""
        ranks = process_count()
        book = self.vq._codebook
        mean_use = latents.shape[0] * latents.shape[2] * latents.shape[3] * ranks / self.codebook_size
        # The library's threshold counts latents per step. Ours is relative, so that it holds for any batch and K, and
        # follows the averages up from their start at 1; restarts alone push them above mean_use.
        average = self.config.ema_decay * book.cluster_size.mean() + (1 - self.config.ema_decay) * mean_use
        book.threshold_ema_dead_code = self.config.dead_code_fraction * average.clamp(max=mean_use)
        book.reset_cluster_size = mean_use  # a restarted code gets time to be found before it can die again
        together = ranks > 1
        book.use_ddp = together
        book.all_reduce_fn = book.kmeans_all_reduce_fn = dist.all_reduce if together else noop
        book.sample_fn = book.replace_sample_fn = _sample_over_ranks if together else batched_sample_vectors
        self._agree()

    def _agree(self) -> None:
        """With several processes: the same codebook on each, from the first training step on."""
        if process_count() > 1 and not self._ranks_agree:
            self._start_alike()
            self._ranks_agree = True

    def _start_alike(self) -> None:
        """Every process takes over the codebook of the first."""
        book = self.vq._codebook
        before = book.embed.data.clone()
        for tensor in (book.embed.data, book.embed_avg, book.cluster_size):
            dist.broadcast(tensor, src=0)
        changed = (before != book.embed.data).any().float()
        dist.all_reduce(changed)
        if changed:
            self._codes_rewritten()

    def _codes_rewritten(self) -> None:
        if isinstance(self.vq._codebook.embed, nn.Parameter):
            self.mark_rewritten(self.vq._codebook.embed)

    # ---- in place of methods of the library's codebook

    @torch.no_grad()
    def _place_codes(self, samples: Tensor, mask: None = None) -> None:
        """k-means over the first batch [1, n, D]. The library leaves a code that no latent is nearest to at 0."""
        book = self.vq._codebook
        if book.initted:
            return
        means, counts = kmeans(samples, self.codebook_size, self.config.kmeans_iterations, use_cosine_sim=book.use_cosine_sim,
                               sample_fn=book.sample_fn, all_reduce_fn=book.kmeans_all_reduce_fn)
        book.embed.data.copy_(means)
        book.embed_avg.copy_(means * counts[..., None])
        book.cluster_size.copy_(counts)
        book.initted.fill_(True)
        self._codes_rewritten()

    @torch.no_grad()
    def _move_codes(self) -> None:
        """Codes to the mean of their latents. The library smooths counts, by which codes out of use shrink to 0."""
        book = self.vq._codebook
        use = book.cluster_size[..., None]  # [1, K, 1]
        means = F.normalize(book.embed_avg, dim=-1) if self.config.l2_normalize else book.embed_avg / use
        book.embed.copy_(torch.where(use > LEAST_USE, means, book.embed))

    @torch.no_grad()
    def _restart_codes(self, samples: Tensor, batch_mask: Tensor, seq_mask: None = None) -> None:
        """Dead codes [1, K] to latents of the batch [1, n, D]. Where they outnumber the latents, the rest waits a step.

        The library counts no restarts, and cannot mix a bfloat16 codebook with float32 averages.
        """
        book = self.vq._codebook
        dead = batch_mask[0].nonzero()[:, 0]
        if not book.use_ddp and len(dead) > samples.shape[1]:
            dead = dead[torch.randperm(len(dead), device=dead.device)[:samples.shape[1]]]
        drawn = book.replace_sample_fn(samples, len(dead))[0]  # [dead, D]
        book.embed.data[0, dead] = drawn.to(book.embed.dtype)
        book.embed_avg[0, dead] = drawn * book.reset_cluster_size
        book.cluster_size[0, dead] = book.reset_cluster_size
        self.restarts += len(dead)
        self._codes_rewritten()


class SimVQuantizer(Quantizer):
    """A frozen random codebook behind one learned linear map: all codes move together, so none dies alone."""

    frozen: Tensor

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        self.register_buffer("frozen", torch.randn(codebook_size, dim) * dim ** -0.5)  # [K, D]
        self.map = nn.Linear(dim, dim, bias=False)

    @property
    def codebook(self) -> Tensor:
        """The code vectors [K, D] float32, with gradients to the map."""
        with torch.autocast(self.frozen.device.type, enabled=False):
            return F.linear(self.frozen, self.map.weight.float())

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w] int64 in [0, K); ties go to the lowest code."""
        with torch.no_grad():
            return nearest_code(latents, self.codebook, unit_length=False)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w] float32."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] float32 -> the nearest codes; the map learns from the codebook term."""
        codes = self.search(latents)
        choice = Choice(latents, self.lookup(codes), codes)
        vectors = _pass_gradients(latents, choice.vectors, self.config.rotation_trick)
        return Quantized(vectors, codes, _loss_parts([choice], self.config))


class _UnitLength(nn.Module):
    """Code vectors scaled to length 1 before they are compared."""

    def forward(self, codebook: Tensor) -> Tensor:
        return F.normalize(codebook.clone(), dim=-1)  # a copy, since restarts change the codebook before the backward pass


def _pass_gradients(target: Tensor, vectors: Tensor, rotate: bool) -> Tensor:
    """The chosen vectors [B, D, h, w], with the gradient of the target: turned with it, or copied straight through."""
    vectors = vectors.detach()
    if not target.requires_grad:
        return vectors
    if rotate:
        return rearrange(rotate_to(rearrange(target, "b d h w -> b h w d"), rearrange(vectors, "b d h w -> b h w d")),
                         "b h w d -> b d h w")
    return target + (vectors - target).detach()


def _loss_parts(choices: list[Choice], config: QuantizerConfig) -> dict[str, LossPart]:
    """The terms of van den Oord et al. 2017, eq. 3, means over `choices`: latents to codes, and codes to latents with
    weight 1 where the optimizer moves them."""
    commit = torch.stack([F.mse_loss(target, vectors.detach()) for target, vectors, _ in choices]).mean()
    parts = {"commit": LossPart(commit, config.commitment_weight)}
    if config.learn_codebook_by_gradient or config.kind == "simvq":
        codebook = torch.stack([F.mse_loss(vectors, target.detach()) for target, vectors, _ in choices]).mean()
        parts["codebook"] = LossPart(codebook, 1.0)
    return parts


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
