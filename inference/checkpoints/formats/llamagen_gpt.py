"""LlamaGen's transformers, of classes and of text (Sun et al. 2024, https://arxiv.org/abs/2406.06525).

A file holds weights alone. Their shapes say all but the number of heads, which its published sizes have by layers and width,
and the grid, which the image tokenizer has.
"""

# Axes: D width, I inner width of the feed-forward, H heads, G key/value heads, d head width, T text slots, F width of features

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor

from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.files.weights_file import find_weights, read_weights
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart, Rule, multiplier, tensor_names
from inference.sampling import SamplingParams
from seq2seq import (
    ClassLabels,
    ClassLabelsConfig,
    DecoderOnly,
    DecoderOnlyConfig,
    FrozenTextEncoder,
    TextSource,
)
from seq2seq.positions import ROTARY_BASE
from seq2seq.presets import LLAMAGEN, LLAMAGEN_HEADS
from tokenizer_image import ImageTokenizer, load_tokenizer
from tokenloom_common.config import StrictConfig, read_mapping
from tokenloom_common.errors import UserError, nearest_name, one_line

CONTAINERS = ("model", "module", "state_dict")  # DistributedDataParallel, DeepSpeed, Lightning; FSDP's files have none
CLASSES = "cls_embedding.embedding_table.weight"
NULL = "cls_embedding.uncond_embedding"
IGNORED = ("*freqs_cis", "*causal_mask", "*kv_cache*")  # buffers that follow from the shape
PIXELS_A_CODE = 16  # of VQ-16, which all published transformers were trained with

PLAIN = {
    "image_embedding.weight": "tok_embeddings.weight", "to_logits.weight": "output.weight",
    "decoder.final_norm.weight": "norm.weight", "text_input.embedding.weight": CLASSES,
    "text_input.embedding.0.weight": "cls_embedding.cap_proj.fc1.weight",
    "text_input.embedding.2.weight": "cls_embedding.cap_proj.fc2.weight"}
"""Our names outside the layers -> theirs."""
LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
ATTENTION = {"0.0.weight": "attention_norm.weight", "1.to_out.weight": "attention.wo.weight"}
FEED = {"0.0.weight": "ffn_norm.weight", "1.ff.2.weight": "feed_forward.w2.weight"}
"""Our names in a layer's two blocks -> theirs, of matrices that are the same; queries, keys and values are one of theirs, and
our first matrix of the feed-forward two of theirs."""
SAMPLING = {"classes": {"guidance_scale": 4.0, "top_k": 2000}, "text": {"guidance_scale": 7.5, "top_k": 1000}}
"""What its sampling scripts draw with."""
CAPTIONS_NOTE = ("captions are read as they are given; LlamaGen's script lowers their case and takes out links, tags and some "
                 "punctuation first")


class ModelArgs(StrictConfig):
    """Its own config: what the shapes of the weights do not say, and what they are compared with."""

    model_config = ConfigDict(extra="ignore")

    n_head: int | None = None
    n_kv_head: int | None = None
    block_size: int | None = None
    rope_base: float = ROTARY_BASE
    norm_eps: float = 1e-5
    dim: int | None = None
    n_layer: int | None = None
    vocab_size: int | None = None
    cls_token_num: int | None = None


OTHER_ARGS = ("multiple_of", "ffn_dim_multiplier", "initializer_range", "token_dropout_p", "attn_dropout_p", "resid_dropout_p",
              "ffn_dropout_p", "drop_path_rate", "num_classes", "caption_dim", "class_dropout_prob", "model_type",
              "max_batch_size", "max_seq_len", "config")
"""Keys of its config that are about training, or that the shapes say; not read."""


def convert(source: Path, options: ConvertOptions) -> ConvertedPart | ConvertedModel:
    """A file, or the folder of its Hub wrapper; a whole model with an image tokenizer (and for text, a text encoder), else the
    transformer alone."""
    options.only("llamagen-gpt", "config", "resolution", "image_tokenizer", "text_encoder", "classes")
    stems = ("model", "pytorch_model", "consolidated")
    path = find_weights(source, stems, "LlamaGen's transformer") if source.is_dir() else source
    weights = read_weights(path, CONTAINERS)
    of_text = CLASSES not in weights
    if of_text and NULL not in weights:
        raise UserError(f"{path}: holds neither {CLASSES} nor {NULL}, so it is not a whole transformer of LlamaGen's")
    _check_options(options, of_text, path)
    given = _model_args(source, options.config)
    tokenizer = None if options.image_tokenizer is None else load_tokenizer(options.image_tokenizer)
    grid, notes = _grid(tokenizer, given, options, path)
    part = _part(weights, _config(weights, given, grid, path), path, notes)
    if tokenizer is None or (of_text and options.text_encoder is None):
        lacking = "--image-tokenizer" if tokenizer is None else "--text-encoder"
        return _alone(part, lacking, of_text)
    part.check()  # before a text encoder of gigabytes is loaded
    text = _text_encoder(weights, part.config, options) if of_text else _classes(part.config, options.classes)
    if (tokenizer.codebook_size, tuple(tokenizer.grid)) != (part.config.codebook_size, part.config.grid):
        raise UserError(f"{options.image_tokenizer}: has {tokenizer.codebook_size} codes, {path.name} draws "
                        f"{part.config.codebook_size}; give the image tokenizer that it was trained with")
    sampling = SamplingParams(**SAMPLING["text" if of_text else "classes"])
    notes = (*part.notes, *([CAPTIONS_NOTE] if of_text else []))
    return ConvertedModel(tokenizer, part, text, sampling, notes)


def _check_options(options: ConvertOptions, of_text: bool, path: Path) -> None:
    if of_text and options.classes is not None:
        raise UserError(f"{path}: draws from text, not from classes; leave --classes out")
    if not of_text and options.text_encoder is not None:
        raise UserError(f"{path}: draws from classes, not from text; leave --text-encoder out")


def _model_args(source: Path, given: Path | None) -> ModelArgs:
    """From the file that is given, or the config.json in a Hub wrapper's folder. UserError for a value that our models cannot
    have, and for an unknown key of the file that is given."""
    path = given or source / "config.json"
    if given is None and not path.is_file():
        return ModelArgs()
    values = read_mapping(path)
    valid = (*ModelArgs.model_fields, *OTHER_ARGS)
    for name in values if given else ():
        if name not in valid:
            raise UserError(f"{path}: unknown key '{name}'{nearest_name(name, valid)}")
    inner = values.get("config")
    args = ModelArgs.parse(inner if isinstance(inner, dict) else values, str(path))
    if args.rope_base != ROTARY_BASE:
        raise UserError(f"{path}: rope_base {args.rope_base:g}; our rotary positions have {ROTARY_BASE:g} alone")
    return args


def _grid(tokenizer: ImageTokenizer | None, given: ModelArgs, options: ConvertOptions, path: Path
          ) -> tuple[tuple[int, int], tuple[str, ...]]:
    """The grid of codes, and what was assumed."""
    side = None if given.block_size is None else math.isqrt(max(0, given.block_size))
    if side is not None and (side * side != given.block_size or not side):
        raise UserError(f"{options.config or path}: block_size {given.block_size} is not a square of codes")
    if options.resolution is not None:
        if tokenizer is not None and tokenizer.config.resolution != options.resolution:
            theirs = tokenizer.config.resolution
            raise UserError(f"--resolution {options.resolution}: {options.image_tokenizer} is for {theirs} px; convert it with "
                            f"--resolution {options.resolution} too")
        if options.resolution % PIXELS_A_CODE:
            raise UserError(f"--resolution {options.resolution}: not a multiple of {PIXELS_A_CODE} pixels, the side of a code")
    if tokenizer is not None:
        rows, columns = tokenizer.grid
        if rows != columns or side not in (None, rows):
            raise UserError(f"{options.image_tokenizer}: its grid is {rows} x {columns}, the transformer's is "
                            f"{'square' if side is None else f'{side} x {side}'}; give the image tokenizer for that resolution")
        return (rows, columns), () if side else (f"grid {rows} x {columns}: the image tokenizer's; the file does not say it",)
    if side is not None:
        if options.resolution not in (None, side * PIXELS_A_CODE):
            raise UserError(f"--resolution {options.resolution}: its config's block_size {given.block_size} is {side} x {side} "
                            f"codes, {side * PIXELS_A_CODE} px; leave --resolution out")
        return (side, side), ()
    if options.resolution is None:
        raise UserError(f"{path}: does not say its grid of codes; give --image-tokenizer DIR, --resolution PIXELS, or --config "
                        "FILE with block_size")
    side = options.resolution // PIXELS_A_CODE
    return (side, side), (f"grid {side} x {side}: {options.resolution} px at {PIXELS_A_CODE} px a code, as VQ-16 has them",)


def _config(weights: Mapping[str, Tensor], given: ModelArgs, grid: tuple[int, int], path: Path) -> DecoderOnlyConfig:
    """What the shapes say."""
    vocabulary, width = _shape(weights, "tok_embeddings.weight", path)
    layers = 1 + max((int(match[1]) for name in weights if (match := re.match(r"layers\.(\d{1,4})\.", name))), default=-1)
    heads = given.n_head or LLAMAGEN_HEADS.get((layers, width))
    if heads is None:
        raise UserError(f"{path}: {layers} layers of width {width} are no published size, so its heads are not known; give "
                        "--config FILE with n_head")
    if heads < 1 or width % heads:
        raise UserError(f"{path}: {heads} heads do not divide its width {width}")
    head_dim = width // heads
    kv_heads = max(1, (_shape(weights, "layers.0.attention.wqkv.weight", path)[0] - width) // (2 * head_dim))
    if CLASSES in weights:
        text: dict[str, Any] = {"text_vocab_size": _shape(weights, CLASSES, path)[0], "text_length": 1}
    else:
        length, feature_width = _shape(weights, NULL, path)
        text = {"text_feature_width": feature_width, "text_length": length}
    found = {"dim": width, "n_layer": layers, "n_kv_head": kv_heads, "vocab_size": vocabulary,
             "cls_token_num": text["text_length"]}
    for name, value in found.items():
        if getattr(given, name) not in (None, value):
            raise UserError(f"{path}: its weights have {name} {value}, its config says {getattr(given, name)}; give the config "
                            "of these weights")
    inner = _shape(weights, "layers.0.feed_forward.w1.weight", path)[0]
    shared = {name: value for name, value in LLAMAGEN.items() if name != "kind"}
    return DecoderOnlyConfig.parse({
        **shared, **text, "norm_eps": given.norm_eps, "layers": layers, "width": width, "heads": heads, "head_dim": head_dim,
        "kv_heads": None if kv_heads == heads else kv_heads, "feedforward_multiplier": multiplier(inner, width),
        "codebook_size": vocabulary, "grid": grid}, f"{path}: the shapes say")


def _shape(weights: Mapping[str, Tensor], name: str, path: Path) -> tuple[int, int]:
    """Of a matrix. UserError where it is missing or none."""
    if name not in weights:
        raise UserError(f"{path}: lacks {name}, so it is not a whole transformer of LlamaGen's")
    shape = tuple(weights[name].shape)
    if len(shape) != 2 or min(shape) < 1:
        raise UserError(f"{path}: {name} is of shape {list(shape)}, expected a matrix")
    return shape[0], shape[1]


def _part(weights: Mapping[str, Tensor], config: DecoderOnlyConfig, path: Path, notes: tuple[str, ...]) -> ConvertedPart:
    ignored = IGNORED if config.text_feature_width is None else (*IGNORED, NULL)  # the text encoder's folder has it
    rules = {name: rule_of(name, config) for name in tensor_names(DecoderOnly, config)}
    return ConvertedPart(DecoderOnly, config, rules, weights, path, ignored, notes)


def rule_of(name: str, config: DecoderOnlyConfig) -> Rule:
    """What one of our tensors is made of."""
    match = LAYER.match(name)
    if match is None:
        return Rule((PLAIN[name],))
    layer, feeds = divmod(int(match[1]), 2)
    rest, prefix = match[2], f"layers.{layer}."
    if feeds:
        if rest in FEED:
            return Rule((prefix + FEED[rest],))
        assert rest == "1.ff.0.proj.weight"  # [2 I, D]: what is multiplied, then what goes through SiLU
        return Rule((f"{prefix}feed_forward.w3.weight", f"{prefix}feed_forward.w1.weight"), _on_top)
    if rest in ATTENTION:
        return Rule((prefix + ATTENTION[rest],))
    sizes = [config.width, *[(config.kv_heads or config.heads) * config.head_dim] * 2]
    which = ("1.to_q.weight", "1.to_k.weight", "1.to_v.weight").index(rest)
    return Rule((f"{prefix}attention.wqkv.weight",), lambda both: torch.split(both, sizes)[which])


def _on_top(first: Tensor, second: Tensor) -> Tensor:
    if first.shape != second.shape:
        raise ValueError("of different shapes")
    return torch.cat([first, second])


def _alone(part: ConvertedPart, lacking: str, of_text: bool) -> ConvertedPart:
    """The transformer without what reads captions and draws pictures."""
    notes = [f"without {lacking} this is a transformer alone, which cannot be sampled from"]
    if of_text:
        notes.append(f"{NULL}, what guidance leads away from, is kept with a text encoder only (--text-encoder)")
    return replace(part, notes=(*part.notes, *notes))


def _classes(config: DecoderOnlyConfig, path: Path | None) -> TextSource:
    """Names for the classes; the last row of theirs is no class."""
    count = (config.text_vocab_size or 0) - 1
    if path is None:
        return ClassLabels(ClassLabelsConfig(classes=tuple(map(str, range(count)))))
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {path}: cannot be read ({one_line(error)})") from None
    if len(names) != count:
        raise UserError(f"--classes {path}: has {len(names):,} lines, the transformer {count:,} classes; give one name a line")
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        same = first.setdefault(name.strip().casefold(), number)
        if same != number or not name.strip():
            what = f"'{name.strip()}' again (line {same})" if name.strip() else "empty"
            raise UserError(f"--classes {path}, line {number}: {what}; names must differ, also in lower case")
    return ClassLabels(ClassLabelsConfig(classes=tuple(name.strip() for name in names)))


def _text_encoder(weights: Mapping[str, Tensor], config: DecoderOnlyConfig, options: ConvertOptions) -> TextSource:
    """The frozen encoder with LlamaGen's padding and its learned features of no caption."""
    null = weights[NULL].clone()
    encoder = FrozenTextEncoder.load(options.text_encoder or "", config.text_length, padding="left", null_features=null)
    if encoder.feature_width != config.text_feature_width:
        raise UserError(f"--text-encoder {options.text_encoder}: its features are {encoder.feature_width} wide, those that the "
                        f"transformer reads {config.text_feature_width}; give the one that it was trained with (FLAN-T5 XL)")
    return encoder
