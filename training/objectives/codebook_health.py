"""Is the codebook in use? Counts over an epoch of pictures, numbers for the log, a warning in words, and a plot."""

# Axes: K codebook size

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from tokenizer_image import CodebookUsage, Usage
from tokenizer_image.usage import usage_of_counts
from training.config.tokenizer import TokenizerRunConfig
from training.engine.processes import Processes
from training.evaluation.plots import plot_codebook
from training.runs.metrics import read_metrics

log = logging.getLogger(__name__)

ENOUGH_CODES = 10  # codes seen for each of the K, before a share of unused ones means anything


class CodebookHealth:
    """What a run knows of its codebook, over all processes."""

    def __init__(self, config: TokenizerRunConfig, group: Processes, pictures: int) -> None:
        """pictures: of an epoch."""
        self.config, self.group = config, group
        train = config.train
        per_update = train.batch_size // train.accumulation  # pictures that all processes see in one micro-batch
        self.pictures = config.codebook.window or pictures
        self.usage = CodebookUsage(config.model.codebook_size, max(1, self.pictures // per_update)).to(group.device)
        self._restarts = 0  # since the last report
        self._warned = False

    def update(self, codes: Tensor, restarts: int) -> None:
        """Count one micro-batch of codes and the dead codes that were restarted in it."""
        self.usage.update(codes)
        self._restarts += restarts

    def report(self) -> dict[str, float]:
        """Numbers of a log line. Every process must call it. restarted_codes counts since the last report."""
        counts = self.counts()
        report = usage_of_counts(counts)
        self._warn(report, int(counts.sum()))
        restarts, self._restarts = self._restarts, 0
        return {"codebook_usage": report.usage, "codebook_perplexity": report.perplexity, "dead_codes": report.dead_codes,
                "restarted_codes": restarts}

    def _warn(self, report: Usage, seen: int) -> None:
        size = self.config.model.codebook_size
        if self.config.train.trained_part == "decoder":  # its codes are what they are
            return
        if report.usage >= self.config.codebook.warn_below or seen < ENOUGH_CODES * size:
            self._warned = self._warned and report.usage < self.config.codebook.warn_below
            return
        if not self._warned:
            self._warned = True
            log.warning("only %.0f %% of the %s codes are in use (perplexity %.0f, over the last %s pictures): the rest is "
                        "wasted. Try %s", 100 * report.usage, f"{size:,}", report.perplexity, f"{self.pictures:,}",
                        "; or ".join(self._remedies()))

    def _remedies(self) -> list[str]:
        """What to try, of those things that this run does not do already."""
        quantizer = getattr(self.config.model, "quantizer", None)
        smaller = f"--model.codebook_size {max(2, self.config.model.codebook_size // 4)}"
        if quantizer is None:
            return ["a higher model.kl_weight or a slower fall of the temperature", smaller]
        if quantizer.kind == "fsq":
            return ["fewer model.quantizer.levels", "longer training"]
        if quantizer.kind == "lfq":
            return [f"--model.quantizer.entropy_weight {2 * quantizer.entropy_weight or 0.1:g}",
                    "a smaller embed_dim and codebook_size"]
        if quantizer.kind == "gumbel":
            return [f"--model.quantizer.kl_weight {10 * quantizer.kl_weight or 5e-4:g}",
                    "a slower fall of the temperature (--model.quantizer.temperature_steps)", smaller]
        tries = []
        if quantizer.kind == "vq" and not quantizer.l2_normalize:
            tries.append("--model.quantizer.l2_normalize true")
        if self.config.model.plain()["embed_dim"] > 32:
            tries.append("--model.embed_dim 8")
        if quantizer.kind != "simvq":
            if not quantizer.dead_code_fraction and not quantizer.raw_search:
                tries.append("--model.quantizer.dead_code_fraction 0.03")
            if not quantizer.learn_codebook_by_gradient and quantizer.ema_decay > 0.95:
                tries.append("--model.quantizer.ema_decay 0.9")
            if not quantizer.kmeans_init and not quantizer.raw_search:
                tries.append("--model.quantizer.kmeans_init true")
        return [*tries, smaller, "FSQ, which has no codebook to collapse (docs/tokenizers.md)"]

    def counts(self) -> Tensor:
        """How often each code was used in the window [K] int64, over all processes. Every process must call it."""
        return self.group.total(self.usage.counts_total()).cpu()

    def draw(self, counts: Tensor, metrics: Path, out: Path) -> None:
        """codebook.png: usage, perplexity and restarts over the steps, and how often each code is used."""
        plot_codebook(read_metrics(metrics), counts, self.config.model.codebook_size, out)

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint."""
        return {**self.usage.state_dict(), "restarts": torch.tensor(self._restarts)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        self._restarts = int(state["restarts"])
        self.usage.load_state_dict({name: tensor for name, tensor in state.items() if name != "restarts"})
