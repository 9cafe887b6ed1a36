"""min-dalle's files (https://github.com/kuprel/min-dalle): DALL-E mini or mega in PyTorch.

    its package's folder:  SRC/dalle_bart_mega/{encoder.pt, decoder.pt, vocab.json, merges.txt},
                           SRC/vqgan/detoker.pt
    or side by side:       SRC/{encoder, decoder, detoker}.pt, SRC/vocab.json, SRC/merges.txt

Names may end in _mini, as on the Hub. Its token loop begins with code 16383 and reads the first
16,384 logits; its VQGAN uses PyTorch's default epsilon in norms. Both are kept, so that images are
the same.
"""

# Axes: K codebook size, D length of a code vector

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.files.weight_choice import ChosenWeights
from inference.checkpoints.files.weight_sets import WeightsLayout
from inference.checkpoints.files.weights_file import read_weights
from inference.checkpoints.formats.bart import BartSource, bart_part, check_sizes, head_count
from inference.checkpoints.formats.vqgan_names import (
    CODEBOOK,
    NORM_GROUPS,
    VQGANShapes,
    codebook_rules,
    count_levels,
    quantizer_settings,
    taming_name,
    vqgan_part,
)
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart
from inference.sampling import SamplingParams
from seq2seq import BPETokenizer, BPETokenizerConfig
from tokenizer_image import VQGANConfig
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError

CODES = 2**14  # that its token loop draws from
PAD_ID = 1  # that its code takes for padding, whatever the vocabulary says
NORM_EPS = 1e-5  # PyTorch's default; taming's VQGAN has 1e-6
DEFAULTS = SamplingParams(guidance_scale=16.0, top_k=256, temperature=1.0)  # of its generate_image
LAYOUT = WeightsLayout(("embed_tokens.weight",))
DETOKENIZER_LAYOUT = WeightsLayout(("decoder.conv_in.weight",))
SIZES = ("dalle_bart_mega", "dalle_bart_mini")
_SUFFIXES = ("", "_mini")


class _Files(NamedTuple):
    encoder: Path
    decoder: Path
    vocab: Path
    merges: Path
    detokenizer: Path


def convert(source: Path, options: ConvertOptions) -> ConvertedModel:
    """The package's folder, one of its two sizes, or a folder (or its encoder.pt) of five files."""
    options.refuse_unread("min-dalle", "config", "weight_set")
    files = _find(source)
    encoder, decoder, detokenizer = _read(files, options.weight_set)
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.tensors.items()}
    weights |= {f"decoder.{name}": tensor for name, tensor in decoder.tensors.items()}
    bart = _bart_source(weights, files.decoder.parent, _heads(options.config))
    check_sizes(bart)
    transformer = bart_part(bart)

    text = _text_tokenizer(files, transformer, source)
    side = transformer.config.grid[0]
    image_tokenizer = detokenizer_part(detokenizer.tensors, side, files.detokenizer)
    notes = (*encoder.notes, *decoder.notes, *detokenizer.notes, *transformer.notes,
             "pictures come from codes only: min-dalle has no image encoder")
    return ConvertedModel(image_tokenizer, transformer, text, DEFAULTS, notes)


def _read(files: _Files, weight_set: str | None
          ) -> tuple[ChosenWeights, ChosenWeights, ChosenWeights]:
    """The weights of encoder, decoder and detokenizer: averages, or none of them one."""
    encoder = read_weights(files.encoder, LAYOUT, weight_set)
    decoder = read_weights(files.decoder, LAYOUT, weight_set)
    detokenizer = read_weights(files.detokenizer, DETOKENIZER_LAYOUT, weight_set)
    if encoder.is_average != decoder.is_average:
        raise UserError(f"{files.encoder.parent}: one of {files.encoder.name} and "
                        f"{files.decoder.name} holds an average and the other does not, and the "
                        "two belong together; give files of one kind of weights")
    return encoder, decoder, detokenizer


def _heads(config: Path | None) -> int | None:
    if config is None:
        return None
    heads = head_count(read_mapping(config), "attention_head_count", config)
    if heads is None:
        raise UserError(f"{config}: names no attention_head_count, all that is read of it; leave "
                        "--config out")
    return heads


def _bart_source(weights: Mapping[str, Tensor], where: Path, heads: int | None) -> BartSource:
    # without sizes yet, for its check of the matrix
    unsized = BartSource(weights, where, codebook_size=0, begin=0, heads=heads)
    rows = unsized.size("decoder.embed_tokens.weight", 0)
    codes = min(CODES, rows - 1)  # a model smaller than the published ones has fewer rows
    return BartSource(weights, where, codebook_size=codes, begin=codes - 1, heads=heads)


def _text_tokenizer(files: _Files, transformer: ConvertedPart, source: Path) -> BPETokenizer:
    config = BPETokenizerConfig.parse({
        "vocab_size": transformer.config.text_vocab_size,
        "text_length": transformer.config.text_length, "splitting": "spaces"}, str(source))
    tokenizer = BPETokenizer.from_files(files.vocab, files.merges, config)
    if tokenizer.pad_id != PAD_ID:
        raise UserError(f"{files.vocab}: <pad> is {tokenizer.pad_id}, and min-dalle takes {PAD_ID} "
                        "for padding; give its own file")
    return tokenizer


def detokenizer_part(weights: Mapping[str, Tensor], side: int, where: Path) -> ConvertedPart:
    """A VQGAN without an encoder, for a code grid of `side` rows."""
    weights = dict(weights)
    # min-dalle keeps the codebook outside a quantizer, whose search it never needs
    if "embedding.weight" in weights:
        weights[CODEBOOK] = weights.pop("embedding.weight")
    levels = count_levels(weights, r"decoder\.up\.(\d+)\.", where)
    shapes = VQGANShapes(weights, taming_name, levels, where)

    # everything by the decoder: VQGANShapes.config reads the encoder, which is not in the file
    pixels, channels = shapes.shape("decoder.conv_out.weight")[:2]
    codes, length = shapes.code_shape()
    resolution = side << (levels - 1)  # every level but the coarsest doubles the side
    config = VQGANConfig.parse({
        "resolution": resolution, "in_channels": pixels, "channels": channels,
        "channel_multipliers": shapes.multipliers("decoder.up", channels, "last"),
        # a level of the decoder has one more than the config says
        "num_res_blocks": shapes.count("decoder.up.0.block.{}.conv1.weight") - 1,
        "attention_resolutions": shapes.attention_resolutions("decoder.up", resolution),
        "mid_attention": shapes.has("decoder.mid.attn_1.q.weight"),
        "norm_groups": NORM_GROUPS, "norm_eps": NORM_EPS,
        "z_channels": shapes.shape("decoder.conv_in.weight")[1], "embed_dim": length,
        # unit: VQGAN-jax was trained on pixels in [0, 1]
        "codebook_size": codes, "output_range": "unit", "has_encoder": False,
        "quantizer": quantizer_settings(l2_normalize=False)}, f"{where}: the shapes say")
    return vqgan_part(config, weights, taming_name, codebook_rules(), where)


def _find(source: Path) -> _Files:
    """The five files. MissingFileError naming the first that is not there."""
    if source.is_file():
        for suffix in _SUFFIXES:
            if source.name == f"encoder{suffix}.pt":
                return _in_folder(source.parent, suffix)
        raise UserError(f"{source}: give the folder of min-dalle's files, or its encoder.pt")

    sizes = [source / name for name in SIZES if (source / name).is_dir()]
    if len(sizes) > 1:
        raise UserError(f"{source}: holds both sizes; give one of them, "
                        f"{' or '.join(map(str, sizes))}")
    folder = sizes[0] if sizes else source
    suffixes = [suffix for suffix in _SUFFIXES if (folder / f"encoder{suffix}.pt").is_file()]
    if len(suffixes) > 1:
        raise UserError(f"{folder}: holds both sizes; give one of them by "
                        "its file, encoder.pt or encoder_mini.pt")
    return _in_folder(folder, suffixes[0] if suffixes else "")


def _in_folder(folder: Path, suffix: str) -> _Files:
    # one detokenizer serves both sizes: it lies beside their folders
    folders = (folder, folder / "vqgan", folder.parent / "vqgan")
    detokenizers = [place / "detoker.pt" for place in folders]
    there = [path for path in detokenizers if path.is_file()]
    files = _Files(
        encoder=folder / f"encoder{suffix}.pt", decoder=folder / f"decoder{suffix}.pt",
        vocab=folder / f"vocab{suffix}.json", merges=folder / f"merges{suffix}.txt",
        detokenizer=there[0] if there else detokenizers[0])
    for path in files:
        if not path.is_file():
            raise MissingFileError(f"{path}: missing; min-dalle's encoder, decoder, detoker (.pt), "
                                   "vocab.json and merges.txt belong together")
    return files
