"""Caption -> image tokens. Knows ids, nothing of pixels."""

from seq2seq.config import PRESETS, Seq2SeqConfig
from seq2seq.encoder_decoder import EncoderDecoder
from seq2seq.text_tokenizer import TextBatch, TextTokenizer, TextTokenizerConfig

__all__ = ["PRESETS", "EncoderDecoder", "Seq2SeqConfig", "TextBatch", "TextTokenizer", "TextTokenizerConfig"]
