"""DALL-E mini and mega as https://github.com/borisdayma/dalle-mini publishes them, in Flax.

Layers are one stack with a leading axis (Flax's scan), or numbered. The image tokenizer is a
repository of its own (VQGAN-jax), given as --image-tokenizer.
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

DEFAULTS = SamplingParams(guidance_scale=10.0, top_k=0, temperature=1.0)  # of its notebook
EXPECTED: dict[str, Any] = {
    "activation_function": "gelu", "ln_type": "layernorm", "ln_positions": "normformer",
    "use_glu": True, "use_bias": False, "scale_embedding": False, "tie_word_embeddings": False,
    "use_head_scale": False, "use_cosine_attention": False, "use_deepnet_scaling": False,
    "use_swin_position_embeddings": False, "use_absolute_position_embeddings": True,
    "use_alibi": False, "sinkhorn_iters": 1, "use_final_ln_encoder": True,
    "use_final_ln_decoder": True}
"""Options of its code that change the network, as every published model has them."""
MAX_LAYERS = 512  # a claim of more in a stack is a hostile file; mega has 24

_LAYER = re.compile(r"model\.(encoder|decoder)\.layers\."
                    r"FlaxBart(?:En|De)coderLayer(?:s|_(\d{1,4}))\.(.+)")
# Flax numbers modules of one class in the order in which a layer's code calls them
_BLOCKS = {
    "LayerNorm_0": "pre_self_attn_layer_norm", "FlaxBartAttention_0": "self_attn",
    "LayerNorm_1": "self_attn_layer_norm", "LayerNorm_2": "pre_encoder_attn_layer_norm",
    "FlaxBartAttention_1": "encoder_attn", "LayerNorm_3": "encoder_attn_layer_norm", "GLU_0": "glu"}
_GLU = {"LayerNorm_0": "ln0", "LayerNorm_1": "ln1",
        "Dense_0": "fc0", "Dense_1": "fc1", "Dense_2": "fc2"}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def convert(source: Path, options: ConvertOptions) -> ConvertedModel:
    """A folder with flax_model.msgpack, config.json and the text tokenizer's files."""
    options.refuse_unread("dalle-mini", "config", "image_tokenizer")
    path = vqgan_jax.flax_weights(source)
    config_path = options.config or path.with_name("config.json")
    config = _read_config(config_path)
    image_tokenizer = _image_tokenizer(options.image_tokenizer, path)  # before gigabytes are read
    weights = min_dalle_tensors(read_msgpack(path), path)

    # the row after the image vocabulary, unless the config says otherwise, as in its own code
    begin = config.get("decoder_start_token_id", config.get("image_vocab_size"))
    if type(begin) is not int or begin < 0:
        raise UserError(f"{config_path}: decoder_start_token_id {begin!r}: expected the row that a "
                        "picture begins with")
    codes = _codebook_size(image_tokenizer)
    heads = head_count(config, "encoder_attention_heads", config_path)
    bart = BartSource(weights, path, codes, begin, heads)
    check_sizes(bart)
    transformer = bart_part(bart)

    text, text_notes = _text_tokenizer(path.parent, config, transformer)
    image_notes = image_tokenizer.notes if isinstance(image_tokenizer, ConvertedPart) else ()
    notes = (*transformer.notes, *image_notes, *text_notes)
    return ConvertedModel(image_tokenizer, transformer, text, DEFAULTS, notes)


def _read_config(path: Path) -> dict[str, Any]:
    """Read config.json. UserError for a variant that no published model uses."""
    if not path.is_file():
        raise MissingFileError(f"{path}: missing; it says how many heads there are and where "
                               "pictures begin (--config FILE)")
    config = read_mapping(path)
    for name, expected in EXPECTED.items():
        if config.get(name, expected) != expected:
            raise UserError(f"{path}: {name} {config[name]!r} is not converted; published models "
                            f"have {expected!r}")
    # our config has one number of heads and one multiplier for both sides
    for name in ("attention_heads", "ffn_dim"):
        encoder, decoder = config.get(f"encoder_{name}"), config.get(f"decoder_{name}")
        if encoder != decoder:
            raise UserError(f"{path}: encoder_{name} {encoder} and decoder_{name} {decoder} "
                            "differ, which is not converted")
    return config


def _image_tokenizer(folder: Path | None, where: Path) -> ConvertedPart | ImageTokenizer:
    """The image tokenizer: converted from VQGAN-jax's folder, or loaded from one of ours."""
    if folder is None:
        raise UserError(f"{where}: has no image tokenizer in it; give VQGAN-jax's folder, or a "
                        "converted one, as --image-tokenizer DIR")
    if (folder / vqgan_jax.FLAX_WEIGHTS_NAME).is_file():
        return vqgan_jax.convert(folder, ConvertOptions())
    return load_tokenizer(folder)


def _codebook_size(image_tokenizer: ConvertedPart | ImageTokenizer) -> int:
    if isinstance(image_tokenizer, ConvertedPart):
        return image_tokenizer.config.codebook_size
    return image_tokenizer.codebook_size


def min_dalle_tensors(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Views under min-dalle's names in torch's axis order. UserError if two get one name."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for new_name, view in _named(name.removeprefix("params."), tensor, where):
            if new_name in renamed:
                raise UserError(f"{where}: holds {new_name} twice, in a stack "
                                "of layers and by itself")
            renamed[new_name] = view
    return renamed


def _named(name: str, tensor: Tensor, where: Path) -> Iterator[tuple[str, Tensor]]:
    """(min-dalle's name, tensor) for a Flax tensor; one for each layer of a stack."""
    match = _LAYER.fullmatch(name)
    leaf = name.rpartition(".")[2]
    if match is None:
        module = name.rpartition(".")[0]
        if module == "lm_head":  # beside the model in Flax, within the decoder in min-dalle
            module = "decoder.lm_head"
        module = module.removeprefix("model.")
        yield f"{module}.{_LEAVES.get(leaf, leaf)}", _torch_order(tensor, leaf)
        return

    side, number = match[1], match[2]
    block, *inner = match[3].split(".")
    inner = [_GLU.get(part, part) for part in inner[:-1]]
    rest = ".".join([_BLOCKS.get(block, block), *inner, _LEAVES.get(leaf, leaf)])
    if number is not None:  # numbered layers; else a stack with the layers as first axis
        yield f"{side}.layers.{int(number)}.{rest}", _torch_order(tensor, leaf)
        return
    if tensor.ndim == 0 or len(tensor) > MAX_LAYERS:
        raise UserError(f"{where}: {name} is of shape {list(tensor.shape)}, "
                        "expected a stack of layers")
    for layer, view in enumerate(tensor):  # views: the stack stays mapped
        yield f"{side}.layers.{layer}.{rest}", _torch_order(view, leaf)


def _torch_order(tensor: Tensor, leaf: str) -> Tensor:
    """Flax stores the matrix of a linear layer as [in, out], torch as [out, in]."""
    return tensor.t() if leaf == "kernel" and tensor.ndim == 2 else tensor


def _text_tokenizer(folder: Path, config: Mapping[str, Any], transformer: ConvertedPart
                    ) -> tuple[BPETokenizer, tuple[str, ...]]:
    """The text tokenizer, from vocab.json and merges.txt or from tokenizer.json, and notes."""
    json_path = folder / "tokenizer.json"
    tokenizer = _read_tokenizer_json(json_path) if json_path.is_file() else None
    normalizers = set() if tokenizer is None else _normalizer_types(tokenizer.get("normalizer"))
    # its TextNormalizer returns lower case with a space before it; the rest is not imitated
    normalize = bool(config.get("normalize_text", False))
    # assumed without a tokenizer.json: DALL-E mini's text normalisation lowers the case
    lowercase = normalize or tokenizer is None or "Lowercase" in normalizers
    ours = BPETokenizerConfig.parse({
        "vocab_size": transformer.config.text_vocab_size,
        "text_length": transformer.config.text_length,
        "splitting": "bytes", "lowercase": lowercase, "prefix_space": normalize}, str(folder))

    notes = []
    if normalize:
        notes.append("captions in lower case and with a space before them, but without the rest "
                     "of DALL-E mini's TextNormalizer (hashtags, numbers, punctuation)")
    ignored = sorted(normalizers - {"Lowercase", "Sequence"})
    if ignored:
        notes.append(f"{json_path}: its normalizer {', '.join(ignored)} is not applied")

    # tokenizer.json holds the same vocabulary and merges in the fast tokenizers' format
    vocab, merges = folder / VOCAB_NAME, folder / MERGES_NAME
    if vocab.is_file() and merges.is_file():
        return BPETokenizer.from_files(vocab, merges, ours), tuple(notes)
    if tokenizer is None:
        raise MissingFileError(f"{folder}: no {VOCAB_NAME} with {MERGES_NAME}, and no "
                               "tokenizer.json; the text tokenizer is missing")
    try:
        return BPETokenizer(*_vocab_and_merges(tokenizer, json_path), ours), tuple(notes)
    except UserError as error:
        raise UserError(f"{json_path}: {error}") from None


def _read_tokenizer_json(path: Path) -> dict[str, Any]:
    try:
        tokenizer = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)[:200]}") from None
    if not isinstance(tokenizer, dict):
        raise UserError(f"{path}: expected a mapping, found {type(tokenizer).__name__}")
    return tokenizer


def _normalizer_types(normalizer: Any) -> set[str]:
    """The types of a normalizer of the tokenizers library, and of those inside a sequence."""
    if not isinstance(normalizer, dict):
        return set()
    parts = [normalizer]
    if isinstance(normalizer.get("normalizers"), list):
        parts += normalizer["normalizers"]
    return {str(part.get("type")) for part in parts if isinstance(part, dict)}


def _vocab_and_merges(tokenizer: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """The text of vocab.json and of merges.txt that a tokenizer.json amounts to."""
    try:
        model = tokenizer["model"]
        added = tokenizer.get("added_tokens") or []
        # special tokens such as <pad> may stand among the added ones only
        special = {str(token["content"]): token["id"] for token in added}
        vocab = {**model["vocab"], **special}
        # newer releases of the tokenizers library write a merge as a list of its two sides
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer of byte-pair encoding "
                        f"({one_line(error)[:100]})") from None
    return json.dumps(vocab, ensure_ascii=False), "\n".join([f"{HEADER}: 0.2", *merges, ""])
