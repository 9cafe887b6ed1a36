"""Train the caption -> image token transformer on token shards, and export the whole model folder.

CPU:  python training/train_seq2seq.py --config training/recipes/debug_seq2seq.yaml --data.path TOKENS
      --image_tokenizer TOKENIZER_RUN/model --run_dir RUN
real: deepspeed training/train_seq2seq.py --config training/recipes/small_seq2seq.yaml --data.path TOKENS
      --image_tokenizer TOKENIZER_RUN/model --run_dir RUN
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from inference import LoadedModel, SamplingParams, TextToImage, save_model_folder
from seq2seq import EncoderDecoder, Seq2SeqConfig, TextTokenizer, TextTokenizerConfig
from seq2seq.losses import image_token_loss
from tokenizer_image import load_tokenizer
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.images import image_grid
from tokenloom_common.errors import run_command
from tokenloom_common.files import write_json_atomic
from training.config import Seq2SeqRunConfig
from training.config_loading import load_config
from training.data.batches import ItemId, MicroBatches, batch_loader
from training.data.token_shards import TokenShards, check_same_tokenizer
from training.data.training_sets import CollateTokens, TokenBatch, TokenVisits
from training.engine import Engine, deepspeed_json, processes, resolve_precision
from training.log import setup_console
from training.loop import Task, run_training
from training.model_card import model_card
from training.optim import build_optimizer
from training.process_group import Processes
from training.run_state import RunState, seed_everything

log = logging.getLogger("training.train_seq2seq")  # under a launcher __name__ is "__main__"

SAMPLE_PICTURES = 8
DEFAULT_VOCAB_SIZE = 2048
DEFAULT_TEXT_LENGTH = 32


class Seq2SeqTraining:
    """One run: the transformer, its tokenizers, its data and what the loop needs of them."""

    def __init__(self, config: Seq2SeqRunConfig, group: Processes) -> None:
        self.config, self.group = config, group
        precision = resolve_precision(config, group.device)
        deepspeed_json(config, group.world_size, precision, parameters=1)  # a batch that cannot be divided is refused now
        self.image_tokenizer = load_tokenizer(config.image_tokenizer)
        self.shards = TokenShards(config.data.path, config.data.split)
        self.held_out = (TokenShards(config.data.path, config.data.validation_split)
                         if config.data.validation_split else None)
        self.fingerprint = code_fingerprint(self.image_tokenizer)
        check_same_tokenizer(self.shards.index, config.data.path, self.image_tokenizer.codebook_size,
                             self.image_tokenizer.grid, self.fingerprint, config.image_tokenizer)
        self.text_tokenizer = TextTokenizer(*group.first_does(self._text_tokenizer))
        model_config = self._model_config()
        self.run_state = RunState(config, group, {"model": model_config.plain(), "data rows": len(self.shards)})
        self.run_state.prepare()
        group.first_does(self._keep_text_tokenizer)
        self.visits = TokenVisits(self.shards, config.seed, config.caption_dropout, config.token_corruption)
        self.collate = CollateTokens(self.text_tokenizer)
        seed_everything(config.seed, 0)  # the same weights on every process
        self.model = EncoderDecoder(model_config)
        self.engine = Engine(self.model, build_optimizer(self.model, config.optim), config, group, precision)
        seed_everything(config.seed, group.rank)

    def _text_tokenizer(self) -> tuple[bytes, TextTokenizerConfig]:
        tokenizer = self._choose_text_tokenizer()
        return tokenizer.model_proto, tokenizer.config

    def _choose_text_tokenizer(self) -> TextTokenizer:
        """The one that is named; or the one of the run that is continued; or one trained on the captions."""
        text, run = self.config.text, Path(self.config.run_dir)
        if text.tokenizer:
            return TextTokenizer.from_pretrained(text.tokenizer)
        if self.config.checkpoint.resume != "never" and (run / "text_tokenizer").is_dir() and (run / "latest.json").is_file():
            kept = TextTokenizer.from_pretrained(run / "text_tokenizer")
            if kept.config.text_length == (text.text_length or DEFAULT_TEXT_LENGTH):
                return kept  # else the model's config differs too, and resuming is refused for that
        return TextTokenizer.train(self.shards.all_captions(), text.vocab_size or DEFAULT_VOCAB_SIZE,
                                   text.text_length or DEFAULT_TEXT_LENGTH)

    def _keep_text_tokenizer(self) -> None:
        folder = self.run_state.run_dir / "text_tokenizer"
        if not folder.exists():
            self.text_tokenizer.save_pretrained(folder)

    def _model_config(self) -> Seq2SeqConfig:
        text = self.text_tokenizer.config
        return Seq2SeqConfig.parse({
            **self.config.model.resolved(), "text_vocab_size": text.vocab_size, "text_length": text.text_length,
            "codebook_size": self.image_tokenizer.codebook_size, "grid": self.image_tokenizer.grid,
            "tokenizer_fingerprint": self.fingerprint}, "model")

    def task(self) -> Task:
        """This run as the training loop sees it."""
        return Task("train seq2seq", [self.engine], self.batches, self.train, metrics=dict, sample=self.sample,
                    problem=lambda: None, state=dict, restore=lambda state: None)

    def batches(self, first_step: int) -> Iterable[TokenBatch]:
        """This process's micro-batches from `first_step` on."""
        train = self.config.train
        order = MicroBatches(len(self.visits), train.batch_size, train.accumulation, self.config.seed, self.group.rank,
                             self.group.world_size, first_step, train.steps)
        return batch_loader(self.visits, order, self.config.data.workers, self.collate)

    def train(self, batch: TokenBatch, step: int) -> dict[str, Tensor]:
        """One micro-batch: gradients, and an optimizer step at the end of a window -> mean cross entropy in nats."""
        device = self.group.device
        tokens = batch.image_tokens.to(device)
        logits = self.engine(batch.text.text_ids.to(device), batch.text.text_mask.to(device), batch.input_tokens.to(device))
        loss = image_token_loss(logits, tokens)
        self.engine.backward(loss, step + 1, {"cross entropy": loss.detach()})
        self.engine.step(step + 1)
        return {"loss": loss.detach()}

    def full_model(self) -> EncoderDecoder:
        """A float32 copy with the whole current weights. All processes must call it."""
        state = self.engine.full_state()
        model = EncoderDecoder(self.model.config)
        model.load_state_dict(state)
        return model.to(self.group.device).eval()

    def pipeline(self, model: EncoderDecoder) -> TextToImage:
        """A sampler around the current weights."""
        image_tokenizer = self.image_tokenizer.to(self.group.device)
        return TextToImage(LoadedModel(image_tokenizer, model, self.text_tokenizer, self.generation(),
                                       self.run_state.run_dir))

    def generation(self) -> SamplingParams:
        """Sampling defaults of this run's exports and grids."""
        return SamplingParams(guidance_scale=self.config.sample_guidance, top_k=self.config.sample_top_k)

    def sample(self, step: int) -> None:
        """samples/step-…png: pictures sampled for fixed captions and seeds."""
        model = self.full_model()
        if not self.group.is_first:
            return
        stride = max(1, len(self.shards) // SAMPLE_PICTURES)
        captions = [self.shards.captions(row)[0] for row in range(0, len(self.shards), stride)][:SAMPLE_PICTURES]
        result = self.pipeline(model).generate(captions, seed=0)
        folder = self.run_state.run_dir / "samples"
        image_grid(result.images, columns=len(captions)).save(folder / f"step-{step:08d}.png")
        write_json_atomic(folder / "captions.json", captions)

    def finish(self) -> None:
        """Measure the held-out split and export run_dir/model."""
        model = self.full_model()
        if not self.group.is_first:
            return
        held_out = None
        if self.held_out is not None:
            held_out = validation_loss(model, self.held_out, self.collate, self.config.seed)
            write_json_atomic(self.run_state.run_dir / "validation.json",
                              {"split": self.config.data.validation_split, "loss": held_out, "rows": len(self.held_out)})
            log.info("held-out loss: %.4f nats a token", held_out)
        folder = save_model_folder(self.run_state.run_dir / "model", self.image_tokenizer.cpu(), model.cpu(),
                                   self.text_tokenizer, self.generation(),
                                   model_card(self.config, model.config, len(self.shards), held_out))
        log.info("model folder: %s", folder)


@torch.inference_mode()
def validation_loss(model: EncoderDecoder, shards: TokenShards, collate: CollateTokens, seed: int,
                    batch_size: int = 64) -> float:
    """Mean cross entropy in nats over a split's tokens, each row with one of its captions, none dropped."""
    visits = TokenVisits(shards, seed, caption_dropout=0.0)
    device = model.to_logits.weight.device
    total = 0.0
    for step in range(-(-len(shards) // batch_size)):
        rows = range(step * batch_size, min(len(shards), (step + 1) * batch_size))
        batch = collate([visits[ItemId(0, row)] for row in rows])
        tokens = batch.image_tokens.to(device)
        logits = model(batch.text.text_ids.to(device), batch.text.text_mask.to(device), tokens)
        total += float(image_token_loss(logits, tokens)) * len(rows)
    return total / len(shards)


def run(argv: Sequence[str] | None) -> int:
    """Train from command-line arguments."""
    config = load_config(Seq2SeqRunConfig, sys.argv[1:] if argv is None else argv, "train_seq2seq.py", __doc__ or "")
    with processes(config.train.threads) as group:
        setup_console(group.is_first)
        training = Seq2SeqTraining(config, group)
        trained = run_training(training.task(), config, group, training.run_state)
        if trained or not (training.run_state.run_dir / "model").exists():
            training.finish()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: errors become one line and an exit code."""
    return run_command(run, argv, "train_seq2seq.py")


if __name__ == "__main__":
    sys.exit(main())
