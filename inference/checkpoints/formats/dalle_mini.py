"""DALL-E mini and mega as https://github.com/borisdayma/dalle-mini publishes them: flax_model.msgpack with its config.json.

Layers are one stack with a leading axis (Flax's scan), or numbered. The image tokenizer is a repository of its own
(VQGAN-jax), as --image-tokenizer.
"""

# Axes: K codebook size

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.files.msgpack_file import read_msgpack
from inference.checkpoints.formats import vqgan_jax
from inference.checkpoints.formats.bart import BartSource, bart_part, check_sizes, head_count
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart
from inference.sampling import SamplingParams
from seq2seq import BPETokenizer, BPETokenizerConfig
from seq2seq.bpe_tokenizer import HEADER, MERGES_NAME, VOCAB_NAME, read_text
from tokenizer_image import ImageTokenizer, load_tokenizer
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError, one_line

DEFAULTS = SamplingParams(guidance_scale=10.0, top_k=0, temperature=1.0)  # of the project's inference notebook
EXPECTED: dict[str, Any] = {
    "activation_function": "gelu", "ln_type": "layernorm", "ln_positions": "normformer", "use_glu": True, "use_bias": False,
    "scale_embedding": False, "tie_word_embeddings": False, "use_head_scale": False, "use_cosine_attention": False,
    "use_deepnet_scaling": False, "use_swin_position_embeddings": False, "use_absolute_position_embeddings": True,
    "use_alibi": False, "sinkhorn_iters": 1, "use_final_ln_encoder": True, "use_final_ln_decoder": True}
"""What its code can do otherwise and no published model does."""

_LAYER = re.compile(r"model\.(encoder|decoder)\.layers\.FlaxBart(?:En|De)coderLayer(?:s|_(\d{1,4}))\.(.+)")
_PARTS = {
    "LayerNorm_0": "pre_self_attn_layer_norm", "LayerNorm_1": "self_attn_layer_norm", "FlaxBartAttention_0": "self_attn",
    "LayerNorm_2": "pre_encoder_attn_layer_norm", "LayerNorm_3": "encoder_attn_layer_norm",
    "FlaxBartAttention_1": "encoder_attn", "GLU_0": "glu"}
_GLU = {"LayerNorm_0": "ln0", "LayerNorm_1": "ln1", "Dense_0": "fc0", "Dense_1": "fc1", "Dense_2": "fc2"}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def convert(source: Path, options: ConvertOptions) -> ConvertedModel:
    """A folder with flax_model.msgpack, config.json, and vocab.json and merges.txt or tokenizer.json."""
    options.only("dalle-mini", "config", "image_tokenizer")
    path = vqgan_jax.flax_weights(source)
    settings = options.config or path.with_name("config.json")
    said = _settings(settings)
    image_tokenizer, codes = _image_tokenizer(options.image_tokenizer, path)
    weights = min_dalle_tensors(read_msgpack(path), path)
    begin = said.get("decoder_start_token_id", said.get("image_vocab_size"))
    if type(begin) is not int or begin < 0:
        raise UserError(f"{settings}: decoder_start_token_id {begin!r}: expected the row that a picture begins with")
    bart = BartSource(weights, path, codes, begin, head_count(said, "encoder_attention_heads", settings))
    check_sizes(bart)
    part = bart_part(bart)
    text, notes = _text_tokenizer(path.parent, said, part.config.text_vocab_size, part.config.text_length)
    pictures = image_tokenizer.notes if isinstance(image_tokenizer, ConvertedPart) else ()
    return ConvertedModel(image_tokenizer, part, text, DEFAULTS, (*part.notes, *pictures, *notes))


def _settings(path: Path) -> dict[str, Any]:
    """config.json. UserError for a variant that no published model uses."""
    if not path.is_file():
        raise MissingFileError(f"{path}: missing; it says how many heads there are and where pictures begin (--config FILE)")
    said = read_mapping(path)
    for name, expected in EXPECTED.items():
        if said.get(name, expected) != expected:
            raise UserError(f"{path}: {name} {said[name]!r} is not converted; published models have {expected!r}")
    for name in ("attention_heads", "ffn_dim"):
        sides = said.get(f"encoder_{name}"), said.get(f"decoder_{name}")
        if sides[0] != sides[1]:
            raise UserError(f"{path}: encoder_{name} {sides[0]} and decoder_{name} {sides[1]} differ, which is not converted")
    return said


def _image_tokenizer(folder: Path | None, where: Path) -> tuple[ConvertedPart | ImageTokenizer, int]:
    """The image tokenizer and how many codes it has."""
    if folder is None:
        raise UserError(f"{where}: has no image tokenizer in it; give VQGAN-jax's folder, or a converted one, as "
                        "--image-tokenizer DIR")
    if (folder / vqgan_jax.WEIGHTS_NAME).is_file():
        part = vqgan_jax.convert(folder, ConvertOptions())
        return part, part.config.codebook_size
    loaded = load_tokenizer(folder)
    return loaded, loaded.codebook_size


def min_dalle_tensors(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Under min-dalle's names, as torch lays them out, layer by layer; views. UserError where two would get one name."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for plain, view in _named(name.removeprefix("params."), tensor, where):
            if plain in found:
                raise UserError(f"{where}: holds {plain} twice, in a stack of layers and by itself")
            found[plain] = view
    return found


def _named(name: str, tensor: Tensor, where: Path) -> Iterator[tuple[str, Tensor]]:
    place, _, leaf = name.rpartition(".")
    match = _LAYER.fullmatch(name)
    if match is None:
        place = "decoder.lm_head" if place == "lm_head" else place.removeprefix("model.")
        yield f"{place}.{_LEAVES.get(leaf, leaf)}", tensor.t() if leaf == "kernel" and tensor.ndim == 2 else tensor
        return
    parts = match[3].split(".")
    names = [_PARTS.get(parts[0], parts[0]), *(_GLU.get(part, part) for part in parts[1:-1]), _LEAVES.get(leaf, leaf)]
    if match[2] is None and (tensor.ndim == 0 or len(tensor) > 512):
        raise UserError(f"{where}: {name} is of shape {list(tensor.shape)}, expected a stack of layers")
    layers = enumerate(tensor) if match[2] is None else [(int(match[2]), tensor)]
    for number, layer in layers:
        yield (f"{match[1]}.layers.{number}.{'.'.join(names)}",
               layer.t() if leaf == "kernel" and layer.ndim == 2 else layer)


def _text_tokenizer(folder: Path, said: Mapping[str, Any], rows: int, length: int) -> tuple[BPETokenizer, tuple[str, ...]]:
    """The text tokenizer, and what a user should know of it."""
    written = folder / "tokenizer.json"
    tokenizer = _tokenizer_json(written) if written.is_file() else None
    normalize = bool(said.get("normalize_text", False))
    normalizers = set() if tokenizer is None else _types(tokenizer.get("normalizer"))
    lowers = normalize or tokenizer is None or "Lowercase" in normalizers
    config = BPETokenizerConfig.parse({"vocab_size": rows, "text_length": length, "splitting": "bytes", "lowercase": lowers,
                                       "prefix_space": normalize}, str(folder))
    notes: tuple[str, ...] = ()
    if normalize:
        notes = ("captions in lower case and with a space before them, but without the rest of DALL-E mini's TextNormalizer "
                 "(hashtags, numbers, punctuation)",)
    others = sorted(normalizers - {"Lowercase", "Sequence"})
    if others:
        notes += (f"{written}: its normalizer {', '.join(others)} is not applied",)
    vocab, merges = folder / VOCAB_NAME, folder / MERGES_NAME
    if vocab.is_file() and merges.is_file():
        return BPETokenizer.from_files(vocab, merges, config), notes
    if tokenizer is None:
        raise MissingFileError(f"{folder}: no {VOCAB_NAME} with {MERGES_NAME}, and no tokenizer.json; the text tokenizer is "
                               "missing")
    try:
        return BPETokenizer(*_vocab_and_merges(tokenizer, written), config), notes
    except UserError as error:
        raise UserError(f"{written}: {error}") from None


def _tokenizer_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)[:200]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a mapping, found {type(found).__name__}")
    return found


def _types(normalizer: Any) -> set[str]:
    """The types of a normalizer of tokenizers, those of a sequence included."""
    if not isinstance(normalizer, dict):
        return set()
    inner = normalizer.get("normalizers")
    parts = [normalizer, *(inner if isinstance(inner, list) else [])]
    return {str(part.get("type")) for part in parts if isinstance(part, dict)}


def _vocab_and_merges(tokenizer: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """The contents of vocab.json and merges.txt, out of tokenizer.json."""
    try:
        vocab = {**tokenizer["model"]["vocab"],
                 **{str(token["content"]): token["id"] for token in tokenizer.get("added_tokens") or []}}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer of byte-pair encoding ({one_line(error)[:100]})") from None
    return json.dumps(vocab, ensure_ascii=False), "\n".join([f"{HEADER}: 0.2", *merges, ""])
