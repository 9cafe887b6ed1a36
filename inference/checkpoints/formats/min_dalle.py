"""min-dalle's files (https://github.com/kuprel/min-dalle): DALL-E mini or mega in PyTorch, with the VQGAN's decoder.

    SRC/dalle_bart_mega/{encoder.pt, decoder.pt, vocab.json, merges.txt}, SRC/vqgan/detoker.pt    as its package keeps them
    SRC/{encoder, decoder, detoker}.pt, SRC/vocab.json, SRC/merges.txt                            or side by side

Names may end in _mini, as on the Hub. Its token loop begins with code 16383 and reads the first 16,384 logits; its VQGAN
norms with PyTorch's epsilon. Both are kept, so that pictures are the same.
"""

# Axes: K codebook size, D length of a code vector

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.files.weights_file import read_weights
from inference.checkpoints.formats.bart import BartSource, bart_part, check_sizes, head_count
from inference.checkpoints.formats.vqgan_names import (
    CODEBOOK,
    NORM_GROUPS,
    Inferred,
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

CODES = 2**14  # that its loop draws from
PAD_ID = 1  # that its models take for padding, whatever the vocabulary says
DEFAULTS = SamplingParams(guidance_scale=16.0, top_k=256, temperature=1.0)  # of its generate_image
_SUFFIXES = ("", "_mini")
SIZES = ("dalle_bart_mega", "dalle_bart_mini")


class _Files(NamedTuple):
    encoder: Path
    decoder: Path
    vocab: Path
    merges: Path
    detokenizer: Path


def convert(source: Path, options: ConvertOptions) -> ConvertedModel:
    """The package's folder of models, one of its two sizes, or a folder (or its encoder.pt) with the five files."""
    options.only("min-dalle", "config")
    files = _find(source)
    weights = {f"{side}.{name}": tensor for side, path in (("encoder", files.encoder), ("decoder", files.decoder))
               for name, tensor in read_weights(path).items()}
    heads = None
    if options.config:
        heads = head_count(read_mapping(options.config), "attention_head_count", options.config)
        if heads is None:
            raise UserError(f"{options.config}: names no attention_head_count, all that is read of it; leave --config out")
    rows = BartSource(weights, files.decoder.parent, 0, 0).size("decoder.embed_tokens.weight", 0)
    codes = min(CODES, rows - 1)
    bart = BartSource(weights, files.decoder.parent, codes, codes - 1, heads)
    check_sizes(bart)
    part = bart_part(bart)
    spaces = BPETokenizerConfig.parse({"vocab_size": part.config.text_vocab_size, "text_length": part.config.text_length,
                                       "splitting": "spaces"}, str(source))
    text = BPETokenizer.from_files(files.vocab, files.merges, spaces)
    if text.pad_id != PAD_ID:
        raise UserError(f"{files.vocab}: <pad> is {text.pad_id}, and min-dalle takes {PAD_ID} for padding; give its own file")
    detokenizer = detokenizer_part(read_weights(files.detokenizer), part.config.grid[0], files.detokenizer)
    notes = (*part.notes, "pictures come from codes only: min-dalle has no image encoder")
    return ConvertedModel(detokenizer, part, text, DEFAULTS, notes)


def detokenizer_part(weights: Mapping[str, Tensor], side: int, where: Path) -> ConvertedPart:
    """A VQGAN without an encoder, for a code grid of `side` rows."""
    weights = {f"quantize.{name}" if name == "embedding.weight" else name: tensor for name, tensor in weights.items()}
    levels = count_levels(weights, r"decoder\.up\.(\d+)\.", where)
    found = Inferred(weights, taming_name, levels, where)
    widths = [found.shape(f"decoder.up.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    pixels, channels = found.shape("decoder.conv_out.weight")[:2]
    if any(width % channels for width in widths):
        raise UserError(f"{where}: levels of {widths} channels are no multiples of the last convolution's {channels}")
    codes, length = found.shape(CODEBOOK)[:2]
    resolution = side << (levels - 1)
    attends = [level for level in range(levels) if found.has(f"decoder.up.{level}.attn.0.q.weight")]
    config = VQGANConfig.parse({
        "resolution": resolution, "in_channels": pixels, "channels": channels,
        "channel_multipliers": [width // channels for width in widths],
        "num_res_blocks": found.count("decoder.up.0.block.{}.conv1.weight") - 1,
        "attention_resolutions": [resolution >> level for level in attends],
        "mid_attention": found.has("decoder.mid.attn_1.q.weight"), "norm_groups": NORM_GROUPS, "norm_eps": 1e-5,
        "z_channels": found.shape("decoder.conv_in.weight")[1], "embed_dim": length, "codebook_size": codes,
        "output_range": "unit", "has_encoder": False, "quantizer": quantizer_settings(False)}, f"{where}: the shapes say")
    return vqgan_part(config, weights, taming_name, codebook_rules(), where)


def _find(source: Path) -> _Files:
    """The five files. MissingFileError naming the first that is not there."""
    if source.is_file():
        suffix = next((suffix for suffix in reversed(_SUFFIXES) if source.name == f"encoder{suffix}.pt"), None)
        if suffix is None:
            raise UserError(f"{source}: give the folder of min-dalle's files, or its encoder.pt")
        return _in_folder(source.parent, suffix)
    sizes = [source / name for name in SIZES if (source / name).is_dir()]
    if len(sizes) > 1:
        raise UserError(f"{source}: holds both sizes; give one of them, {' or '.join(map(str, sizes))}")
    folder = sizes[0] if sizes else source
    suffixes = [suffix for suffix in _SUFFIXES if (folder / f"encoder{suffix}.pt").is_file()]
    if len(suffixes) > 1:
        raise UserError(f"{folder}: holds both sizes; give one of them by its file, encoder.pt or encoder_mini.pt")
    return _in_folder(folder, suffixes[0] if suffixes else "")


def _in_folder(folder: Path, suffix: str) -> _Files:
    places = [folder / "detoker.pt", folder / "vqgan" / "detoker.pt", folder.parent / "vqgan" / "detoker.pt"]
    files = _Files(folder / f"encoder{suffix}.pt", folder / f"decoder{suffix}.pt", folder / f"vocab{suffix}.json",
                   folder / f"merges{suffix}.txt", next((place for place in places if place.is_file()), places[0]))
    for path in files:
        if not path.is_file():
            raise MissingFileError(f"{path}: missing; min-dalle's encoder, decoder, detoker (.pt), vocab.json and merges.txt "
                                   "belong together")
    return files
