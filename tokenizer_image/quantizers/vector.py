"""One codebook of vectors, learned by moving average or by gradient.

The library (vector-quantize-pytorch) runs in training only. In eval mode it would start k-means
too, and it decides at construction, once for the whole process, whether training is distributed;
here both are decided when needed.

Axes: B batch, h w latent grid, D length of a code vector, K codebook size, n latents of a batch (=
B*h*w).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch import distributed as dist
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import batched_sample_vectors, kmeans, noop

from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers.base import Quantized, Quantizer, process_count
from tokenizer_image.quantizers.gradients import CodeAssignment, pass_gradients, vq_losses
from tokenizer_image.quantizers.search import nearest_codes

MIN_CLUSTER_SIZE = 1e-6  # an average over fewer latents says nothing about a code's place


class VectorQuantizer(Quantizer):
    """One codebook of K vectors; a latent takes the nearest one."""

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        by_gradient = config.learn_codebook_by_gradient
        # The library's cosine codebook cannot be learned by gradient; its Euclidean one can, and
        # with unit vectors on both sides it is the same search.
        self._unit_by_gradient = by_gradient and config.l2_normalize
        self.vq = VectorQuantize(
            dim=dim, codebook_size=codebook_size, accept_image_fmap=True, sync_codebook=False,
            decay=config.ema_decay, ema_update=not by_gradient, learnable_codebook=by_gradient,
            use_cosine_sim=config.l2_normalize and not by_gradient,
            vq_bridge=_UnitLength() if self._unit_by_gradient else None,
            kmeans_init=config.kmeans_init,
            threshold_ema_dead_code=float(config.dead_code_fraction > 0),
            commitment_weight=0.0, rotation_trick=False)  # both are done in gradients.py

        # each replacement's docstring says why it is not the library's
        book = self.vq._codebook
        book.init_embed_ = self._init_by_kmeans
        book.update_ema = self._move_to_means
        book.replace = self._restart_dead_codes
        self._codebook_synced = False

    @property
    def codebook(self) -> Tensor:
        """The code vectors [K, D] float32; of length 1 with l2_normalize."""
        codebook = self.vq.codebook.float()
        return F.normalize(codebook, dim=1) if self._unit_by_gradient else codebook

    def code_tensors(self) -> dict[str, Tensor]:
        """The codebook, and with raw_search its vectors at their own lengths."""
        tensors = super().code_tensors()
        if self.config.raw_search:
            tensors["raw_codebook"] = self.vq.codebook.float()
        return tensors

    def code_counts(self) -> Tensor | None:
        """The moving average of how often each code was found [1, K]; None where all learn by
        gradient."""
        counts = self.vq._codebook.cluster_size
        return counts if bool(counts.any()) else None

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w] int64, the lowest on ties."""
        if self.config.raw_search:
            return nearest_codes(latents, self.vq.codebook.float(), unit_length=False)
        # the length of a latent does not change which unit vector is nearest
        return nearest_codes(latents, self.codebook, unit_length=self.config.l2_normalize)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w] float32."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] float32 -> the nearest codes, with gradients passed through to the
        latents.

        In training mode the codebook learns from this batch (k-means at first, then moving average
        or gradient, dead codes restarted), over all processes where torch.distributed is
        initialized.
        """
        assignment = self.assign(latents)
        vectors = pass_gradients(assignment.target, assignment.vectors, self.config.rotation_trick)
        return Quantized(vectors, assignment.codes, vq_losses([assignment], self.config))

    def assign(self, latents: Tensor) -> CodeAssignment:
        """Find the nearest codes without passing gradients; in training the codebook learns."""
        target = latents
        if self.config.l2_normalize:
            target = F.normalize(latents, dim=1, eps=1e-6)

        if self.training and not self.config.raw_search:
            self._prepare_codebook_update(latents)
            self._sync_codebook_once()
            vectors, codes, _ = self.vq(target.detach())
            return CodeAssignment(target, vectors, codes)

        # the library has no raw_search: there the codebook learns from its loss term alone
        if self.training:
            self._sync_codebook_once()
        with torch.no_grad():
            codes = self.search(latents)
        return CodeAssignment(target, self.lookup(codes), codes)

    def _prepare_codebook_update(self, latents: Tensor) -> None:
        """Set in the library's codebook what depends on the batch and on the process count."""
        ranks = process_count()
        book = self.vq._codebook
        decay = self.config.ema_decay
        batch, _, height, width = latents.shape
        mean_use = batch * height * width * ranks / self.codebook_size

        # The library's threshold is a number of latents per step. Ours is relative, so that it
        # holds for any batch and K, and follows the averages up from their start at 1. Restarts
        # alone push their mean above mean_use, hence the clamp.
        average = decay * book.cluster_size.mean() + (1 - decay) * mean_use
        book.threshold_ema_dead_code = self.config.dead_code_fraction * average.clamp(max=mean_use)
        book.reset_cluster_size = mean_use  # gives a restarted code time to be found

        distributed = ranks > 1
        reduce = dist.all_reduce if distributed else noop
        sample = _sample_over_ranks if distributed else batched_sample_vectors
        book.use_ddp = distributed
        book.all_reduce_fn = book.kmeans_all_reduce_fn = reduce
        book.sample_fn = book.replace_sample_fn = sample

    def _sync_codebook_once(self) -> None:
        """Copy rank 0's codebook to all processes before the first training step."""
        if self._codebook_synced or process_count() == 1:
            return
        self._codebook_synced = True

        book = self.vq._codebook
        before = book.embed.data.clone()
        for tensor in (book.embed.data, book.embed_avg, book.cluster_size):
            dist.broadcast(tensor, src=0)

        # all processes must agree on `rewritten`, so one that changed marks it on all
        changed = (before != book.embed.data).any().float()
        dist.all_reduce(changed)
        if changed:
            self._mark_codebook_rewritten()

    def _mark_codebook_rewritten(self) -> None:
        embed = self.vq._codebook.embed
        # with a moving average it is a buffer, which no optimizer holds
        if isinstance(embed, nn.Parameter):
            self.mark_rewritten(embed)

    # ---- in place of methods of the library's codebook

    @torch.no_grad()
    def _init_by_kmeans(self, samples: Tensor, mask: None = None) -> None:
        """Place the codes by k-means over the first batch [1, n, D].

        Not the library's: it leaves a code that no latent is nearest to at 0.
        """
        book = self.vq._codebook
        if book.initted:
            return
        means, counts = kmeans(
            samples, self.codebook_size, self.config.kmeans_iterations,
            use_cosine_sim=book.use_cosine_sim, sample_fn=book.sample_fn,
            all_reduce_fn=book.kmeans_all_reduce_fn)
        book.embed.data.copy_(means)
        book.embed_avg.copy_(means * counts[..., None])
        book.cluster_size.copy_(counts)
        book.initted.fill_(True)
        self._mark_codebook_rewritten()

    @torch.no_grad()
    def _move_to_means(self) -> None:
        """Move codes to the mean of their latents.

        Not the library's: it smooths the counts, by which codes out of use shrink to 0.
        """
        book = self.vq._codebook
        cluster_size = book.cluster_size[..., None]  # [1, K, 1]
        if self.config.l2_normalize:
            means = F.normalize(book.embed_avg, dim=-1)
        else:
            means = book.embed_avg / cluster_size
        book.embed.copy_(torch.where(cluster_size > MIN_CLUSTER_SIZE, means, book.embed))

    @torch.no_grad()
    def _restart_dead_codes(self, samples: Tensor, batch_mask: Tensor,
                            seq_mask: None = None) -> None:
        """Move dead codes (batch_mask [1, K]) to latents of the batch [1, n, D]; the excess waits a
        step.

        Not the library's: it counts no restarts, and cannot mix a bfloat16 codebook with float32
        averages.
        """
        book = self.vq._codebook
        dead = batch_mask[0].nonzero()[:, 0]
        count = samples.shape[1]
        if not book.use_ddp and len(dead) > count:
            shuffled = torch.randperm(len(dead), device=dead.device)
            dead = dead[shuffled[:count]]

        drawn = book.replace_sample_fn(samples, len(dead))[0]  # [dead, D]
        book.embed.data[0, dead] = drawn.to(book.embed.dtype)
        book.embed_avg[0, dead] = drawn * book.reset_cluster_size
        book.cluster_size[0, dead] = book.reset_cluster_size
        self.restarts += len(dead)
        self._mark_codebook_rewritten()


class _UnitLength(nn.Module):
    """Scale code vectors to length 1 before they are compared."""

    def forward(self, codebook: Tensor) -> Tensor:
        # a copy, since restarts change the codebook in place before the backward pass
        return F.normalize(codebook.clone(), dim=-1)


def _sample_over_ranks(latents: Tensor, count: int) -> Tensor:
    """Latents [1, n, D] of this process -> `count` latents [1, count, D] drawn over all, the same
    on each.

    Not the library's: it broadcasts asynchronously into buffers that it reads without waiting for
    them.
    """
    local = latents[0]
    device = local.device
    if len(local) < count:
        rows = torch.randint(len(local), (count,), device=device)
    else:
        rows = torch.randperm(len(local), device=device)[:count]
    drawn = local[rows]

    gathered = [torch.empty_like(drawn) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, drawn.contiguous())

    # row i comes from rank i mod ranks
    row = torch.arange(count, device=device)
    owner = row % len(gathered)
    return torch.stack(gathered)[owner, row][None]
