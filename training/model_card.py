"""The README.md of an exported model folder and of an exported image tokenizer, with what the run knows about itself."""

from __future__ import annotations

import math
from typing import Any

from inference.model_folder import USAGE
from seq2seq import Seq2SeqConfig, TransformerConfig
from tokenizer_image import ImageTokenizer
from tokenloom_common.model_card import model_card
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig
from training.run_card import LIMITS, run_card


def seq2seq_card(run: Seq2SeqRunConfig, model: TransformerConfig, rows: int, held_out_loss: float | None) -> str:
    """A model card in the Hub's form. Figures that were not measured are said to be so."""
    if isinstance(model, Seq2SeqConfig):
        family, layers = "An encoder-decoder transformer", f"{model.encoder_layers} + {model.decoder_layers}"
    else:
        family, layers = "A decoder-only transformer", f"{len(model.patterns(getattr(model, 'layers', 0)))}"
    measured = () if held_out_loss is None else (
        ("held-out loss, nats a token", "loss", held_out_loss),
        ("held-out perplexity, codes", "perplexity", math.exp(min(held_out_loss, 700))))
    return model_card(run_card(
        run, run.data, rows,
        (("code grid, codebook", f"{model.grid[0]} x {model.grid[1]}, {model.codebook_size}"),
         ("transformer", f"{layers} layers, width {model.width}")), measured, LIMITS,
        title="Text-to-image model", summary=f"{family} over the codes of an image tokenizer, trained with Tokenloom.",
        usage=USAGE, pipeline_tag="text-to-image", tags=(model.kind,)))


def tokenizer_card(run: TokenizerRunConfig, model: ImageTokenizer, rows: int, report: dict[str, Any] | None) -> str:
    """As seq2seq_card, of an image tokenizer; report: of evaluate_reconstruction on the held-out split."""
    measured = () if report is None else (
        ("held-out PSNR, dB", "psnr", report["psnr"]),
        ("share of the codes in use", "codebook_usage", report["codebook_usage"]),
        ("perplexity of the codes", "codebook_perplexity", report["codebook_perplexity"]))
    config = model.config
    usage = ('from tokenloom import load_tokenizer\n\ntokenizer = load_tokenizer("path/or/hub-id")\n'
             "codes = tokenizer.encode(image)  # [B, 3, S, S] in [-1, 1] -> [B, h, w]\nimage = tokenizer.decode(codes)")
    return model_card(run_card(
        run, run.data, rows,
        (("pictures", f"{config.resolution} px"),
         ("code grid, codebook", f"{model.grid[0]} x {model.grid[1]}, {model.codebook_size}"),
         ("parameters", f"{sum(p.numel() for p in model.parameters()):,}")), measured, LIMITS,
        title="Image tokenizer", summary=f"Pictures to discrete codes and back (`{model.kind}`), trained with Tokenloom.",
        usage=usage, task="image-to-image", tags=("image-tokenizer", model.kind)))
