"""LlamaGen's transformers, of classes and of text (https://arxiv.org/abs/2406.06525).

A file holds weights only. Their shapes imply everything but the number of heads, which the
published sizes have by layers and width, and the grid, which is the image tokenizer's.
"""

# Axes: D width, I inner width of the feed-forward, T text slots, F width of features

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.files.weight_sets import WeightsLayout
from inference.checkpoints.files.weights_file import find_weights, read_weights
from inference.checkpoints.formats.llamagen_settings import ModelArgs, choose_grid, read_classes
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart, Rule, multiplier, tensor_names
from inference.sampling import SamplingParams
from seq2seq import DecoderOnly, DecoderOnlyConfig, FrozenTextEncoder, TextSource
from seq2seq.presets import LLAMAGEN, LLAMAGEN_HEADS
from tokenizer_image import ImageTokenizer, load_tokenizer
from tokenloom_common.errors import UserError

# containers with DistributedDataParallel, DeepSpeed, Lightning; FSDP has none. LlamaGen's sampling
# scripts take `model` even where its trainer kept an average beside it
LAYOUT = WeightsLayout(("tok_embeddings.weight",), containers=("model", "module", "state_dict"),
                       prefers_average=False)
STEMS = ("model", "pytorch_model", "consolidated")
CLASSES = "cls_embedding.embedding_table.weight"
NULL = "cls_embedding.uncond_embedding"  # [T, F], learned features of no caption
IGNORED = ("*freqs_cis", "*causal_mask", "*kv_cache*")  # buffers that follow from the shape

_OUTSIDE_LAYERS = {
    "image_embedding.weight": "tok_embeddings.weight", "to_logits.weight": "output.weight",
    "decoder.final_norm.weight": "norm.weight", "text_input.embedding.weight": CLASSES,
    "text_input.embedding.0.weight": "cls_embedding.cap_proj.fc1.weight",
    "text_input.embedding.2.weight": "cls_embedding.cap_proj.fc2.weight"}
"""Our names -> LlamaGen's."""
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_ATTENTION = {"0.0.weight": "attention_norm.weight", "1.to_out.weight": "attention.wo.weight"}
_FEEDFORWARD = {"0.0.weight": "ffn_norm.weight", "1.ff.2.weight": "feed_forward.w2.weight"}
"""Our names in a layer's two blocks -> LlamaGen's, for matrices that are the same."""

SAMPLING = {"classes": SamplingParams(guidance_scale=4.0, top_k=2000),
            "text": SamplingParams(guidance_scale=7.5, top_k=1000)}
"""Settings of its sampling scripts."""
CAPTIONS_NOTE = ("captions are read as they are given; LlamaGen's script lowers their case and "
                 "takes out links, tags and some punctuation first")


def convert(source: Path, options: ConvertOptions) -> ConvertedPart | ConvertedModel:
    """A file, or the folder of its Hub wrapper.

    A whole model if an image tokenizer (for text, and a text encoder) is given, else the
    transformer alone.
    """
    options.refuse_unread("llamagen-gpt", "config", "resolution", "image_tokenizer", "text_encoder",
                          "classes", "weight_set")
    path = source
    if source.is_dir():
        path = find_weights(source, STEMS, "LlamaGen's transformer")
    chosen = read_weights(path, LAYOUT, options.weight_set)
    weights = chosen.tensors
    of_text = CLASSES not in weights
    # a file of another project has neither, and would fail later with a long list of names
    if of_text and NULL not in weights:
        raise UserError(f"{path}: holds neither {CLASSES} nor {NULL}, so it is not a whole "
                        "transformer of LlamaGen's")
    _check_options(options, of_text, path)

    args = ModelArgs.of(source, options.config)
    tokenizer = None if options.image_tokenizer is None else load_tokenizer(options.image_tokenizer)
    grid, grid_notes = choose_grid(tokenizer, args, options, path)
    part = _transformer(weights, _config(weights, args, grid, path), path,
                        (*chosen.notes, *grid_notes))
    # a transformer alone is useful too: as --init_from of a run
    if tokenizer is None:
        return _alone(part, "--image-tokenizer", of_text)
    if of_text and options.text_encoder is None:
        return _alone(part, "--text-encoder", of_text)

    part.check()  # before a text encoder of gigabytes is loaded
    if of_text:
        text: TextSource = _text_encoder(weights, part.config, options)
    else:
        count = part.config.text_vocab_size - 1  # the last row is no class
        text = read_classes(options.classes, count)
    _check_codes(tokenizer, part.config, options, path)
    if of_text:
        return ConvertedModel(tokenizer, part, text, SAMPLING["text"], (*part.notes, CAPTIONS_NOTE))
    return ConvertedModel(tokenizer, part, text, SAMPLING["classes"], part.notes)


def _check_options(options: ConvertOptions, of_text: bool, path: Path) -> None:
    if of_text and options.classes is not None:
        raise UserError(f"{path}: draws from text, not from classes; leave --classes out")
    if not of_text and options.text_encoder is not None:
        raise UserError(f"{path}: draws from classes, not from text; leave --text-encoder out")


def _check_codes(tokenizer: ImageTokenizer, config: DecoderOnlyConfig, options: ConvertOptions,
                 path: Path) -> None:
    # the grid is compared too, but choose_grid has taken it from this very tokenizer
    if (tokenizer.codebook_size, tuple(tokenizer.grid)) != (config.codebook_size, config.grid):
        raise UserError(f"{options.image_tokenizer}: has {tokenizer.codebook_size} codes, "
                        f"{path.name} draws {config.codebook_size}; give the image tokenizer that "
                        "it was trained with")


def _config(weights: Mapping[str, Tensor], args: ModelArgs, grid: tuple[int, int], path: Path
            ) -> DecoderOnlyConfig:
    """The config that the shapes imply. UserError where `args` state other ones."""
    vocabulary, width = _shape(weights, "tok_embeddings.weight", path)
    layers = _count_layers(weights)
    heads = _head_count(args, layers, width, path)
    head_dim = width // heads
    # rows of queries (the width), and of keys and values (kv_heads * head_dim each)
    qkv_rows, _ = _shape(weights, "layers.0.attention.wqkv.weight", path)
    kv_heads = max(1, (qkv_rows - width) // (2 * head_dim))  # too few rows: mis-shaped later
    inner, _ = _shape(weights, "layers.0.feed_forward.w1.weight", path)

    text: dict[str, Any]
    if CLASSES in weights:
        # the last class is the null class of guidance
        text = {"text_vocab_size": _shape(weights, CLASSES, path)[0], "text_length": 1}
    else:
        length, feature_width = _shape(weights, NULL, path)
        text = {"text_feature_width": feature_width, "text_length": length}

    args.compare({"dim": width, "n_layer": layers, "n_kv_head": kv_heads, "vocab_size": vocabulary,
                  "cls_token_num": text["text_length"]}, path)
    shared = {name: value for name, value in LLAMAGEN.items() if name != "kind"}
    return DecoderOnlyConfig.parse({
        **shared, **text, "norm_eps": args.norm_eps, "layers": layers, "width": width,
        # None, the default: as many as heads, so that the config equals the preset's
        "heads": heads, "head_dim": head_dim, "kv_heads": None if kv_heads == heads else kv_heads,
        "feedforward_multiplier": multiplier(inner, width), "codebook_size": vocabulary,
        "grid": grid}, f"{path}: the shapes say")


def _count_layers(weights: Mapping[str, Tensor]) -> int:
    # the highest number counts: a layer that is missing below it is listed by its tensors
    matches = (re.match(r"layers\.(\d{1,4})\.", name) for name in weights)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _head_count(args: ModelArgs, layers: int, width: int, path: Path) -> int:
    heads = args.n_head or LLAMAGEN_HEADS.get((layers, width))
    if heads is None:
        raise UserError(f"{path}: {layers} layers of width {width} are no published size, so its "
                        "heads are not known; give --config FILE with n_head")
    if heads < 1 or width % heads:
        raise UserError(f"{path}: {heads} heads do not divide its width {width}")
    return heads


def _shape(weights: Mapping[str, Tensor], name: str, path: Path) -> tuple[int, int]:
    """Shape of a matrix. UserError if it is missing or is no matrix."""
    if name not in weights:
        raise UserError(f"{path}: lacks {name}, so it is not a whole transformer of LlamaGen's")
    shape = tuple(weights[name].shape)
    if len(shape) != 2 or min(shape) < 1:
        raise UserError(f"{path}: {name} is of shape {list(shape)}, expected a matrix")
    return shape[0], shape[1]


def _transformer(weights: Mapping[str, Tensor], config: DecoderOnlyConfig, path: Path,
                 notes: tuple[str, ...]) -> ConvertedPart:
    ignored: tuple[str, ...] = IGNORED
    if config.text_feature_width is not None:
        ignored = (*IGNORED, NULL)  # it goes into the text encoder's folder
    rules = {name: rule_of(name, config) for name in tensor_names(DecoderOnly, config)}
    return ConvertedPart(DecoderOnly, config, rules, weights, path, ignored, notes)


def rule_of(name: str, config: DecoderOnlyConfig) -> Rule:
    """The rule for our tensor `name`."""
    match = _LAYER.match(name)
    if match is None:
        return Rule((_OUTSIDE_LAYERS[name],))

    # x-transformers counts attention and feed-forward as a layer each
    layer, is_feedforward = divmod(int(match[1]), 2)  # odd numbers are feed-forwards
    prefix, rest = f"layers.{layer}.", match[2]
    if is_feedforward:
        return _feedforward_rule(prefix, rest)
    if rest in _ATTENTION:
        return Rule((prefix + _ATTENTION[rest],))

    # one matrix of LlamaGen's holds the rows of our queries, keys and values
    kv_rows = (config.kv_heads or config.heads) * config.head_dim
    sizes = [config.width, kv_rows, kv_rows]
    which = ("1.to_q.weight", "1.to_k.weight", "1.to_v.weight").index(rest)
    return Rule((f"{prefix}attention.wqkv.weight",), lambda qkv: torch.split(qkv, sizes)[which])


def _feedforward_rule(prefix: str, rest: str) -> Rule:
    if rest in _FEEDFORWARD:
        return Rule((prefix + _FEEDFORWARD[rest],))
    assert rest == "1.ff.0.proj.weight", rest
    # our GLU passes the second half through SiLU, LlamaGen the output of w1
    return Rule((f"{prefix}feed_forward.w3.weight", f"{prefix}feed_forward.w1.weight"), _stacked)


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """Two of [I, D] -> [2 I, D]."""
    if first.shape != second.shape:  # torch.cat takes two of different heights
        raise ValueError("of different shapes")
    return torch.cat([first, second])


def _alone(part: ConvertedPart, lacking: str, of_text: bool) -> ConvertedPart:
    """The transformer without its text source and image tokenizer."""
    notes = [*part.notes, f"without {lacking} this is a transformer alone, which cannot be sampled "
                          "from"]
    if of_text:
        notes.append(f"{NULL}, the features of no caption for guidance, is kept with a text "
                     "encoder only (--text-encoder)")
    return replace(part, notes=tuple(notes))


def _text_encoder(weights: Mapping[str, Tensor], config: DecoderOnlyConfig, options: ConvertOptions
                  ) -> TextSource:
    """The frozen text encoder with LlamaGen's padding and its learned features of no caption."""
    null = weights[NULL].clone()  # [T, F], kept without the mapped file
    encoder = FrozenTextEncoder.load(options.text_encoder or "", config.text_length,
                                     padding="left", null_features=null)
    if encoder.feature_width != config.text_feature_width:
        raise UserError(f"--text-encoder {options.text_encoder}: its features are "
                        f"{encoder.feature_width} wide, those that the transformer reads "
                        f"{config.text_feature_width}; give the one that it was trained with "
                        "(FLAN-T5 XL)")
    return encoder
