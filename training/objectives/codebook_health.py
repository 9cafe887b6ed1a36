"""Watch how much of the codebook is in use: numbers, a warning with remedies, and a plot."""

# Axes: K codebook size

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from tokenizer_image import CodebookUsage, QuantizerConfig, Usage
from tokenizer_image.usage import usage_of_counts
from training.config.tokenizer import TokenizerRunConfig
from training.engine.processes import Processes
from training.evaluation.plots import plot_codebook
from training.runs.metrics import read_metrics

log = logging.getLogger(__name__)

# codes seen per code of the codebook, before a share of unused ones means anything
ENOUGH_CODES = 10
# way from the threshold to full use, after which a warning is taken back
RECOVERY = 0.2
# codes by perplexity: with fewer, images may fail to come through for want of codes
FEW_CODES = 2.0


class CodebookHealth:
    """Usage of a run's codebook over all processes, counted over a window of images."""

    def __init__(self, config: TokenizerRunConfig, group: Processes, images: int) -> None:
        """images: in an epoch, which is the window unless codebook.window says otherwise."""
        self.config, self.group = config, group
        self.window = config.codebook.window or images
        # a micro-batch of all processes, each of which counts its own
        images_per_update = config.train.batch_size // config.train.accumulation
        updates = max(1, self.window // images_per_update)
        self.usage = CodebookUsage(config.model.codebook_size, updates).to(group.device)
        self._restarts = 0  # since the last report
        self._warned = False

    def update(self, codes: Tensor, restarts: int) -> None:
        """Count one micro-batch of codes and the dead codes that were restarted in it."""
        self.usage.update(codes)
        self._restarts += restarts

    def report(self, is_blank: bool = False) -> dict[str, float]:
        """Return the numbers of a log line. All processes must call it.

        restarted_codes counts since the last one. is_blank: the images do not come through.
        """
        report = usage_of_counts(self.counts())
        self._warn(report, is_blank)
        restarts, self._restarts = self._restarts, 0
        return {"codebook_usage": report.usage, "codebook_perplexity": report.perplexity,
                "dead_codes": report.dead_codes, "restarted_codes": restarts}

    def _warn(self, report: Usage, is_blank: bool) -> None:
        """Warn once of unused codes, and say when they are in use again."""
        config = self.config
        if config.train.trained_part == "decoder":  # whose codes are fixed
            return
        size, threshold = config.model.codebook_size, config.codebook.warn_below
        if report.usage >= threshold:
            # not at the threshold itself, around which the share of codes of a window varies
            has_recovered = report.usage >= threshold + RECOVERY * (1 - threshold)
            if self._warned and has_recovered:
                log.info("the codebook has recovered: %.0f %% of the %s codes are in use "
                         "(perplexity %.0f)", 100 * report.usage, f"{size:,}", report.perplexity)
                self._warned = False
            return

        # few codes so far leave many of them unseen by chance
        is_early = report.codes_seen < ENOUGH_CODES * size
        # a decoder that does not listen to its codes does not to more of them: seen with every
        # remedy below
        is_unheard = is_blank and report.perplexity >= FEW_CODES
        if not (self._warned or is_early or is_unheard):
            self._warned = True
            log.warning("only %.0f %% of the %s codes are in use (perplexity %.0f, over the last "
                        "%s pictures): the rest is wasted. Try %s", 100 * report.usage, f"{size:,}",
                        report.perplexity, f"{self.window:,}", "; or ".join(self._remedies()))

    def _remedies(self) -> list[str]:
        """Return what to try, without what this run does already."""
        quantizer = getattr(self.config.model, "quantizer", None)
        smaller = f"--model.codebook_size {max(2, self.config.model.codebook_size // 4)}"
        if quantizer is None:  # a discrete VAE
            return ["a higher model.kl_weight or a slower fall of the temperature", smaller]
        if quantizer.kind == "fsq":
            return ["fewer model.quantizer.levels", "longer training"]
        if quantizer.kind == "lfq":
            entropy_weight = 2 * quantizer.entropy_weight or 0.1
            return [f"--model.quantizer.entropy_weight {entropy_weight:g}",
                    "a smaller embed_dim and codebook_size"]
        if quantizer.kind == "gumbel":
            kl_weight = 10 * quantizer.kl_weight or 5e-4
            return [f"--model.quantizer.kl_weight {kl_weight:g}",
                    "a slower fall of the temperature (--model.quantizer.temperature_steps)",
                    smaller]
        return [*self._learned_codebook_remedies(quantizer), smaller,
                "FSQ, which has no codebook to collapse (docs/tokenizers.md)"]

    def _learned_codebook_remedies(self, quantizer: QuantizerConfig) -> list[str]:
        remedies = []
        if quantizer.kind == "vq" and not quantizer.l2_normalize:
            remedies.append("--model.quantizer.l2_normalize true")
        if self.config.model.plain()["embed_dim"] > 32:
            remedies.append("--model.embed_dim 8")
        if quantizer.kind == "simvq":  # learns its codebook in another way
            return remedies
        if not quantizer.dead_code_fraction and not quantizer.raw_search:
            remedies.append("--model.quantizer.dead_code_fraction 0.03")
        if not quantizer.learn_codebook_by_gradient and quantizer.ema_decay > 0.95:
            remedies.append("--model.quantizer.ema_decay 0.9")
        if not quantizer.kmeans_init and not quantizer.raw_search:
            remedies.append("--model.quantizer.kmeans_init true")
        return remedies

    def counts(self) -> Tensor:
        """Return uses of each code in the window [K] int64. All processes must call it."""
        return self.group.total(self.usage.counts_total()).cpu()

    def draw(self, counts: Tensor, metrics: Path, out: Path) -> None:
        """Plot usage, perplexity and restarts over the steps, and how often each code is used."""
        plot_codebook(read_metrics(metrics), counts, self.config.model.codebook_size, out)

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint."""
        # in a checkpoint, so that the log lines of a resumed run equal an uninterrupted one's
        return {**self.usage.state_dict(), "restarts": torch.tensor(self._restarts),
                "warned": torch.tensor(self._warned)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        self._restarts = int(state["restarts"])
        self._warned = bool(state["warned"])
        self.usage.load_state_dict({name: tensor for name, tensor in state.items()
                                    if name not in ("restarts", "warned")})
