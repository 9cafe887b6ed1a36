"""Tiny models and data for the tests: seeded, float32, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from PIL import Image

from inference import Matcher, MatcherConfig, SamplingParams, TextTowerConfig, save_model_folder
from inference.scoring.matcher import ImageTowerConfig
from inference.scoring.matcher_folder import save_matcher_folder
from seq2seq import (
    DecoderOnly,
    DecoderOnlyConfig,
    EncoderDecoder,
    ImageTransformer,
    Seq2SeqConfig,
    TextTokenizer,
)
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.fingerprint import code_fingerprint
from training.data.tokens.shards import (
    LayoutIndex,
    SplitIndex,
    TokenIndex,
    write_index,
    write_shard,
)

CAPTIONS = [f"a {size}{color} {thing}" for size in ("", "large ", "small ")
            for color in ("red", "green", "blue", "yellow")
            for thing in ("heart", "circle", "square", "octopus", "apple tree")]
TEXT_LENGTH = 12


def text_tokenizer() -> TextTokenizer:
    """Train a text tokenizer on a few dozen captions."""
    return TextTokenizer.train(CAPTIONS, vocab_size=320, text_length=TEXT_LENGTH)


def vqgan(codebook_size: int = 32, seed: int = 0, **changes) -> VQGAN:
    """Make a VQGAN of 16 px and 4 x 4 codes. changes: of its config."""
    torch.manual_seed(seed)
    config = VQGANConfig(resolution=16, channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1,
                         norm_groups=4, attention_resolutions=(), mid_attention=False, z_channels=8,
                         embed_dim=4, codebook_size=codebook_size, **changes)
    model = VQGAN(config)
    # k-means fills the codebook, which is all zeros before: every token would decode alike
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 16, 16) * 2 - 1)
    return model.eval()


def seq2seq(seed: int = 0, **changes) -> EncoderDecoder:
    """Make an encoder-decoder: two layers, width 32; large weights, so that logits differ."""
    torch.manual_seed(seed)
    values = {"text_vocab_size": 320, "text_length": TEXT_LENGTH, "codebook_size": 32,
              "grid": (4, 4), "width": 32, "heads": 2, "head_dim": 16, "encoder_layers": 2,
              "decoder_layers": 2, **changes}
    return _shaken(EncoderDecoder(Seq2SeqConfig(**values)))


def decoder_only(seed: int = 0, **changes) -> DecoderOnly:
    """Make a decoder-only model: three layers, width 32."""
    torch.manual_seed(seed)
    values = {"text_vocab_size": 320, "text_length": TEXT_LENGTH, "codebook_size": 32,
              "grid": (4, 4), "width": 32, "heads": 2, "head_dim": 16, "layers": 3, **changes}
    return _shaken(DecoderOnly(DecoderOnlyConfig(**values)))


def _shaken(model: ImageTransformer) -> ImageTransformer:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def model_folder(folder: Path, **changes) -> Path:
    """Save a whole model folder of the parts above."""
    tokenizer, text = vqgan(), text_tokenizer()
    model = seq2seq(text_vocab_size=text.vocab_size,
                    tokenizer_fingerprint=code_fingerprint(tokenizer), **changes)
    params = SamplingParams(top_k=8, guidance_scale=2.0)
    return save_model_folder(folder, tokenizer, model, text, params, "# tiny\n")


def bert_folder(folder: Path, seed: int = 0) -> Path:
    """Save a text encoder by `transformers`: BERT of two layers, width 16, whole words."""
    import transformers

    words = sorted({word for caption in CAPTIONS for word in caption.split()} | {"large", "blue"})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=len(vocabulary), hidden_size=16,
                                     num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=64)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def t5_folder(folder: Path, width: int = 24, seed: int = 0) -> Path:
    """Save a T5 by `transformers`: two layers, a vocabulary of words; captions end in </s>."""
    import tokenizers
    import transformers

    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                                eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)

    torch.manual_seed(seed)
    config = transformers.T5Config(vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=32,
                                   num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
                                   decoder_start_token_id=0)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


def matcher(seed: int = 0, **text) -> Matcher:
    """Make a matcher: 16 px, one layer of text, width 32; reads ids of `text_tokenizer`."""
    torch.manual_seed(seed)
    image = ImageTowerConfig(resolution=16, channels=8, channel_multipliers=(1, 2), norm_groups=4)
    values = {"text_vocab_size": text_tokenizer().vocab_size, "text_length": TEXT_LENGTH,
              "width": 32, "heads": 2, "head_dim": 16, "layers": 1, **text}
    return Matcher(MatcherConfig(image=image, text=TextTowerConfig(**values), embed_dim=16)).eval()


def matcher_folder(folder: Path) -> Path:
    """Save a whole matcher folder."""
    return save_matcher_folder(folder, matcher(), text_tokenizer(), "# tiny\n")


def pictures(count: int, side: int = 16, seed: int = 0) -> list[Image.Image]:
    """Draw images of noise."""
    generator = numpy.random.default_rng(seed)
    noise = generator.integers(0, 256, (count, side, side, 3)).astype(numpy.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def token_shards(folder: Path, rows: int = 12, layout_grid: tuple[int, int] = (2, 2)) -> None:
    """Save `tokenizer`, the one of `vqgan`, and `tokens`, shards of random tokens of it.

    With captions and layouts, in splits train and held_out.
    """
    tokenizer = vqgan()
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "tokens").mkdir()
    generator = numpy.random.default_rng(0)
    splits = {}
    for split in ("train", "held_out"):
        tokens = generator.integers(0, 32, (rows, 16)).astype(numpy.uint16)
        captions = [[CAPTIONS[row % 5], CAPTIONS[row % 5 + 20]] for row in range(rows)]
        shape = (rows, layout_grid[0] * layout_grid[1])
        layouts = generator.integers(0, 27, shape).astype(numpy.uint16)
        path = folder / f"tokens/{split}-00000-of-00001.arrow"
        file = write_shard(path, captions, tokens, [f"k{row}" for row in range(rows)], layouts)
        splits[split] = SplitIndex(rows=rows, files=[file])
    write_index(folder / "tokens", TokenIndex(
        tokenizer_fingerprint=code_fingerprint(tokenizer), codebook_size=32, grid=(4, 4),
        layout=LayoutIndex(kind="colors", classes=27, grid=layout_grid), splits=splits))
