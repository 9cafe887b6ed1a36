"""The model that `benchmarks decode` samples from: a reference shape, a preset, a model folder."""

# Axes: B images, s tokens sampled, T text ids

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.decode.peers import PEERS, make_peer, peer_work
from benchmarks.decode.reference import Work, make_model, make_work
from seq2seq import EncoderDecoder, TextBatch
from seq2seq.presets import PRESETS
from tokenloom_common.errors import UserError, nearest_name

REFERENCE: dict[str, Any] = {
    "text_vocab_size": 4096, "text_length": 32, "codebook_size": 8192, "grid": (16, 16),
    "width": 512, "heads": 8, "head_dim": 64, "encoder_layers": 2, "decoder_layers": 12,
    "feedforward": "swiglu", "feedforward_multiplier": 8 / 3, "feedforward_bias": False,
    "norm": "rmsnorm", "qk_norm": False, "rotary": "none", "learned_positions": True,
    "image_positions": "flat"}
"""54.5M parameters in decoder and output layer; x-transformers' wrapper can express it too."""
QUICK = REFERENCE | {
    "text_vocab_size": 256, "codebook_size": 1024, "grid": (8, 8), "width": 128, "heads": 4,
    "head_dim": 32, "encoder_layers": 1, "decoder_layers": 3}
PRESET_DATA = {"text_vocab_size": 50_264, "text_length": 64, "codebook_size": 16_384,
               "grid": (16, 16)}
"""Text and image sizes for any preset, which has none: DALL-E mini's."""
SMALL = {"decoder_layers": 2, "encoder_layers": 1, "codebook_size": 512, "text_vocab_size": 512}
"""Upper bounds for the small copy on which results are verified. min-dalle fixes its codebook."""
PROMPTS = ("a red heart", "a smiling face", "octopus", "a slice of pizza", "a blue car",
           "a black cat", "green apple", "rocket")


class Subject:
    """The model that is timed, and its work. text: the text tokenizer of a trained model."""

    def __init__(self, name: str, model: EncoderDecoder, dtype: str, text: Any = None) -> None:
        self.name = name
        self.model = model
        self.dtype = dtype
        self._text = text

    def work(self, pictures: int, tokens: int, guidance: float, one_caption: bool) -> Work:
        """Work with captions of random ids, or of PROMPTS for a trained model."""
        if self._text is None:
            captions, images = (1, pictures) if one_caption else (pictures, 1)
            return make_work(self.model, captions, images, tokens, guidance)
        prompts = [PROMPTS[at % len(PROMPTS)] for at in range(pictures)]
        return Work(self._text.encode(prompts), self._text.null_caption(), 1, tokens, guidance)

    @property
    def trained(self) -> bool:
        """Whether the model comes from a model folder."""
        return self._text is not None

    @property
    def _device(self) -> str:
        return self.model.to_logits.weight.device.type

    def peer_shape_differs(self, name: str) -> bool:
        """Whether a peer cannot have our positions, so that it needs weights of its own."""
        return "x-transformers" in name and self.model.config.rotary == "2d"

    def peer_model(self, name: str) -> EncoderDecoder:
        """The model that a peer is built from."""
        if not self.peer_shape_differs(name):
            return self.model
        config = {**self.model.config.model_dump(), "rotary": "1d"}
        return make_model(config, self._device, self.dtype)

    def caption_slots(self, pictures: int) -> int:
        """Text slots that a row reads by cross-attention: the longest caption's."""
        captions = self.work(pictures, 1, 1.0, False).captions
        return int(captions.text_mask.sum(dim=1).max())

    def small_model(self) -> EncoderDecoder:
        """A small float32 model of the same kind, random, on which results are verified."""
        config = self.model.config.model_dump()
        for key, most in SMALL.items():
            if key == "codebook_size" and self.name == "dalle-mini":
                continue
            if config[key]:
                config[key] = min(most, config[key])
        if config["rotary"] == "2d":
            config["rotary"] = "1d"
        return make_model(config, self._device, "float32")

    def small_work(self, model: EncoderDecoder, guidance: float) -> Work:
        """Three images of 16 tokens."""
        return make_work(model, 3, 1, min(16, model.config.num_tokens), guidance)

    def verify_peer(self, name: str, small: EncoderDecoder) -> dict[str, Any]:
        """Let a peer check on the small model that it does our work."""
        peer = make_peer(name, small)
        tokens = small.config.num_tokens if peer.one_caption else min(16, small.config.num_tokens)
        return peer.verify(peer_work(peer, small, 2, tokens, 3.0))

    def facts(self) -> dict[str, Any]:
        """Size and shape, for the document."""
        config = self.model.config
        layer_parameters = sum(part.numel() for part in self.model.decoder.parameters())
        return {"name": self.name, "trained": self.trained,
                "decoder_parameters": layer_parameters + self.model.to_logits.weight.numel(),
                "layers": config.decoder_layers, "width": config.width, "grid": list(config.grid),
                "codebook_size": config.codebook_size, "text_length": config.text_length}

    def notes(self) -> list[str]:
        """Remarks for the reader of the results."""
        if any(self.peer_shape_differs(name) for name in PEERS):
            return ["x-transformers has no 2d rotary: its model has the same shape with rotary 1d "
                    "and random weights"]
        return []


def subject_of(name: str, quick: bool, device: str, dtype: str) -> Subject:
    """Open or build a subject. UserError for an unknown or decoder-only preset or folder."""
    if name == "reference":
        return Subject(name, make_model(QUICK if quick else REFERENCE, device, dtype), dtype)
    if name in PRESETS:
        return Subject(name, _preset_model(name, device, dtype), dtype)
    if not Path(name).is_dir():
        nearest = nearest_name(name, PRESETS)
        raise UserError(f"--model {name}: neither a model folder nor a preset{nearest}")
    from inference.model_folder import load_model_folder

    parts = load_model_folder(name, device)
    if not isinstance(parts.seq2seq, EncoderDecoder):
        kind = parts.seq2seq.kind
        raise UserError(f"--model {name}: peers are encoder-decoders; this model is {kind}")
    model = parts.seq2seq.to(harness.DTYPES[dtype]).requires_grad_(False)
    return Subject(name, model, dtype, _OnDevice(parts.text_tokenizer, device))


def _preset_model(name: str, device: str, dtype: str) -> EncoderDecoder:
    values = dict(PRESETS[name])
    if values.pop("kind") != EncoderDecoder.kind:
        raise UserError(f"--model {name}: peers are encoder-decoders; choose a preset that is one")
    values["dropout"] = 0.0
    return make_model(values | PRESET_DATA, device, dtype)


class _OnDevice:
    """A text tokenizer whose batches are on the model's device."""

    def __init__(self, source: Any, device: str) -> None:
        self._source = source
        self._device = device

    def encode(self, captions: list[str]) -> TextBatch:
        return self._move(self._source.encode(captions))

    def null_caption(self) -> TextBatch:
        return self._move(self._source.null_caption())

    def _move(self, batch: TextBatch) -> TextBatch:
        return TextBatch(*(torch.as_tensor(part).to(self._device) for part in batch))
