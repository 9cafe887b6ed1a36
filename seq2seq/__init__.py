"""Caption -> image tokens. Knows ids, nothing of pixels."""

from seq2seq.bpe_tokenizer import BPETokenizer, BPETokenizerConfig
from seq2seq.class_labels import ClassLabels, ClassLabelsConfig
from seq2seq.config import DecoderOnlyConfig, Seq2SeqConfig, TransformerConfig
from seq2seq.decoder_only import DecoderOnly
from seq2seq.encoder_decoder import EncoderDecoder
from seq2seq.frozen_text import FrozenTextConfig, FrozenTextEncoder
from seq2seq.image_transformer import ImageTransformer, TokenLogits
from seq2seq.kinds import TRANSFORMER_KINDS, load_transformer
from seq2seq.presets import PRESETS
from seq2seq.text_sources import TEXT_SOURCES, TextSource, load_text_source
from seq2seq.text_tokenizer import TextBatch, TextTokenizer, TextTokenizerConfig

__all__ = [
    "PRESETS", "TEXT_SOURCES", "TRANSFORMER_KINDS", "BPETokenizer", "BPETokenizerConfig",
    "ClassLabels", "ClassLabelsConfig", "DecoderOnly", "DecoderOnlyConfig", "EncoderDecoder",
    "FrozenTextConfig", "FrozenTextEncoder", "ImageTransformer", "Seq2SeqConfig", "TextBatch",
    "TextSource", "TextTokenizer", "TextTokenizerConfig", "TokenLogits", "TransformerConfig",
    "load_text_source", "load_transformer"]
